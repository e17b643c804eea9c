"""N:M decay: of every M weights N stay, and the others fade while the model trains."""

from lowdim.compress.nm_decay.decaying import nm_decay
from lowdim.compress.nm_decay.layers import NMConv2d, NMLinear
from lowdim.compress.nm_decay.schedule import NMDecayConfig

__all__ = ["NMConv2d", "NMDecayConfig", "NMLinear", "nm_decay"]
