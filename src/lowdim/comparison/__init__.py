"""`lowdim compare`: forecast, train fairly on the user's own data, and export the winner."""

from lowdim.comparison.runner import compare
from lowdim.comparison.settings import DEFAULT_METHODS, CompareSettings

__all__ = ["DEFAULT_METHODS", "CompareSettings", "compare"]
