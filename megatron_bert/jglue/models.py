"""Models and tokenizers from a directory that `from_pretrained` can read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from megatron_bert.errors import DataError
from megatron_bert.huggingface.configuration_retrieva_bert import RetrievaBertConfig
from megatron_bert.huggingface.modeling_retrieva_bert import (
    RetrievaBertForMultipleChoice,
    RetrievaBertForQuestionAnswering,
    RetrievaBertForSequenceClassification,
)
from megatron_bert.jglue.recipes import Recipe
from megatron_bert.jglue.results import FILE_NAME

# Without one of these, transformers may make a tokenizer that has only its special tokens.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_NEEDED_TOKENS = ("cls_token", "sep_token", "pad_token")
# The files in the directory that determine the results.
_DECIDING_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.py")


def use_own_classes() -> None:
    """Load `retrieva-bert` with the project's own classes.

    The code in an exported directory is then not executed.
    """
    AutoConfig.register(RetrievaBertConfig.model_type, RetrievaBertConfig, exist_ok=True)
    for auto, model in (
        (AutoModelForSequenceClassification, RetrievaBertForSequenceClassification),
        (AutoModelForMultipleChoice, RetrievaBertForMultipleChoice),
        (AutoModelForQuestionAnswering, RetrievaBertForQuestionAnswering),
    ):
        auto.register(RetrievaBertConfig, model, exist_ok=True)


@dataclass(frozen=True)
class ModelSource:
    """A directory with a model.

    Attributes:
        folder: the directory.
        trust_remote_code: whether code in it may be executed.
        random_weights: whether to use only its shape, not its weights.
    """

    folder: Path
    trust_remote_code: bool = False
    random_weights: bool = False

    def check(self) -> None:
        """Refuse a folder that is not such a directory.

        Raises:
            DataError: it holds no configuration that transformers knows.
        """
        if not (self.folder / "config.json").is_file():
            raise DataError(
                f"--model {self.folder}: holds no config.json; name a directory that "
                "tools/convert_checkpoint.py to-hf or save_pretrained has written"
            )
        if not self.trust_remote_code:
            use_own_classes()

    def fingerprint(self) -> dict[str, str]:
        """Return the SHA-256 of every file that determines the results, by name."""
        files = {path for kind in _DECIDING_FILES for path in self.folder.glob(kind)}
        # The tool's own file, if the results are written beside the model.
        files.discard(self.folder / FILE_NAME)
        answer = {}
        for path in sorted(files):
            with path.open("rb") as stream:
                answer[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return answer

    def load_tokenizer(self, recipe: Recipe, max_length: int) -> Any:
        """Load the tokenizer.

        Args:
            recipe: the kind of task that it is for.
            max_length: maximum tokens of an input; the model must have positions for them.

        Raises:
            DataError: there is none, it lacks a special token or offsets, or the model does not
                take inputs of that length.
        """
        if not any(any(self.folder.glob(kind)) for kind in _TOKENIZER_FILES):
            raise DataError(
                f"--model {self.folder}: holds no tokenizer (none of "
                f"{', '.join(_TOKENIZER_FILES)}); put the model's own beside its config.json"
            )
        with self._refused("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, trust_remote_code=self.trust_remote_code
            )
        if lacking := [name for name in _NEEDED_TOKENS if getattr(tokenizer, name) is None]:
            raise DataError(
                f"--model {self.folder}: the tokenizer has no {', '.join(lacking)}, without which "
                "texts cannot be put into pairs and batches; name it in tokenizer_config.json"
            )
        if recipe.needs_offsets and not tokenizer.is_fast:
            raise DataError(
                f"--model {self.folder}: {type(tokenizer).__name__} does not tell which characters "
                "a token stands for, and answers are cut out of texts; put a fast tokenizer "
                "(tokenizer.json) there"
            )
        self._check_length(max_length)
        return tokenizer

    def load_model(self, recipe: Recipe) -> Any:
        """Load the encoder in fp32 with a new head, whose weights come from torch's generator.

        Raises:
            DataError: the weights are missing or damaged, do not match the configuration, or the
                architecture has no such head.
        """
        auto = recipe.auto_class
        with self._refused("model"):
            config = self._config(**recipe.head)
            if self.random_weights:
                return auto.from_config(
                    config, dtype=torch.float32, trust_remote_code=self.trust_remote_code
                )
            model, loaded = auto.from_pretrained(
                self.folder,
                config=config,
                dtype=torch.float32,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        self._check_loaded(model, loaded["missing_keys"])
        return model

    def _config(self, **head: Any) -> Any:
        return AutoConfig.from_pretrained(
            self.folder, trust_remote_code=self.trust_remote_code, **head
        )

    def _check_length(self, max_length: int) -> None:
        with self._refused("model"):
            positions = getattr(self._config(), "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise DataError(
                f"--model {self.folder}: config.json has max_position_embeddings = {positions}, "
                f"and inputs have up to {max_length} tokens; give --max-length {positions} or less "
                "(results.json will say so)"
            )

    def _check_loaded(self, model: Any, missing: Iterator[str]) -> None:
        """Refuse an encoder with missing weights, which would stay random; head and pooler may."""
        encoder = f"{model.base_model_prefix}."
        new = sorted(
            name for name in missing if name.startswith(encoder) and ".pooler." not in name
        )
        if new:
            raise DataError(
                f"--model {self.folder}: the weights lack {len(new)} of the encoder's parameters, "
                f"{new[0]} the first; put a config.json and weights of one architecture there"
            )

    @contextmanager
    def _refused(self, part: str) -> Iterator[None]:
        """Turn errors of transformers about the directory into a `DataError`."""
        try:
            yield
        except Exception as error:
            # Any exception: the tokenizers library raises bare ones for a damaged file.
            told = " ".join(str(error).split())
            remedy = (
                "give --trust-remote-code to execute the code that lies in it"
                if "trust_remote_code" in told
                else "copy the directory again, or name another"
            )
            raise DataError(
                f"--model {self.folder}: its {part} cannot be loaded ({told[:300]}); {remedy}"
            ) from error
