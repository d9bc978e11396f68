"""From a YAML file and overrides to a checked configuration, and back to YAML."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_bert.command_line.argument_checks import checked
from megatron_bert.config.checks import shell_problems, value_problems
from megatron_bert.config.diagnostics import explain, format_value, raise_problems
from megatron_bert.config.keys import key_at
from megatron_bert.config.overrides import apply_override
from megatron_bert.config.rank_layout import without_chosen_layout
from megatron_bert.config.schema import Config
from megatron_bert.config.yaml_text import KeyPath, format_document, parse_document
from megatron_bert.errors import ConfigError
from megatron_bert.files import StrPath

DEFAULT_RUNS_FOLDER = "runs"


@checked
def load_config(path: StrPath, overrides: str | Sequence[str] = ()) -> Config:
    """Read a configuration file, apply overrides and check everything that needs no machine.

    Args:
        path: A YAML file.
        overrides: `key.path=value` each, applied in order; a bare string is a single override.

    Returns:
        The configuration, with `run.dir` set (default: `runs/` + the file's stem).

    Raises:
        ConfigError: The file is missing or not YAML, a key is unknown or missing, a value is of
            the wrong type or out of range, or two values contradict each other; all problems
            of the load in one message.
    """
    path = Path(path)
    tree, lines = _read(path)
    places = {key: f"{path}, line {line}" for key, line in lines.items() if key}
    return _checked(tree, overrides, places, source=str(path), name=path.stem)


@checked
def build_config(
    tree: Mapping[str, Any], overrides: str | Sequence[str] = (), *, name: str = "run"
) -> Config:
    """Check a configuration given as plain values, as `load_config` checks a file.

    Args:
        tree: Sections, keys and values as in YAML; values may also be paths, or NumPy's numbers and
            arrays. It is not modified.
        overrides: As `load_config`.
        name: If `run.dir` is not given, it becomes `runs/` + this name.

    Raises:
        ConfigError: As `load_config`.
    """
    return _checked(_plain(tree), overrides, {}, source="the configuration", name=name)


def _checked(
    tree: dict[str, Any],
    overrides: str | Sequence[str],
    places: dict[KeyPath, str],
    *,
    source: str,
    name: str,
) -> Config:
    """Apply overrides to `tree` and check it; `places` says where each key was given."""
    given = [overrides] if isinstance(overrides, str) else overrides
    problems = _override(tree, given, places)
    _fill_empty_sections(tree, ())
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and run.get("dir") is None:
        run["dir"] = f"{DEFAULT_RUNS_FOLDER}/{name}"
    config = None
    try:
        config = Config.model_validate(tree)
        problems += [
            *value_problems(without_chosen_layout(config)),
            *shell_problems(config),
        ]
    except ValidationError as error:
        problems += explain(error, places)
    raise_problems(problems, source)
    assert config is not None, "a failed validation has at least one problem"
    return config


@checked
def config_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, with YAML's names for the keys."""
    return config.model_dump(mode="json", by_alias=True)


@checked
def dump_config(config: Config) -> str:
    """The whole configuration, including defaults, as YAML that loads to an equal one."""
    return format_document(config_dict(config))


def _plain(value: Any) -> Any:
    """A copy of nested values: mappings as dicts, paths as text, NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | Iterator):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # Anything that can convert itself to Python's own numbers; avoids importing numpy.
    as_python = getattr(value, "tolist", None)
    return as_python() if callable(as_python) else value


def _override(
    tree: dict[str, Any], overrides: Sequence[str], places: dict[KeyPath, str]
) -> list[str]:
    """Apply overrides to `tree` and record them in `places`; return the refused ones' messages."""
    problems = []
    for override in overrides:
        try:
            changed = apply_override(tree, override)
        except ConfigError as error:
            problems.append(str(error))
            continue
        for key in [key for key in places if key[: len(changed)] == changed]:
            del places[key]
        places[changed] = "command line"
    return problems


def _read(path: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(
            f"configuration file {path} does not exist; give an existing file; examples/ has some"
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"configuration file {path} cannot be read: {error.strerror}; give a readable file"
        ) from None
    tree, lines = parse_document(text, str(path))
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: holds {format_value(tree)}; write sections such as `model:` and `data:`"
        )
    return tree, lines


def _fill_empty_sections(tree: dict[str, Any], path: KeyPath) -> None:
    """A section with every key commented out is an empty section, not the value null."""
    for name, value in tree.items():
        key = key_at((*path, name))
        if key is None:
            continue
        if key.is_section and value is None:
            tree[name] = {}
        elif key.is_section and isinstance(value, dict):
            _fill_empty_sections(value, (*path, name))
        elif key.is_list and isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, dict):
                    _fill_empty_sections(entry, (*path, name, index))
