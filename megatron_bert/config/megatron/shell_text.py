"""The arguments of a command in the text of a shell script, which is read and never run.

What such scripts do is understood: assignments, arrays, quotes, comments, lines that go on,
here-documents, `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME[@]}` and `$((A * B))`. Whatever else
begins with `$` stays as it stands, for the user to fill in; so does a variable that a branch or a
loop assigns, as nobody knows which of them would be taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import takewhile

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.megatron.shell_commands import assignments, commands, is_redirection
from megatron_bert.config.megatron.shell_variables import Variables

COMMAND = "pretrain_bert.py"

_PROGRAM = re.compile(rf"(?:\S*/)?{re.escape(COMMAND)}")
_OPENING = ("if", "for", "while", "until", "case", "select")
_CLOSING = ("fi", "done", "esac")
_TESTS = ("[", "[[", "test", "!")
# What may stand before the first command of a branch.
_BRANCH = re.compile(r"(?:(?:then|else|do)\s+|[^\s()'\"]+\)\s*)")


def command_arguments(text: str, source: str, variables: Mapping[str, str]) -> list[str]:
    """The words behind `pretrain_bert.py` in a script, or all words of a bare list of arguments.

    Args:
        text: The script's text, or a list of arguments.
        source: What errors call it.
        variables: Values of variables that the script is given from outside, `"1"` for `$1`.

    Raises:
        ConfigError: There is no such command, more than one, a quote that does not end, or a
            variable that the script does not have.
    """
    known = Variables(variables, source)
    found: list[list[str]] = []
    bare: list[str] = []
    depth, is_test = 0, False
    for command in commands(text, COMMAND):
        word = command.text.split(None, 1)[0]
        depth += (word in _OPENING) - (word in _CLOSING)
        is_alternative = command.joint == "||" or (command.joint == "&&" and is_test)
        is_test = word in _TESTS or word.startswith("((")
        line = command.text if depth == 0 else _BRANCH.sub("", command.text, count=1)
        if assigned := assignments(line):
            for assignment in assigned:
                known.assign(assignment, for_certain=depth == 0 and not is_alternative)
            continue
        words = known.expand(known.words(known.compute(line)))
        places = [index for index, word in enumerate(words) if _PROGRAM.fullmatch(word)]
        if places:
            behind = words[places[-1] + 1 :]
            found.append(list(takewhile(lambda word: not is_redirection(word), behind)))
        elif words and words[0].startswith("--"):
            bare += words
    if len(found) > 1:
        raise ConfigError(
            f"{source}: {len(found)} commands run {COMMAND}; leave one of them in the file"
        )
    if not found and not bare:
        raise ConfigError(
            f"{source}: no command runs {COMMAND}, and no line begins with an argument; give a "
            "script that runs it, or its arguments behind --"
        )
    known.check_given()
    return found[0] if found else bare
