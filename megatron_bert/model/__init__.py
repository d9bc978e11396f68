"""The encoder: attention, feed-forward, blocks, masked-language-model head."""
