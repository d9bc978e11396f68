"""What transformers' pipeline mixin asks of each task.

The mixin loads every model, puts it into a pipeline and runs that in batches; what a task's output
looks like is kept in files that the source archive lacks, so it is said here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import pipeline

from tests.huggingface.tiny_models import (
    HEADS,
    MODELS,
    RetrievaBertModel,
    tiny_config,
    tiny_tokenizer,
)

_TEXTS = ["a cat that has no name", "吾輩は猫である。名前はまだ無い。"]
_MASKED = ["a <MASK>at", "吾輩は<MASK>である"]


class PipelineTests:
    """One task's examples, and what its output must be."""

    task: ClassVar[str]
    examples: ClassVar[list[Any]] = _TEXTS

    def get_test_pipeline(
        self, model: Any, tokenizer: Any, dtype: str = "float32", **processors: Any
    ) -> tuple[Any, list[Any]]:
        made = pipeline(self.task, model=model.to(getattr(torch, dtype)), tokenizer=tokenizer)
        return made, self.examples

    def run_pipeline_test(self, pipe: Any, examples: list[Any]) -> None:
        for example in examples:
            self.check(pipe(example), example, pipe)

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        raise NotImplementedError


class FillMaskPipelineTests(PipelineTests):
    task = "fill-mask"
    examples = _MASKED

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        assert len(output) == 5
        scores = [guess["score"] for guess in output]
        assert scores == sorted(scores, reverse=True)
        for guess in output:
            assert guess["token_str"] == pipe.tokenizer.decode([guess["token"]])


class FeatureExtractionPipelineTests(PipelineTests):
    task = "feature-extraction"

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        slots = len(pipe.tokenizer(example)["input_ids"])
        assert torch.tensor(output).shape == (1, slots, pipe.model.config.hidden_size)


class TextClassificationPipelineTests(PipelineTests):
    task = "text-classification"

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        (best,) = output
        assert best["label"] in pipe.model.config.id2label.values()
        assert 0.5 <= best["score"] <= 1  # the better of two


class ZeroShotClassificationPipelineTests(PipelineTests):
    task = "zero-shot"

    def get_test_pipeline(
        self, model: Any, tokenizer: Any, dtype: str = "float32", **processors: Any
    ) -> tuple[Any, list[Any]]:
        made = pipeline(
            "zero-shot-classification",
            model=model.to(getattr(torch, dtype)),
            tokenizer=tokenizer,
            candidate_labels=["cat", "dog"],
        )
        return made, self.examples

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        assert sorted(output["labels"]) == ["cat", "dog"]
        assert abs(sum(output["scores"]) - 1) < 2e-3  # FP16


class TokenClassificationPipelineTests(PipelineTests):
    task = "token-classification"

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        for token in output:
            assert token["entity"] in pipe.model.config.id2label.values()
            assert example[token["start"] : token["end"]] == token["word"]


class QAPipelineTests(PipelineTests):
    task = "question-answering"
    examples: ClassVar[list[Any]] = [{"question": "who?", "context": text} for text in _TEXTS]

    def check(self, output: Any, example: Any, pipe: Any) -> None:
        found = example["context"][output["start"] : output["end"]]
        # Release 4 leaves white space at its ends.
        assert output["answer"].strip() == found.strip()


TASKS: dict[str, tuple[type[PipelineTests], type]] = {
    "fill-mask": (FillMaskPipelineTests, HEADS["MaskedLM"]),
    "feature-extraction": (FeatureExtractionPipelineTests, RetrievaBertModel),
    "text-classification": (TextClassificationPipelineTests, HEADS["SequenceClassification"]),
    "zero-shot": (ZeroShotClassificationPipelineTests, HEADS["SequenceClassification"]),
    "token-classification": (TokenClassificationPipelineTests, HEADS["TokenClassification"]),
    "question-answering": (QAPipelineTests, HEADS["QuestionAnswering"]),
}


def fill_in_tasks(mapping: dict[str, dict[str, Any]]) -> None:
    """Enter the classes above into the mixin's table, by path or as classes as it has them."""
    for task, (tests, _) in TASKS.items():
        if task in mapping:
            by_path = isinstance(mapping[task]["test"], str)
            mapping[task]["test"] = f"{tests.__module__}.{tests.__name__}" if by_path else tests


def save_models(folder: Path) -> None:
    """Write a model of every class with a tokenizer, and the report that the mixin reads."""
    tokenizer, report = tiny_tokenizer(), {}
    for model_class in MODELS:
        name = model_class.__name__
        model_class(tiny_config()).save_pretrained(folder / "retrieva-bert" / name)
        tokenizer.save_pretrained(folder / "retrieva-bert" / name)
        report[name] = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": []}
    (folder / "reports").mkdir()
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(report))
