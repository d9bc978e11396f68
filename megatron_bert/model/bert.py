"""An encoder (RetrievaBERT, ModernBERT) for masked language modelling.

Shape suffixes: B rows, S slots, N = B x S tokens, T tokens that this rank holds, M masked slots a
row, D hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.config.schema import ModelConfig, Recompute
from megatron_bert.distributed.collectives import reduce_from_group
from megatron_bert.distributed.topology import TensorParallelGroup
from megatron_bert.model.attention import PackedLayout
from megatron_bert.model.block import Block, BlockDropout
from megatron_bert.model.norm import layer_norm
from megatron_bert.parallel.micro_batches import HeadOutput
from megatron_bert.parallel.partial_gradients import per_token
from megatron_bert.parallel.random import (
    dropout_keys,
    element_draws,
    hash_dropout,
    vector_draws,
)
from megatron_bert.parallel.sharding import local_part, make_parameter
from megatron_bert.parallel.token_share import TokenShare
from megatron_bert.parallel.vocabulary import VocabParallelEmbedding, vocab_parallel_cross_entropy

# The decoder is the embedding's table: a pipeline's last stage has a copy under the same name.
TIED_PARAMETER = "embeddings.word.weight"


@dataclass(frozen=True)
class ModelPart:
    """Which part of the model a pipeline stage holds.

    Attributes:
        layers: numbers of its blocks within the whole model.
        is_first: it begins with the embeddings.
        is_last: it ends with the final norm and the head.
    """

    layers: range
    is_first: bool
    is_last: bool

    @classmethod
    def whole(cls, model: ModelConfig) -> ModelPart:
        """All of it."""
        return cls(range(model.num_layers), is_first=True, is_last=True)


class Embeddings(nn.Module):
    """Word embeddings, with learned positions added to them or normalised, then dropout.

    A pipeline's last stage has only the table of word embeddings, which its head decodes with.
    """

    def __init__(
        self, model: ModelConfig, vocab_size: int, tp: TensorParallelGroup, *, is_table_only: bool
    ) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(vocab_size, model.hidden_size, tp)
        self.position: nn.Module | None = None
        self.norm: nn.Module | None = None
        if not is_table_only and not model.family.rotary:
            table = nn.Embedding(model.max_position_embeddings, model.hidden_size)
            self.position = per_token(table, tp)
        if not is_table_only and model.family.embedding_norm:
            self.norm = per_token(layer_norm(model), tp)
        self.dropout = model.hidden_dropout

    def forward(
        self, tokens_BS: Tensor, positions_BS: Tensor, share: TokenShare, keys_B: Tensor
    ) -> Tensor:
        """[B, S] ids and positions -> [T, D], the tokens that this rank holds."""
        x_TD: Tensor = self.word(tokens_BS.flatten())
        if self.position is not None:
            x_TD = x_TD + self.position(share.take(positions_BS))
        if self.norm is not None:
            x_TD = self.norm(x_TD)
        probability = self.dropout if self.training else 0.0
        if probability == 0.0:
            return x_TD
        draws_T = vector_draws(share.take(keys_B[:, None]), share.slot_numbers(x_TD.device))
        return hash_dropout(x_TD, probability, draws_T, element_draws(x_TD.shape[1], x_TD.device))


class MaskedHead(nn.Module):
    """Dense, GELU and norm on the masked positions; the decoder is the word embedding's table."""

    def __init__(self, model: ModelConfig, vocab_size: int, tp: TensorParallelGroup) -> None:
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size, bias=model.family.biases)
        self.norm = layer_norm(model)
        self.bias = make_parameter((vocab_size,), tp, 0)
        self.group = tp.group

    def transform(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D]: what is projected onto the vocabulary."""
        y: Tensor = self.norm(F.gelu(self.dense(hidden)))
        return y

    def forward(
        self, hidden_BMD: Tensor, table: Tensor, labels_BM: Tensor, weights_BM: Tensor
    ) -> HeadOutput:
        """Sum the loss of the masked positions' hidden states against their labels."""
        loss, correct_N = vocab_parallel_cross_entropy(
            self.transform(hidden_BMD).flatten(0, 1),
            local_part(table),
            local_part(self.bias),
            labels_BM.flatten(),
            weights_BM.flatten(),
            self.group,
        )
        return HeadOutput(loss, correct_N)


