"""From text and .bin/.idx files to packed, masked batches: thin Python over the C++ core."""
