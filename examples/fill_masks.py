"""Hide a word in sentences of a corpus and let an exported model guess it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# The model lies on the disk: nothing is looked up in a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import DataError

with told_errors():
    from transformers import (
        AutoModelForMaskedLM,
        FillMaskPipeline,
        PreTrainedTokenizerFast,
        pipeline,
    )
    from transformers.utils import logging as transformers_logging

    from megatron_bert.data.text import DocumentReader, iterate_documents
    from megatron_bert.huggingface.configuration_retrieva_bert import RetrievaBertConfig
    from megatron_bert.huggingface.modeling_retrieva_bert import RetrievaBertForMaskedLM

TOP = 5
# Of a sentence, after which the next begins.
_END = re.compile(r"(?<=[。！？])|(?<=[.!?])\s|\n")
# In characters; what is longer may not fit into a row.
_SHORTEST_SENTENCE, _LONGEST_SENTENCE = 15, 400
_SHORTEST_WORD = 2
# Stands for a piece of blanks only, as in the vocabulary.
_BLANK = "▁"


@dataclass(frozen=True)
class Question:
    """A sentence with one word hidden.

    Attributes:
        text: the sentence with the mask token in it.
        answer: the hidden word's id.
    """

    text: str
    answer: int


def questions(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, count: int
) -> Iterator[Question]:
    """Yield at most `count` questions, from texts spread evenly over the corpus.

    Each takes another sentence of its text, as far as there are, and the longest word in it that
    is one token of letters.
    """
    step = max(1, len(texts) // count)
    for number, text in enumerate(texts[::step][:count]):
        sentences = [
            s for s in _END.split(text) if _SHORTEST_SENTENCE <= len(s) <= _LONGEST_SENTENCE
        ]
        if not sentences:
            continue
        sentence = sentences[number % len(sentences)]
        encoded = tokenizer(sentence, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if set(ids) & set(tokenizer.all_special_ids) or len(ids) + 2 > tokenizer.model_max_length:
            continue
        words = [
            (end - begin, begin, end, token)
            for token, (begin, end) in zip(ids, encoded["offset_mapping"], strict=True)
            if sentence[begin:end].strip().isalpha()
            and len(sentence[begin:end].strip()) >= _SHORTEST_WORD
        ]
        if words:
            _, begin, end, token = max(words, key=lambda word: word[0])
            space = " " if sentence[begin] == " " else ""
            hidden = f"{sentence[:begin]}{space}{tokenizer.mask_token}{sentence[end:]}"
            yield Question(hidden, token)


def _answer(fill: FillMaskPipeline, question: Question) -> bool:
    """Print a question with the model's guesses; return whether the right one is among them."""
    guesses = fill(question.text, top_k=TOP)
    hit = question.answer in [guess["token"] for guess in guesses]
    right = fill.tokenizer.decode([question.answer]).strip()
    told = "  ".join(
        f"{_shown(guess['token_str'], guess['token'] == question.answer)} {guess['score']:.2f}"
        for guess in guesses
    )
    sys.stdout.write(f"{'yes' if hit else 'no '}  {question.text}\n     {right} <- {told}\n")
    return hit


def _shown(token: str, is_right: bool) -> str:
    """A guess without the blanks around it, in brackets where it is the right one."""
    word = token.strip() or _BLANK
    return f"[{word}]" if is_right else word


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="exported model")
    parser.add_argument(
        "--input", nargs="+", required=True, type=Path, metavar="FILE", help=".jsonl or .txt"
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl (default: %(default)s)",
    )
    parser.add_argument(
        "--count", type=int, default=20, metavar="N", help="sentences (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, and print how often the right word was among the first five."""
    options = _parser().parse_args(arguments)
    if not (options.model / "config.json").is_file():
        raise DataError(
            f"--model {options.model}: holds no config.json; name a directory that "
            "tools/convert_checkpoint.py to-hf has written"
        )
    if options.count < 1:
        raise DataError(f"--count {options.count}: give at least 1")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # The project's own classes, so that code which lies in the directory is not executed.
    AutoModelForMaskedLM.register(RetrievaBertConfig, RetrievaBertForMaskedLM, exist_ok=True)
    model = RetrievaBertForMaskedLM.from_pretrained(options.model, use_safetensors=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.model)
    fill = pipeline("fill-mask", model, tokenizer=tokenizer)
    texts = list(iterate_documents(DocumentReader(options.input, json_key=options.json_key)))
    asked = list(questions(texts, tokenizer, options.count))
    hits = sum(_answer(fill, question) for question in asked)
    sys.stdout.write(f"the right word was among the first {TOP} in {hits} of {len(asked)}\n")


if __name__ == "__main__":
    run_cli(main)
