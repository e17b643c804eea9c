"""The update of a frozen weight, made low-dimensional: one Method per paper, all reached by `lowdim.adapt`."""

from lowdim.adapters.allora import ALLoRA
from lowdim.adapters.atlas.method import ATLAS, ATLASAdapted
from lowdim.adapters.atlas.task_vectors import TaskVector, task_vector
from lowdim.adapters.block_lora import BlockLoRA
from lowdim.adapters.corda import CorDA, discard
from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.adapter_set import AdapterSet
from lowdim.adapters.core.attach import adapt
from lowdim.adapters.core.combination import Combination
from lowdim.adapters.core.files.checkpoint import load_adapter
from lowdim.adapters.core.files.peft import PeftExport, to_peft
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.merging import LayerChange, MergeReport
from lowdim.adapters.core.method import Method, ModelMethod, registered_methods
from lowdim.adapters.core.subspace import SubspaceModel, intrinsic_subspace
from lowdim.adapters.core.thin import ThinUpdate
from lowdim.adapters.core.update import WeightUpdate
from lowdim.adapters.diffora.method import DiffoRA
from lowdim.adapters.diffora.search import DiffoRAAdapted
from lowdim.adapters.flora import FLoRA
from lowdim.adapters.increlora.method import IncreLoRA
from lowdim.adapters.increlora.schedule import increlora_lr_lambda
from lowdim.adapters.lamda import LaMDA
from lowdim.adapters.loldu import LoLDU
from lowdim.adapters.lora import LoRA
from lowdim.adapters.lora_sb import LoRASB, LoRAXS
from lowdim.adapters.loram.channels import ChannelGroup, gqa_channels, recover_lora, select_channels
from lowdim.adapters.loram.method import LoRAM
from lowdim.adapters.nola import NOLA
from lowdim.adapters.randlora import RandLoRA
from lowdim.adapters.s2ft import S2FT, s2ft_scores
from lowdim.adapters.said import SAID, SubspaceAdapted, said
from lowdim.adapters.sara.method import SaRA
from lowdim.adapters.sora import SoRA
from lowdim.adapters.svfit import SVFit
from lowdim.moved import keep_importable

keep_importable(__name__, diffora_search="diffora.search")

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
    "intrinsic_subspace",
    "load_adapter",
    "recover_lora",
    "registered_methods",
    "s2ft_scores",
    "said",
    "select_channels",
    "task_vector",
    "to_peft",
]
