"""transformers' common model, pipeline and training tests on this project's modeling code.

Not collected by name: `test_releases.py` runs this file with each release.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from tests.huggingface.archive_modules import archive_module
from tests.huggingface.tiny_models import HEADS, MODELS, RetrievaBertConfig, RetrievaBertModel, tiny_config

common = archive_module("test_modeling_common")

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

    def __init__(self, parent: unittest.TestCase) -> None:
        config = self.get_config()
        self.parent = parent
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> RetrievaBertConfig:
        return tiny_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)

    def prepare_config_and_inputs_for_common(self) -> tuple[RetrievaBertConfig, dict[str, Tensor]]:
        config = self.get_config()
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, config.vocab_size)
        return config, {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}


class RetrievaBertModelTest(common.ModelTesterMixin, unittest.TestCase):
    all_model_classes = MODELS
    test_can_init_all_missing_weights_before_2023 = True
    # transformers 5 has neither any more.
    test_pruning = False
    test_head_masking = False

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)
