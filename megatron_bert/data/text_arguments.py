"""Command-line arguments of the tools that read text files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from megatron_bert.data.parsing import OnError
from megatron_bert.data.text import DocumentReader, TextDocuments


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare --input, --json-key, --txt-documents and --on-error."""
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="text files: .jsonl or .txt, also as .gz or .zst, or .parquet",
    )
    parser.add_argument(
        "--json-key",
        default="text",
        metavar="KEY",
        help="key of the text in .jsonl, its column in .parquet; dots lead into objects "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--txt-documents",
        choices=get_args(TextDocuments),
        default="line",
        help="a document of .txt is a line, or a block ended by blank lines (default: %(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=get_args(OnError),
        default="fail",
        help="at a line or row that cannot be used: stop, or leave it out (default: %(default)s)",
    )


def open_texts(options: argparse.Namespace) -> DocumentReader:
    """Open the files that these arguments name.

    Raises:
        DataError: one cannot be used.
    """
    return DocumentReader(options.input, options.txt_documents, options.json_key)
