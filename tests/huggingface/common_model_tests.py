"""transformers' common model, pipeline and training tests on this project's modeling code.

Not collected by name: `test_releases.py` runs this file with each release.
"""

from __future__ import annotations

import os
import tempfile
import unittest
from pathlib import Path
from typing import ClassVar

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from tests.huggingface.archive_modules import archive_module, has_archive_module
from tests.huggingface.common_pipelines import TASKS, fill_in_tasks, save_models
from tests.huggingface.tiny_models import (
    HEADS,
    MODELS,
    RetrievaBertConfig,
    RetrievaBertModel,
    tiny_config,
)

_folder = tempfile.TemporaryDirectory()
save_models(Path(_folder.name))
# Read when the mixin is imported.
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = _folder.name

common = archive_module("test_modeling_common")
configuration = archive_module("test_configuration_common")
pipelines = archive_module("test_pipeline_mixin")

configuration.config_common_kwargs = {
    "num_labels": 7,
    "output_hidden_states": True,
    "pad_token_id": 9,
    "problem_type": "regression",
    "return_dict": False,
    "tie_word_embeddings": False,
}
fill_in_tasks(pipelines.pipeline_test_mapping)

# The common tests find out from transformers' own tables what a class is for.
modeling_auto.MODEL_MAPPING_NAMES["retrieva-bert"] = "RetrievaBertModel"
for _task, _names in (
    ("MaskedLM", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    ("SequenceClassification", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    ("TokenClassification", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    ("QuestionAnswering", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
    ("MultipleChoice", modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES),
):
    _names["retrieva-bert"] = HEADS[_task].__name__
    getattr(transformers, f"AutoModelFor{_task}").register(RetrievaBertConfig, HEADS[_task])
transformers.AutoConfig.register("retrieva-bert", RetrievaBertConfig)
transformers.AutoModel.register(RetrievaBertConfig, RetrievaBertModel)


class ModelTester:
    """What the common tests ask for a model's shape and inputs."""

    batch_size = 3
    seq_length = 7
    num_choices = 4
    is_training = True

    def __init__(self, dropout: float = 0.1) -> None:
        self.dropout = dropout
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> RetrievaBertConfig:
        return tiny_config(
            hidden_dropout_prob=self.dropout, attention_probs_dropout_prob=self.dropout
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[RetrievaBertConfig, dict[str, Tensor]]:
        config = self.get_config()
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, config.vocab_size)
        return config, {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}


class RetrievaBertModelTest(
    common.ModelTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase
):
    all_model_classes = MODELS
    pipeline_model_mapping: ClassVar = {
        task: model_class for task, (_, model_class) in TASKS.items()
    }
    test_can_init_all_missing_weights_before_2023 = True
    # transformers 5 has neither any more.
    test_pruning = False
    test_head_masking = False

    def setUp(self) -> None:
        self.model_tester = ModelTester()

    def test_config(self) -> None:
        configuration.ConfigTester(
            self, config_class=RetrievaBertConfig, hidden_size=32, num_attention_heads=4
        ).run_common_tests()


def _labels(head: str, input_ids: Tensor) -> dict[str, Tensor]:
    rows = torch.arange(input_ids.shape[0])
    match head:
        case "MaskedLM":
            return {"labels": input_ids}
        case "TokenClassification":
            return {"labels": input_ids % 2}
        case "QuestionAnswering":
            return {"start_positions": rows + 3, "end_positions": rows + 5}
        case "SequenceClassification" | "MultipleChoice":
            return {"labels": rows % 2}
    raise ValueError(head)


if has_archive_module("test_training_mixin"):
    training = archive_module("test_training_mixin")

    class Training(training.TrainingTesterMixin):
        """The mixin for one head; it knows the labels of language models only."""

        head: str
        # The last step's gradient is to be small, which dropout would leave to chance.
        model_tester = ModelTester(dropout=0.0)

        def _get_trainable_model_class(self) -> type:
            return HEADS[self.head]

        def _create_text_training_batch(
            self, batch_size: int, seq_length: int, vocab_size: int
        ) -> dict[str, Tensor]:
            ids = super()._create_text_training_batch(batch_size, seq_length, vocab_size)[
                "input_ids"
            ]
            # Rows that differ, since their labels do.
            ids = torch.stack([row.roll(number) for number, row in enumerate(ids)])
            labels = _labels(self.head, ids)
            if self.head == "MultipleChoice":
                ids = torch.stack([ids, ids.flip(0)], 1)
            return {"input_ids": ids, **labels}

    for _head in HEADS:
        _name = f"Training{_head}Test"
        globals()[_name] = type(
            _name, (Training, unittest.TestCase), {"head": _head, "__module__": __name__}
        )
