"""Translate the arguments of Megatron-LM's pretrain_bert.py into a configuration file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import ConfigError

with told_errors():
    from megatron_bert.command_line.places import write_output
    from megatron_bert.translation.document import remarks, render_file
    from megatron_bert.translation.script import read_arguments
    from megatron_bert.translation.translate import translate


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        description=__doc__,
        usage="%(prog)s [-h] [--output FILE.yaml] [--overwrite] (FILE | -- ARGUMENT ...)",
        epilog="Of a script with variables, translate what it prints: docs/megatron.md, which also "
        "says what becomes of each argument.",
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="text with its arguments, alone or behind torchrun ... pretrain_bert.py; - for "
        "standard input",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.yaml", help="file to write (default: standard output)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Translate what the command line names."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:end])
    direct = words[end + 1 :]
    if (options.file is None) == (not direct):
        raise ConfigError(
            f"arguments {' '.join(words) or '(none)'}: give either a file, or Megatron-LM's "
            "behind --"
        )
    if options.file is not None:
        direct = read_arguments(_read(options.file), str(options.file))
    translation = translate(direct)
    text = render_file(translation)
    if options.output is None:
        sys.stdout.write(text)
        return
    if options.output.exists() and not options.overwrite:
        raise ConfigError(f"{options.output} exists; give --overwrite to replace it")
    write_output(options.output, text)
    sys.stdout.write("".join(f"{line}\n" for line in remarks(translation)))
    first = "fill in what is listed, then " if translation.by_hand else ""
    sys.stdout.write(
        f"\nwrote {options.output}; next: {first}python pretrain_bert.py --config {options.output} "
        "--dry-run\n"
    )


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"{path}: {reason}; give a text with the arguments") from None


if __name__ == "__main__":
    run_cli(main)
