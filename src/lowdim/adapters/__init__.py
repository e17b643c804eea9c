"""The update of a frozen weight, made low-dimensional: one Method per paper, all reached by `lowdim.adapt`."""

from lowdim.adapters.adapted import Adapted, adapt
from lowdim.adapters.base import AdaptedLayer, Method, ModelMethod, WeightUpdate, registered_methods
from lowdim.adapters.checkpoint import load_adapter
from lowdim.adapters.lamda import LaMDA
from lowdim.adapters.lora import LoRA
from lowdim.adapters.lora_sb import LoRASB, LoRAXS
from lowdim.adapters.merging import LayerChange, MergeReport
from lowdim.adapters.peft_format import PeftExport, to_peft
from lowdim.adapters.randlora import RandLoRA
from lowdim.adapters.several import AdapterSet, Combination
from lowdim.adapters.svfit import SVFit
from lowdim.adapters.thin import ThinUpdate

__all__ = [
    "Adapted",
    "AdaptedLayer",
    "AdapterSet",
    "Combination",
    "LaMDA",
    "LayerChange",
    "LoRA",
    "LoRASB",
    "LoRAXS",
    "MergeReport",
    "Method",
    "ModelMethod",
    "PeftExport",
    "RandLoRA",
    "SVFit",
    "ThinUpdate",
    "WeightUpdate",
    "adapt",
    "load_adapter",
    "registered_methods",
    "to_peft",
]
