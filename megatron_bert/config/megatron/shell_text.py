"""A command and its arguments in the text of a shell script, which is read and never run.

What such scripts do is understood: assignments, arrays, quotes, comments, lines that go on,
here-documents, `$NAME`, `${NAME}`, `${NAME:-default}`, `${NAME[@]}` and `$((A * B))`. Whatever else
begins with `$` stays as it stands, for the user to fill in; so does a variable that is assigned in
a branch, a loop, a function, braces, or behind a command that may fail (`grep -q x f && A=2`), as
nobody knows which of them would be taken.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile

from megatron_bert.config.errors import ConfigError
from megatron_bert.config.megatron.shell_commands import (
    Command,
    assignments,
    changed_names,
    commands,
    is_redirection,
)
from megatron_bert.config.megatron.shell_variables import Variables

COMMAND = "pretrain_bert.py"

_PROGRAM = re.compile(rf"(?:\S*/)?{re.escape(COMMAND)}")
# A string that a shell runs may hold another: `srun sh -c "sh -c 'torchrun ...'"`.
_DEEPEST = 5
# Commands that scripts take for granted: what stands behind them and `&&` is done.
_GRANTED = re.compile(
    r"(?:cd|pushd|popd|mkdir|source|\.|export|local|declare|readonly|typeset|set|shopt|ulimit|umask"
    r"|module|ml|conda|echo|printf|true|:|trap|sleep|wait|date)(?=\s|$)"
)
_OUTPUT = re.compile(r"\$\((?!\()|`")


@dataclass(frozen=True)
class ScriptCommand:
    """The command that runs the program.

    Attributes:
        starter: the words before the program, as `torchrun --nnodes 2`; of a bare list of
            arguments, none.
        arguments: the words behind it.
    """

    starter: list[str]
    arguments: list[str]


def read_command(text: str, source: str, variables: Mapping[str, str]) -> ScriptCommand:
    """Find what runs `pretrain_bert.py` in a script; a bare list of arguments is one too.

    Args:
        text: The script's text, or a list of arguments.
        source: What errors call it.
        variables: Values of variables that the script is given from outside, `"1"` for `$1`.

    Raises:
        ConfigError: There is no such command, more than one, a quote that does not end, or a
            variable that the script does not have.
    """
    reader = _Reader(Variables(variables, source))
    try:
        reader.read(text)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}; close the quote") from None
    found = reader.found
    if len(found) > 1:
        raise ConfigError(
            f"{source}: {len(found)} commands run {COMMAND}; leave one of them in the file"
        )
    if not found and not reader.bare:
        raise ConfigError(
            f"{source}: no command runs {COMMAND}, and no line begins with an argument; give a "
            "script that runs it, or its arguments behind --"
        )
    reader.known.check_given()
    return found[0] if found else ScriptCommand([], reader.bare)


class _Reader:
    """What is read of a script.

    Attributes:
        known: its variables.
        found: each command that runs the program.
        bare: words of lines that begin with an argument.
    """

    def __init__(self, known: Variables) -> None:
        self.known = known
        self.found: list[ScriptCommand] = []
        self.bare: list[str] = []

    def read(self, text: str, depth: int = 0) -> None:
        """Read a script, or a string that is run as one.

        Raises:
            ValueError: a quote does not end.
        """
        is_certain = is_granted = True
        for command in commands(text, COMMAND):
            # An alternative stays one to the end of its chain.
            is_certain = not command.joint.startswith("|") and (
                command.joint != "&&" or (is_certain and is_granted)
            )
            is_granted = _is_granted(command)
            if changed := changed_names(command.text):
                for name in changed:
                    self.known.forget(name)
            elif assigned := assignments(command.text):
                for assignment in assigned:
                    certain = is_certain and not command.is_nested
                    self.known.assign(assignment, for_certain=certain)
            else:
                self._read_words(self.known.words(command.text), depth)

    def _read_words(self, words: list[str], depth: int) -> None:
        places = [index for index, word in enumerate(words) if _PROGRAM.fullmatch(word)]
        if places:
            behind = words[places[-1] + 1 :]
            arguments = list(takewhile(lambda word: not is_redirection(word), behind))
            self.found.append(ScriptCommand(words[: places[-1]], arguments))
        elif words and words[0].startswith("--"):
            self.bare += words
        elif depth < _DEEPEST:
            for word in words:
                if COMMAND in word and " " in word:
                    self.read(word, depth + 1)


def _is_granted(command: Command) -> bool:
    if assignments(command.text):
        return _OUTPUT.search(command.text) is None
    return _GRANTED.match(command.text) is not None
