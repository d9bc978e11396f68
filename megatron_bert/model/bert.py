"""RetrievaBERT for masked language modelling.

Shape suffixes: B rows, S slots, M masked slots a row, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.config.schema import ModelConfig
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.attention import PackedLayout
from megatron_bert.model.block import Block, BlockDropoutKeys
from megatron_bert.parallel.random import dropout_keys, hash_dropout
from megatron_bert.parallel.sharding import local_part, make_parameter
from megatron_bert.parallel.vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy


class MaskedLoss(NamedTuple):
    """Sums over a micro-batch's masked tokens, fp32 scalars.

    Attributes:
        loss: summed cross-entropy in nats.
        correct: number of tokens whose label has the largest logit.
    """

    loss: Tensor
    correct: Tensor


class Embeddings(nn.Module):
    """Sum of word and learned absolute position embeddings, then dropout."""

    def __init__(self, model: ModelConfig, vocab_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(vocab_size, model.hidden_size, tp)
        self.position = nn.Embedding(model.max_position_embeddings, model.hidden_size)
        self.dropout = model.hidden_dropout

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, keys_B: Tensor) -> Tensor:
        """[B, S] ids and positions -> [B, S, D]."""
        x_BSD: Tensor = self.word(tokens_BS) + self.position(positions_BS)
        return hash_dropout(x_BSD, self.dropout if self.training else 0.0, keys_B)


class MaskedHead(nn.Module):
    """Dense, GELU and norm on the masked positions; the decoder is the word embedding's table."""

    def __init__(self, model: ModelConfig, vocab_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.norm = nn.LayerNorm(model.hidden_size, eps=model.norm_eps)
        self.bias = make_parameter((vocab_size,), tp, 0)
        self.group = tp.group

    def transform(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]: what is projected onto the vocabulary."""
        y: Tensor = self.norm(F.gelu(self.dense(hidden)))
        return y

    def forward(
        self, hidden_BMD: Tensor, table: Tensor, labels_BM: Tensor, weights_BM: Tensor
    ) -> MaskedLoss:
        """Sum the loss of the masked positions' hidden states against their labels."""
        loss, correct = vocab_parallel_cross_entropy(
            self.transform(hidden_BMD).flatten(0, 1),
            local_part(table),
            local_part(self.bias),
            labels_BM.flatten(),
            weights_BM.flatten(),
            self.group,
        )
        return MaskedLoss(loss, correct)


class BertForPretraining(nn.Module):
    """Embeddings, PreNorm blocks, final norm and the masked-language-model head.

    Parameters are made on the current default device (the meta device costs nothing) and hold
    nothing until `megatron_bert.model.initialization` fills them.
    """

    def __init__(
        self, model: ModelConfig, vocab_size: int, tp: TensorParallelGroup, seed: int
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(model, vocab_size, tp)
        self.blocks = nn.ModuleList(Block(model, tp) for _ in range(model.num_layers))
        self.final_norm = nn.LayerNorm(model.hidden_size, eps=model.norm_eps)
        self.head = MaskedHead(model, vocab_size, tp)
        self.seed = seed

    def forward(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        masked_BM: Tensor,
        labels_BM: Tensor,
        weights_BM: Tensor,
        rows_B: Tensor,
    ) -> MaskedLoss:
        """Sum the loss over the micro-batch's masked tokens.

        Args:
            tokens_BS: int [B, S] ids of packed rows.
            positions_BS: int [B, S], restarting at 0 in each segment.
            masked_BM: int [B, M] slots whose token is to be predicted.
            labels_BM: int [B, M] the right ids.
            weights_BM: float [B, M], 0 for unused slots.
            rows_B: int64 [B] global row numbers, which key dropout.
        """
        hidden_BSD = self.encode(tokens_BS, positions_BS, rows_B)
        index_BMD = masked_BM.long()[..., None].expand(-1, -1, hidden_BSD.shape[-1])
        loss: MaskedLoss = self.head(
            hidden_BSD.gather(1, index_BMD), self.embeddings.word.weight, labels_BM, weights_BM
        )
        return loss

    def encode(self, tokens_BS: Tensor, positions_BS: Tensor, rows_B: Tensor) -> Tensor:
        """Return the last hidden states [B, S, D], after the final norm."""
        x_BSD = self.embeddings(
            tokens_BS, positions_BS, dropout_keys(rows_B, self.seed, "embeddings", 1)[0]
        )
        layout = PackedLayout.from_positions(positions_BS, x_BSD.dtype)
        for block, keys in zip(self.blocks, self._block_keys(rows_B), strict=True):
            x_BSD = block(x_BSD, layout, keys)
        hidden_BSD: Tensor = self.final_norm(x_BSD)
        return hidden_BSD

    def _block_keys(self, rows_B: Tensor) -> Iterator[BlockDropoutKeys]:
        sites = ("attention_weights", "attention", "feed_forward")
        keys_LB = [dropout_keys(rows_B, self.seed, site, len(self.blocks)) for site in sites]
        for keys_B in zip(*(keys.unbind(0) for keys in keys_LB), strict=True):
            yield BlockDropoutKeys(*keys_B)
