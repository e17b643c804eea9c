"""DiffoRA: a search for the modules that an adapter should train, then LoRA on these."""

from lowdim.adapters.diffora.method import DiffoRA
from lowdim.adapters.diffora.search import DiffoRAAdapted

__all__ = ["DiffoRA", "DiffoRAAdapted"]
