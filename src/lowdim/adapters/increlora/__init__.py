"""IncreLoRA: ranks that grow during training, where they help most."""

from lowdim.adapters.increlora.method import IncreLoRA, increlora_lr_lambda

__all__ = ["IncreLoRA", "increlora_lr_lambda"]