class BertForPretraining(nn.Module):
    """Embeddings, PreNorm blocks, final norm and the masked-language-model head, or a part of them.

    Modules that a part lacks are None; the others have the same names as in the whole. Parameters
    are made on the current default device (the meta device costs nothing) and hold nothing until
    `megatron_bert.model.initialization` fills them.
    """

    def __init__(
        self,
        model: ModelConfig,
        vocab_size: int,
        tp: TensorParallelGroup,
        seed: int,
        *,
        part: ModelPart | None = None,
        recompute: Recompute = "none",
    ) -> None:
        super().__init__()
        part = part or ModelPart.whole(model)
        self.embeddings: Embeddings | None = None
        if part.is_first or part.is_last:
            self.embeddings = Embeddings(model, vocab_size, tp, is_table_only=not part.is_first)
        self.blocks = nn.ModuleDict({str(n): Block(model, tp, n, recompute) for n in part.layers})
        self.final_norm: nn.Module | None = None
        self.head: MaskedHead | None = None
        if part.is_last:
            self.final_norm = per_token(layer_norm(model), tp)
            self.head = MaskedHead(model, vocab_size, tp)
        self.model = model
        self.part = part
        self.tp = tp
        self.seed = seed

    def forward(
        self,
        inputs: Tensor,
        positions_BS: Tensor,
        masked_BM: Tensor,
        labels_BM: Tensor,
        weights_BM: Tensor,
        rows_B: Tensor,
    ) -> HeadOutput | Tensor:
        """Compute this part of the model on a micro-batch.

        Args:
            inputs: int [B, S] ids of packed rows; for a later stage, [T, D] hidden states, the
                output of the previous stage.
            positions_BS: int [B, S], restarting at 0 in each segment.
            masked_BM: int [B, M] slots whose token is to be predicted.
            labels_BM: int [B, M] the right ids.
            weights_BM: float [B, M], 0 for unused slots.
            rows_B: int64 [B] global row numbers, which key dropout.

        Returns:
            The head's output; without a head, hidden states [T, D].
        """
        x_TD = self.encode(inputs, positions_BS, rows_B)
        if self.head is None:
            return x_TD
        assert self.embeddings is not None
        share = TokenShare.of(self.tp, *positions_BS.shape)
        hidden_BMD = share.gather_slots(x_TD, masked_BM.long())
        if self.tp.shards_tokens:
            hidden_BMD = reduce_from_group(hidden_BMD, self.tp.group)
        output: HeadOutput = self.head(
            hidden_BMD, self.embeddings.word.weight, labels_BM, weights_BM
        )
        return output

    def encode(self, inputs: Tensor, positions_BS: Tensor, rows_B: Tensor) -> Tensor:
        """Return the part's last hidden states [T, D], after the final norm if it has one."""
        share = TokenShare.of(self.tp, *positions_BS.shape)
        x_TD = inputs
        if self.part.is_first:
            assert self.embeddings is not None
            keys_B = dropout_keys(rows_B, self.seed, "embeddings", range(1))[0]
            x_TD = self.embeddings(inputs, positions_BS, share, keys_B)
        layouts = self._block_layouts(positions_BS, x_TD.dtype)
        dropouts = self._block_dropouts(rows_B, share, x_TD.shape[1])
        for block, layout, dropout in zip(self.blocks.values(), layouts, dropouts, strict=True):
            x_TD = block(x_TD, layout, dropout)
        if self.final_norm is not None:
            x_TD = self.final_norm(x_TD)
        return x_TD

    def _block_layouts(self, positions_BS: Tensor, dtype: torch.dtype) -> list[PackedLayout]:
        """Each block's layout; layers of one kind share theirs."""
        kinds = [self.model.is_local(layer) for layer in self.part.layers]
        made = {
            is_local: PackedLayout.of(self.model, positions_BS, dtype, is_local=is_local)
            for is_local in set(kinds)
        }
        return [made[is_local] for is_local in kinds]

    def _block_dropouts(
        self, rows_B: Tensor, share: TokenShare, hidden_size: int
    ) -> Iterator[BlockDropout]:
        """Yield each block's dropout; all draws are hashed at once, in as few kernels as one's.

        The hashes of one layer are too small for a GPU: launching them would take all the time.
        """
        layers, device = self.part.layers, rows_B.device
        weights_LB = dropout_keys(rows_B, self.seed, "attention_weights", layers)
        attention_LT = feed_forward_LT = rows_B.new_empty(len(layers), 0)
        channels_D = rows_B.new_empty(0)
        if self.training and self.model.hidden_dropout > 0.0:
            slots_T = share.slot_numbers(device)
            attention_LT, feed_forward_LT = (
                vector_draws(
                    share.take(dropout_keys(rows_B, self.seed, site, layers)[..., None]), slots_T
                )
                for site in ("attention", "feed_forward")
            )
            channels_D = element_draws(hidden_size, device)
        # Not indexed layer by layer, which would take operators for each layer.
        rows = (x.unbind() for x in (weights_LB, attention_LT, feed_forward_LT))
        for weights_B, attention_T, feed_forward_T in zip(*rows, strict=True):
            yield BlockDropout(weights_B, attention_T, feed_forward_T, channels_D)
