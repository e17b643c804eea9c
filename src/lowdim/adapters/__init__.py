"""The update of a frozen weight, made low-dimensional: one Method per paper, all reached by `lowdim.adapt`."""

from lowdim.adapters.adapted import Adapted
from lowdim.adapters.allora import ALLoRA
from lowdim.adapters.atlas import ATLAS, ATLASAdapted
from lowdim.adapters.attaching import adapt
from lowdim.adapters.base import AdaptedLayer, Method, ModelMethod, WeightUpdate, registered_methods
from lowdim.adapters.block_lora import BlockLoRA
from lowdim.adapters.channels import ChannelGroup, gqa_channels, recover_lora, select_channels
from lowdim.adapters.checkpoint import load_adapter
from lowdim.adapters.corda import CorDA, discard
from lowdim.adapters.diffora import DiffoRA
from lowdim.adapters.diffora_search import DiffoRAAdapted
from lowdim.adapters.flora import FLoRA
from lowdim.adapters.increlora import IncreLoRA, increlora_lr_lambda
from lowdim.adapters.lamda import LaMDA
from lowdim.adapters.loldu import LoLDU
from lowdim.adapters.lora import LoRA
from lowdim.adapters.lora_sb import LoRASB, LoRAXS
from lowdim.adapters.loram import LoRAM
from lowdim.adapters.merging import LayerChange, MergeReport
from lowdim.adapters.nola import NOLA
from lowdim.adapters.peft_format import PeftExport, to_peft
from lowdim.adapters.randlora import RandLoRA
from lowdim.adapters.s2ft import S2FT, s2ft_scores
from lowdim.adapters.said import SAID, SubspaceAdapted, SubspaceModel, said
from lowdim.adapters.sara import SaRA
from lowdim.adapters.several import AdapterSet, Combination
from lowdim.adapters.sora import SoRA
from lowdim.adapters.svfit import SVFit
from lowdim.adapters.task_vectors import TaskVector, task_vector
from lowdim.adapters.thin import ThinUpdate

__all__ = [
    "ATLAS",
    "NOLA",
    "S2FT",
    "SAID",
    "ALLoRA",
    "ATLASAdapted",
    "Adapted",
    "AdaptedLayer",
    "AdapterSet",
    "BlockLoRA",
    "ChannelGroup",
    "Combination",
    "CorDA",
    "DiffoRA",
    "DiffoRAAdapted",
    "FLoRA",
    "IncreLoRA",
    "LaMDA",
    "LayerChange",
    "LoLDU",
    "LoRA",
    "LoRAM",
    "LoRASB",
    "LoRAXS",
    "MergeReport",
    "Method",
    "ModelMethod",
    "PeftExport",
    "RandLoRA",
    "SVFit",
    "SaRA",
    "SoRA",
    "SubspaceAdapted",
    "SubspaceModel",
    "TaskVector",
    "ThinUpdate",
    "WeightUpdate",
    "adapt",
    "discard",
    "gqa_channels",
    "increlora_lr_lambda",
    "load_adapter",
    "recover_lora",
    "registered_methods",
    "s2ft_scores",
    "said",
    "select_channels",
    "task_vector",
    "to_peft",
]
