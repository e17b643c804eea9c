"""Run a function as soon as another package's module has been imported, without importing it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["after_import"]


def after_import(module: str, call: str) -> None:
    """Call a function once `module` is imported: now if it is already loaded, else right after it has loaded.

    A finder on Python's import path waits for that one module, lets the usual loader load it, and removes itself. It costs
    nothing if the module is never imported.

    Args:
        module: full name of the module to wait for.
        call: `"package.module:function"`, imported only then.

    Example:
        >>> import json
        >>> from lowdim.after_import import after_import
        >>> after_import("json", "builtins:print")
        <BLANKLINE>
    """
    waiting = any(isinstance(finder, _Watcher) and finder.watches(module, call) for finder in sys.meta_path)
    if not waiting:
        loaded = sys.modules.get(module)
        if loaded is not None and not getattr(loaded.__spec__, "_initializing", False):
            _run(call)
        else:
            sys.meta_path.insert(0, _Watcher(module, call))


def _run(call: str) -> None:
    module, _, function = call.partition(":")
    getattr(importlib.import_module(module), function)()


class _Watcher(MetaPathFinder):
    def __init__(self, module: str, call: str):
        self._module, self._call = module, call

    def watches(self, module: str, call: str) -> bool:
        return (module, call) == (self._module, self._call)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenRun(spec.loader, self)
                return spec
        return None

    def loaded(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            _run(self._call)


class _ThenRun(Loader):
    """The module's own loader, and then the call."""

    def __init__(self, loader: Any, watcher: _Watcher):
        self._loader, self._watcher = loader, watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._watcher.loaded()
