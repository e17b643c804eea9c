"""`lowdim.compare(...)`, and the modules of `lowdim.comparison` under the names that they had before.

The module can be called, so `lowdim.compare` is the function whether or not something has been imported from it.

Example:
    >>> import lowdim
    >>> from lowdim.compare import CompareSettings
    >>> callable(lowdim.compare), CompareSettings.__module__
    (True, 'lowdim.comparison.settings')
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from types import ModuleType
from typing import Any

from lowdim import comparison
from lowdim.comparison import DEFAULT_METHODS, CompareSettings, compare
from lowdim.jobs.comparison import compare as _function

__all__ = ["DEFAULT_METHODS", "CompareSettings", "compare"]


class _CallableModule(ModuleType):
    def __call__(self, **settings: Any) -> Any:
        """The function `lowdim.jobs.comparison.compare`."""
        return _function(**settings)


for _found in pkgutil.iter_modules(comparison.__path__):
    _module = importlib.import_module(f"{comparison.__name__}.{_found.name}")
    sys.modules[f"{__name__}.{_found.name}"] = _module
    setattr(sys.modules[__name__], _found.name, _module)
__signature__ = inspect.signature(_function)
sys.modules[__name__].__class__ = _CallableModule
