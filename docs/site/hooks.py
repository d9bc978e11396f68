"""Brings what lies outside docs/ into the site, under the links that a git host follows.

A page links to `../examples/one_gpu.yaml` or to `../README.md` as it lies in the checkout. Of
README and its like the site has pages; any other file becomes a page that shows it, a folder one
that lists it. A link to what does not exist stays as it is, and the strict build refuses it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

# Files of the checkout's root that are pages, and their names in the site.
PAGES = {
    "README.md": "index.md",
    "README.ja.md": "ja.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
_DOCS = "docs/"
_OTHERS = "repository/"
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".jsonl": "json"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/, and whatever they and the others link to."""
    root = _root(config)
    for name, page in PAGES.items():
        if (root / name).is_file():
            files.append(File.generated(config, page, content=(root / name).read_text("utf-8")))
    for file in list(files.documentation_pages()):
        for target in _linked(file.content_string, _checkout_name(file.src_uri)):
            if target.startswith(_DOCS) or target in PAGES or not (root / target).exists():
                continue
            if files.get_file_from_path(site_name(target)) is None:
                content = _shown(root / target, target)
                files.append(File.generated(config, site_name(target), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links within the checkout into links within the site."""
    return with_site_links(markdown, page.file.src_uri, _root(config))


def with_site_links(markdown: str, page: str, root: Path) -> str:
    """The text of a page, by its name in the site, with links as the site has them."""
    here = _checkout_name(page)

    def link(match: re.Match[str]) -> str:
        target = _target(match[1], here)
        if page.startswith(_OTHERS) or not (root / target).exists():
            return match[0]
        start = posixpath.dirname(page) or "."
        return posixpath.relpath(site_name(target), start) + (match[2] or "")

    return _LINK.sub(link, markdown)


def site_name(target: str) -> str:
    """The name in the site of a file or folder of the checkout."""
    if target in PAGES:
        return PAGES[target]
    return target.removeprefix(_DOCS) if target.startswith(_DOCS) else f"{_OTHERS}{target}.md"


def _checkout_name(page: str) -> str:
    names = {site: name for name, site in PAGES.items()}
    return names.get(page, f"{_DOCS}{page}")


def _linked(markdown: str, here: str) -> list[str]:
    return [_target(match[1], here) for match in _LINK.finditer(markdown)]


def _target(link: str, here: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))


def _shown(path: Path, name: str) -> str:
    """A page that shows a file, or lists a folder."""
    if path.is_dir():
        return f"# {name}/\n\n" + "".join(f"- `{entry.name}`\n" for entry in sorted(path.iterdir()))
    language = _LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n\n````{language}\n{path.read_text('utf-8')}````\n"


def _root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent
