"""Public names whose module is imported on first use, so that importing a package stays light."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from lowdim.errors import MissingExtraError

__all__ = ["lazy_names"]

#: Imported module -> the package to install and the extra that installs it.
_EXTRAS = {
    "accelerate": ("accelerate", "train"),
    "datasets": ("datasets", "train"),
    "matplotlib": ("matplotlib", "plot"),
    "pandas": ("pandas", "plot"),
    "scipy": ("scipy", "science"),
    "sklearn": ("scikit-learn", "science"),
    "transformers": ("transformers", "train"),
}


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names live in modules that are imported on first use.

    A class with a base from another package (an estimator, a transformers cache) cannot be defined without importing that
    base. Its module imports it at the top, and the family lists the class in a table::

        _HOMES = {"FewShot": "fewshot", "LokiClassifier": "loki.classifier"}
        __getattr__ = lazy_names(__name__, _HOMES)

    Args:
        package: name of the package.
        homes: public name -> module inside the package that defines it.

    Raises (when a name is asked for):
        AttributeError: the package has no such name. MissingExtraError: its module needs a package of an extra that is not
            installed.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in _EXTRAS:
                raise
            raise MissingExtraError(*_EXTRAS[missing], f"{package}.{name}") from error

    return __getattr__
