"""When LoRA's gradient of attention takes almost linear time: the norms that decide it, and the algorithm."""

from lowdim.diagnose.lora_limits.gradient import AttentionGradient, lora_attention_gradient
from lowdim.diagnose.lora_limits.model import HeadLimits, LoRALimitsReport, lora_limits_of
from lowdim.diagnose.lora_limits.norms import LoRALimits, lora_limits

__all__ = [
    "AttentionGradient",
    "HeadLimits",
    "LoRALimits",
    "LoRALimitsReport",
    "lora_attention_gradient",
    "lora_limits",
    "lora_limits_of",
]
