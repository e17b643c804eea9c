"""Registers the reader of compressed models with transformers.

transformers has no entry point for external readers: they must be registered, which imports transformers. `import lowdim`
must not do that, so it uses `lowdim.after_import`: either order of imports works, and nothing is imported if transformers
is never used.
"""

from __future__ import annotations

import importlib
import logging

__all__ = ["register"]

_log = logging.getLogger(__name__)


def register() -> None:
    """Register `quant_method: "lowdim"` with transformers. Calling it again changes nothing.

    Versions of transformers that do not support external readers are skipped; they reject the folders.
    """
    try:
        importlib.import_module("lowdim.pretrained.quantizer")
    except ImportError as error:
        _log.info("compressed models cannot be read with the installed transformers: %s", error)
