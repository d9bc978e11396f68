"""How many ranks a script starts, and how as many are started here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence

from megatron_bert.config.megatron.shell_text import COMMAND
from megatron_bert.words import counted

_TORCHRUN = re.compile(r"(?:\S*/)?torchrun|torch\.distributed\.(?:run|launch)")
_OPTION = re.compile(r"--(nnodes|nproc[-_]per[-_]node)(?:=(.*))?", re.DOTALL)
# Of torch.distributed.launch, which torchrun does by itself.
_NEEDLESS = ("--use_env", "--use-env")
# What a shell would take for something else than text, but for variables still to be put in.
_NEEDS_QUOTES = re.compile(r"[^\w@%+=:,./${}\[\]*-]", re.ASCII)


def ranks_remarks(starter: Sequence[str], config: str) -> Iterator[str]:
    """Lines for people: the number of ranks where it can be read, and the command.

    Args:
        starter: the words that stand before the program in a script's command.
        config: the file that the translation is written to.
    """
    program = f"{COMMAND} --config {shlex.quote(config)}"
    options = _torchrun_options(starter)
    if options is not None:
        nodes, per_node = _nodes(options)
        each = "" if nodes == "1" else ", on each node"
        yield f"Ranks of the script: {_number(nodes, per_node)}. For as many{each}:"
        yield "  " + " ".join(["torchrun", *map(_quoted, options), program])
    elif starter:
        yield (
            f"Ranks of the script: as many as {' '.join(map(_quoted, starter))} starts. For as "
            "many, on each node:"
        )
        yield f"  torchrun --nproc-per-node=GPUS {program}"


def _torchrun_options(starter: Sequence[str]) -> list[str] | None:
    """What torchrun is given, or its predecessor; None: something else starts the ranks."""
    for place, word in enumerate(starter):
        if _TORCHRUN.fullmatch(word):
            return [option for option in starter[place + 1 :] if option not in _NEEDLESS]
    return None


def _nodes(options: Sequence[str]) -> tuple[str, str]:
    """Nodes, and ranks of each, as they are written."""
    found = {"nnodes": "1", "nproc_per_node": "1"}
    for option, behind in zip(options, [*options[1:], ""], strict=False):
        if named := _OPTION.fullmatch(option):
            found[named[1].replace("-", "_")] = behind if named[2] is None else named[2]
    return found["nnodes"], found["nproc_per_node"]


def _number(nodes: str, per_node: str) -> str:
    if not (nodes.isdecimal() and per_node.isdecimal()):
        return f"{nodes} x {per_node} (nodes x ranks of each)"
    if nodes == "1":
        return per_node
    return f"{int(nodes) * int(per_node):,} ({counted(int(nodes), 'node')} of {per_node})"


def _quoted(word: str) -> str:
    return shlex.quote(word) if _NEEDS_QUOTES.search(word) or not word else word
