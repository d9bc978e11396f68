"""Train a SentencePiece tokenizer with the special pieces of masked pretraining."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import DataError

with told_errors():
    from megatron_bert.command_line.places import make_folder
    from megatron_bert.data.text import DocumentReader, iterate_documents
    from megatron_bert.data.text_arguments import add_text_arguments, open_texts
    from megatron_bert.data.tokenizer import Tokenizer
    from megatron_bert.data.tokenizer_training import (
        DEFAULT_MAX_SENTENCES,
        train_tokenizer,
        write_model,
    )
    from megatron_bert.progress_bar import ProgressBar
    from megatron_bert.words import counted


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        epilog="The model is a unigram model with byte fallback whose ids 0 to 7 are <unk> <s> "
        "</s> <MASK> <PAD> <CLS> <SEP> <EOD>. The same input gives the same model.",
    )
    add_text_arguments(parser)
    parser.add_argument(
        "--vocab-size",
        required=True,
        type=int,
        metavar="N",
        help="pieces, special ones and 256 bytes included",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="MODEL",
        help="file to write, ending in .model",
    )
    parser.add_argument(
        "--normalization",
        choices=("identity", "nfkc", "nmt_nfkc"),
        default="identity",
        help="what is done to text first; identity keeps every character (default: %(default)s)",
    )
    parser.add_argument(
        "--max-sentences",
        type=int,
        default=DEFAULT_MAX_SENTENCES,
        metavar="N",
        help="train on at most N lines, sampled evenly (default: %(default)s)",
    )
    parser.add_argument(
        "--allow-fewer",
        action="store_true",
        help="take --vocab-size as an upper limit where the text yields fewer pieces",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def _documents(reader: DocumentReader, options: argparse.Namespace) -> Iterator[str]:
    logging.info("reading %s", counted(len(reader.paths), "file"))
    with ProgressBar("reading", reader.total_bytes) as progress:
        for text in iterate_documents(reader, options.on_error):
            yield text
            progress.show(reader.bytes_read)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write a tokenizer."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    options = _parser().parse_args(arguments)
    if options.output.suffix != ".model":
        raise DataError(f"--output {options.output}: give a name that ends in .model")
    if options.output.exists() and not options.overwrite:
        raise DataError(
            f"--output {options.output}: exists already, and datasets may depend on it; choose "
            "another, or replace it with --overwrite"
        )
    reader = open_texts(options)
    make_folder(options.output)
    model = train_tokenizer(
        _documents(reader, options),
        options.vocab_size,
        normalization=options.normalization,
        max_sentences=options.max_sentences,
        allow_fewer=options.allow_fewer,
    )
    write_model(model, options.output)
    pieces = Tokenizer.load(options.output).vocab_size
    told = f"wrote {options.output}: {pieces:,} pieces"
    if pieces < options.vocab_size:
        told += f", not {options.vocab_size:,}: this text has no more that occur often enough"
    sys.stdout.write(told + "\n")


if __name__ == "__main__":
    run_cli(main)
