"""lowdim: train, adapt, compress and explain neural networks in few dimensions.

`lowdim.adapt(model, method)`, `lowdim.load_adapter(model, folder)` and `lowdim.compare(task=…, model=…)` are the calls that
most code needs; the families are `lowdim.adapters`, `optim`, `layers`, `compress`, `represent`, `diagnose` and `solve`. Nothing
is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lowdim.after_import import after_import
from lowdim.lazy import lazy_names
from lowdim.version import __version__

_FUNCTIONS = {"adapt": "adapters", "compare": "jobs.comparison", "load_adapter": "adapters"}
_PACKAGES = (
    "adapters", "calibrate", "catalogue", "compress", "diagnose", "errors", "export", "jobs", "layers", "linalg",
    "methods", "modules", "optim", "plan", "pretrained", "ranks", "report", "represent", "results", "solve", "surgery", "train",
)  # fmt: skip

#: Packages under their former names.
_MOVED = {"strategies": "methods"}

__all__ = ["__version__", *_FUNCTIONS, *_PACKAGES]

if TYPE_CHECKING:
    from lowdim.adapters import adapt as adapt
    from lowdim.adapters import load_adapter as load_adapter
    from lowdim.jobs.comparison import compare as compare


def __getattr__(name: str) -> Any:
    name = _MOVED.get(name, name)
    if name in _PACKAGES:
        return importlib.import_module(f"lowdim.{name}")
    return lazy_names(__name__, _FUNCTIONS)(name)


def __dir__() -> list[str]:
    return sorted(__all__)


# transformers then reads the compressed models that `lowdim.pretrained` writes; nothing is imported before transformers is.
after_import("transformers.quantizers", "lowdim.pretrained.registration:register")
# `save_pretrained` of a model with layers of ours then writes what loads again, or says which call does.
after_import("transformers.modeling_utils", "lowdim.pretrained.guard:install")
