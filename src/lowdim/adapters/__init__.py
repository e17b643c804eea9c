"""The update of a frozen weight, made low-dimensional: one Method per paper, all reached by `lowdim.adapt`."""

from lowdim.adapters.adapted import Adapted, LayerChange, MergeReport, adapt
from lowdim.adapters.base import AdaptedLayer, Method, WeightUpdate, registered_methods
from lowdim.adapters.checkpoint import load_adapter
from lowdim.adapters.lora import LoRA
from lowdim.adapters.peft_format import PeftExport, to_peft

__all__ = [
    "Adapted",
    "AdaptedLayer",
    "LayerChange",
    "LoRA",
    "MergeReport",
    "Method",
    "PeftExport",
    "WeightUpdate",
    "adapt",
    "load_adapter",
    "registered_methods",
    "to_peft",
]
