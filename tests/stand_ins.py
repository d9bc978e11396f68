"""Modules that stand in for optional packages which are not installed, or need a GPU."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest


def install(patch: pytest.MonkeyPatch, name: str, **attributes: Any) -> ModuleType:
    """Have a module of this name found and imported, with these attributes, until the test ends.

    The packages that it lies in are made where they are not there.
    """
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    vars(module).update(attributes)
    patch.setitem(sys.modules, name, module)
    parent, _, last = name.rpartition(".")
    if parent:
        if not isinstance(sys.modules.get(parent), ModuleType):
            install(patch, parent)
        patch.setattr(sys.modules[parent], last, module, raising=False)
    return module
