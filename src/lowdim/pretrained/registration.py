"""Makes the reader of compressed models known to transformers.

transformers has no entry point for readers of others: one is known once it has been registered, which imports transformers.
`import lowdim` must not do that, so it leaves this to `lowdim.after_import`: either order of imports works, and nothing is
imported where transformers is never used.
"""

from __future__ import annotations

import importlib
import logging

__all__ = ["register"]

_log = logging.getLogger(__name__)


def register() -> None:
    """Make `quant_method: "lowdim"` known to transformers. Calling it again changes nothing.

    A transformers that is too old to take readers of others is left alone; such a version refuses the folders.
    """
    try:
        importlib.import_module("lowdim.pretrained.quantizer")
    except ImportError as error:
        _log.info("compressed models cannot be read with the transformers that is installed: %s", error)
