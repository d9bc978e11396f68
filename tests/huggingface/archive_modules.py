"""Imports transformers' own test modules from the source archive of the release that is running.

They are imported as a package `transformers_tests`, since `tests` is this checkout's. The archive
holds only the top folder of the tests, and its modules import from folders below; those come up
as modules whose every attribute is an empty class.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import transformers
import transformers.utils

from tests.huggingface.releases import archive_tests

_PACKAGE = "transformers_tests"


class _EmptyModule(ModuleType):
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Absent(MetaPathFinder, Loader):
    """Finds what no other finder has found below the package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{_PACKAGE}."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def archive_module(name: str) -> ModuleType:
    """Import one module of the archive, such as `test_modeling_common`."""
    if _PACKAGE not in sys.modules:
        package = ModuleType(_PACKAGE)
        package.__path__ = [str(archive_tests(transformers.__version__))]
        sys.modules[_PACKAGE] = package
        sys.meta_path.append(_Absent())
        # They import the library a second time, from the archive; the installed one is meant.
        transformers.utils.direct_transformers_import = lambda path: transformers
    return importlib.import_module(f"{_PACKAGE}.{name}")


def has_archive_module(name: str) -> bool:
    """Whether the archive of the release that is running has this module."""
    return (archive_tests(transformers.__version__) / f"{name}.py").is_file()
