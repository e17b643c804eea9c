"""SST: sparse spectral training, with the Lorentz layer of its paper."""

from lowdim.layers.sst.layer import SSTLinear
from lowdim.layers.sst.lorentz import LorentzLinear
from lowdim.layers.sst.schedule import SSTScheduler

__all__ = ["LorentzLinear", "SSTLinear", "SSTScheduler"]
