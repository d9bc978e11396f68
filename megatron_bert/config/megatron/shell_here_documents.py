"""The texts that stand in a shell script: scripts of their own are read, others are left out."""

from __future__ import annotations

import re
from bisect import bisect
from collections import defaultdict

from megatron_bert.config.megatron.shell_words import piece_end

# Not `<<<`, and no shift of a number.
_BEGIN = re.compile(r"(?<!<)<<(-?)\s*(['\"\\]?)([A-Za-z_]\w*)['\"]?")
# How a line begins that runs a program; what stands behind `$` may be anything.
_RUNS = re.compile(
    r"\s*(?:[A-Za-z_]\w*=\S*\s+|(?:exec|nohup|time|env|run)\s+)*"
    r"['\"]?(?:\S*[$/]\S*|python[\d.]*|torchrun|srun|mpirun|mpiexec|deepspeed|accelerate|numactl"
    r"|singularity|apptainer|docker|bash|sh)['\"]?\s"
)


def without_here_documents(text: str, program: str) -> str:
    """Take the texts out that stand in a script, but for those that are scripts of the program."""
    lines = text.split("\n")
    # By the sign behind `<<`: with `-` it takes tabs before its end.
    places: dict[tuple[str, str], list[int]] = defaultdict(list)
    for number, line in enumerate(lines):
        places["", line].append(number)
        places["-", line.lstrip("\t")].append(number)
    kept: list[str] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        kept.append(line)
        number += 1
        begin = _BEGIN.search(line)
        if begin is None or "((" in line or line.lstrip().startswith("#"):
            continue
        ends = places.get((begin[1], begin[3]), [])
        next_end = bisect(ends, number - 1)
        if next_end == len(ends):
            # A text that only looks like one.
            continue
        body = lines[number : ends[next_end]]
        number = ends[next_end] + 1
        if _is_script(body, program):
            # The outer shell takes one backslash away.
            kept += body if begin[2] else [inner.replace("\\$", "$") for inner in body]
    return "\n".join(kept)


def _is_script(body: list[str], program: str) -> bool:
    """Whether a line runs the program; prose that names it has apostrophes that no quote ends."""
    lines = "\n".join(body).replace("\\\n", " ").split("\n")
    if not any(program in line and _runs(line, program) for line in lines):
        return False
    text, index = "\n".join(body), 0
    try:
        while index < len(text):
            index = piece_end(text, index)
    except ValueError:
        return False
    return True


def _runs(line: str, program: str) -> bool:
    return _RUNS.match(f"{line} ") is not None or line.split()[0].endswith(program)
