"""IncreLoRA: ranks that grow during training, where they help most."""

from lowdim.adapters.increlora.method import IncreLoRA
from lowdim.adapters.increlora.schedule import increlora_lr_lambda

__all__ = ["IncreLoRA", "increlora_lr_lambda"]
