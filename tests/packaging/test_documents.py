"""The documents: no dead links, two READMEs of one content, commands that exist."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bert import api
from megatron_bert.errors import UserError
from megatron_bert.training import main as training

CHECKOUT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*sorted(CHECKOUT.glob("*.md")), *sorted(CHECKOUT.glob("docs/*.md"))]
# Documents in which every command is to be one that can be given.
WITH_COMMANDS = [
    "README.md",
    *(f"docs/{name}.md" for name in ("quickstart", "tutorial", "megatron")),
]

_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
# 187 billion is 1,870 億: of whole numbers the languages have different words.
_DECIMAL = re.compile(r"\d+\.\d+")


def _prose(document: Path) -> str:
    return _FENCE.sub("", document.read_text(encoding="utf-8"))


def _anchors(document: Path) -> set[str]:
    """What a git host makes of headings: small letters, hyphens for blanks, no punctuation."""
    headings = _HEADING.findall(_prose(document))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    dead = []
    for link in _LINK.findall(_prose(document)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(link)
    assert dead == []


def test_the_japanese_readme_has_the_content_of_the_english_one() -> None:
    english, japanese = CHECKOUT / "README.md", CHECKOUT / "README.ja.md"
    assert _FENCE.findall(japanese.read_text("utf-8")) == _FENCE.findall(english.read_text("utf-8"))
    ours, theirs = (_prose(document) for document in (japanese, english))
    assert ours.count("\n## ") == theirs.count("\n## ")
    assert ours.count("\n|") == theirs.count("\n|")
    assert ours.count("\n\n") == theirs.count("\n\n"), "paragraphs"
    assert set(_DECIMAL.findall(ours)) == set(_DECIMAL.findall(theirs))
    # Each links to the other, and to headings of its own.
    links = [link for link in _LINK.findall(theirs) if link[0] != "#" and link != "README.ja.md"]
    assert sorted(
        link for link in _LINK.findall(ours) if link[0] != "#" and link != "README.md"
    ) == (sorted(links))
    assert "README.ja.md" in _LINK.findall(theirs)
    assert "README.md" in _LINK.findall(ours)
    code = re.compile(r"`[^`\n]+`")
    assert sorted(code.findall(ours)) == sorted(code.findall(theirs))


def _commands(document: str) -> Iterator[list[str]]:
    """The words of each command of this project that a document shows."""
    for block in re.findall(r"^```bash\n(.*?)^```$", (CHECKOUT / document).read_text("utf-8"),
                            re.DOTALL | re.MULTILINE):  # fmt: skip
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("python", "torchrun"):
                yield words


@pytest.mark.parametrize("document", WITH_COMMANDS)
def test_every_command_of_a_guide_is_understood_by_its_program(document: str) -> None:
    for words in _commands(document):
        programs = [word for word in words if word.endswith(".py")]
        if not programs:
            continue
        program, arguments = programs[0], words[words.index(programs[0]) + 1 :]
        if "--" in arguments:
            arguments = arguments[: arguments.index("--")]
        parser = _parser_of(program)
        try:
            parsed = _parse(parser, arguments)
        except (SystemExit, UserError):
            pytest.fail(f"{document}: {' '.join(words)}")
        config = getattr(parsed, "config", None)
        if config is not None and str(config).startswith("examples/"):
            assert (CHECKOUT / config).is_file(), f"{document}: {config}"


def _parser_of(program: str) -> argparse.ArgumentParser:
    module = training if program == "pretrain_bert.py" else importlib.import_module(
        program.removesuffix(".py").replace("/", ".")
    )  # fmt: skip
    parser = module._parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def _parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    try:
        return parser.parse_intermixed_args(arguments)
    except TypeError:  # commands within the command
        return parser.parse_args(arguments)


def test_the_sites_links_are_those_of_the_checkout() -> None:
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", CHECKOUT / "docs" / "site" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    assert (
        hooks.with_site_links(
            "[a](docs/data.md#rows) [b](LICENSE) [c](https://x.org/a) [d](gone.md)",
            "index.md",
            CHECKOUT,
        )
        == "[a](data.md#rows) [b](repository/LICENSE.md) [c](https://x.org/a) [d](gone.md)"
    )
    assert (
        hooks.with_site_links(
            "[a](../README.md#x) [b](../examples/corpus) [c](data.md) [d](#own)",
            "quickstart.md",
            CHECKOUT,
        )
        == "[a](index.md#x) [b](repository/examples/corpus.md) [c](data.md) [d](#own)"
    )


def test_the_site_has_every_page_of_the_guide() -> None:
    """The strict build says so too, but only where MkDocs is."""
    navigation = (CHECKOUT / "mkdocs.yml").read_text("utf-8").partition("\nnav:\n")[2]
    shown = re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)
    pages = {path.name for path in (CHECKOUT / "docs").glob("*.md")}
    outside = {"index.md", "ja.md", "contributing.md", "security.md", "changelog.md"}
    assert sorted(shown) == sorted(pages | outside)


def test_every_name_of_the_api_is_explained() -> None:
    guide = (CHECKOUT / "docs" / "python.md").read_text("utf-8")
    assert [name for name in api.__all__ if not re.search(rf"`{name}\b", guide)] == []


def test_the_page_of_the_api_names_every_argument_with_its_default() -> None:
    page = (CHECKOUT / "docs" / "python.md").read_text("utf-8")
    functions = [getattr(api, name) for name in api.__all__ if name.islower()]
    lacking = []
    for function in [*functions, api.PreprocessOptions]:
        for name, parameter in inspect.signature(function).parameters.items():
            default = parameter.default
            wanted = name if default is parameter.empty else f"{name}={default!r}"
            wanted = wanted.replace("'", '"')
            if f"`{wanted}`" not in page:
                lacking.append(f"{function.__name__}: {wanted}")
    assert lacking == []
