"""One row for each of the sixty systems: its description, its claim, how to build it, how to reproduce it.

The rows are data (`catalogue/rows/`, one module for each family); nothing here imports torch, so `lowdim list` is fast.
"""

from lowdim.catalogue.entry import BASELINES, BY_FARMS, FAMILIES, Entry, Variant
from lowdim.catalogue.lookup import entries, find, methods, variant, variants

__all__ = ["BASELINES", "BY_FARMS", "FAMILIES", "Entry", "Variant", "entries", "find", "methods", "variant", "variants"]
