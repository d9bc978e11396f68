"""What `launch/*.sh` call; a job script knows the scheduler, this knows the run.

    python -P -m megatron_bert.jobs begin --job 7 --tries 3 --ranks 16 --config FILE [key=value ...]
    python -P -m megatron_bert.jobs judge --tries 3 RUN_DIR
    python -P -m megatron_bert.jobs announce --job 8 RUN_DIR

`begin` checks the configuration and prints the run directory and, a line each, the keys to add to
those given. `judge` prints one word: finished, again, give-up, refused or held; why goes to
standard error.
`announce` tells the number of the job that follows, where that is another one, or `any`
before that is known.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.command_line.parser import Parser
from megatron_bert.command_line.run import run_cli, told_errors
from megatron_bert.errors import ConfigError

with told_errors():
    from megatron_bert.config.checks import check_config
    from megatron_bert.config.load import load_config
    from megatron_bert.config.rank_layout import without_chosen_layout
    from megatron_bert.jobs.going_on import announce, judge, take_up
    from megatron_bert.jobs.layout import fitting_layout, layout_keys


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -P -m megatron_bert.jobs", description=(__doc__ or "").splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("begin", help="before the ranks are started")
    begin.add_argument("--config", type=Path, required=True, help="YAML file of the run")
    begin.add_argument("--ranks", type=int, required=True, metavar="N", help="those of this job")
    begin.add_argument("--job", required=True, metavar="ID", help="the scheduler's number of it")
    _add_tries(begin)
    begin.add_argument("overrides", nargs="*", metavar="key.path=value")
    end = commands.add_parser("judge", help="after they have ended: does another job follow?")
    end.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    _add_tries(end)
    follow = commands.add_parser("announce", help="another job was submitted")
    follow.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    follow.add_argument("--job", required=True, metavar="ID", help="its number, or any")
    return parser


def _add_tries(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--tries", type=int, required=True, metavar="N", help="jobs in a row without progress"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer a job script.

    Raises:
        UserError: the configuration cannot be used, on these ranks or at all; or the run is in
            use, or was tried too often.
    """
    options = _parser().parse_args(arguments)
    if options.command != "begin" and not options.run_dir.is_dir():
        raise ConfigError(f"run directory {options.run_dir}: there is none; give that of a job")
    if options.command == "announce":
        announce(options.run_dir, options.job)
        return
    if options.tries < 1:
        raise ConfigError(f"--tries {options.tries}: give at least 1")
    if options.command == "begin":
        _begin(options)
        return
    verdict = judge(options.run_dir, options.tries)
    sys.stderr.write(f"{options.run_dir}: {verdict.reason}\n")
    sys.stdout.write(f"{verdict.next.value}\n")


def _begin(options: argparse.Namespace) -> None:
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: give at least 1")
    config = load_config(options.config, options.overrides)
    layout = fitting_layout(config, options.ranks)
    keys = layout_keys(config, layout)
    check_config(
        layout.put_into(without_chosen_layout(config)),
        world_size=options.ranks,
        vocab_size=config.model.vocab_size,
    )
    if keys:
        sys.stderr.write(
            f"the configuration's layout does not fit {options.ranks} ranks; taking "
            f"{' '.join(keys)}\n"
        )
    take_up(config.run.directory, options.job, options.tries)
    sys.stdout.write("".join(f"{line}\n" for line in (config.run.directory, *keys)))


if __name__ == "__main__":
    run_cli(main)
