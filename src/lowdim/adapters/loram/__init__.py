"""LoRAM: train a LoRA on a pruned model, and recover it for the full one."""

from lowdim.adapters.loram.channels import ChannelGroup, gqa_channels, recover_lora, select_channels
from lowdim.adapters.loram.method import LoRAM

__all__ = ["ChannelGroup", "LoRAM", "gqa_channels", "recover_lora", "select_channels"]
