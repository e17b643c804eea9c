"""The rows of the catalogue: one module for each family, one `Entry` for each system.

A row is added to its family's module and nowhere else. `ROWS` has all of them in order, with everything filled in.
"""

import importlib

from lowdim.catalogue.entry import FAMILIES

__all__ = ["ROWS"]

ROWS = tuple(
    sorted(
        (row.placed(family) for family in FAMILIES for row in importlib.import_module(f"{__name__}.{family}").ROWS),
        key=lambda row: row.number,
    )
)
