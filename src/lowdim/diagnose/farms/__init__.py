"""FARMS: heavy-tailedness of layers without the bias of their aspect ratio, and rates and pruning ratios from it."""

from lowdim.diagnose.farms.balance import TempBalance, balance_groups, balanced_lrs
from lowdim.diagnose.farms.fit import PowerLawFit, fit_alpha
from lowdim.diagnose.farms.pruning import prune, pruning_ratios
from lowdim.diagnose.farms.ranks import farms_ranks
from lowdim.diagnose.farms.spectrum import LayerSpectrum, SpectrumResult, farms
from lowdim.diagnose.farms.windows import farms_eigs, farms_windows

__all__ = [
    "LayerSpectrum",
    "PowerLawFit",
    "SpectrumResult",
    "TempBalance",
    "balance_groups",
    "balanced_lrs",
    "farms",
    "farms_eigs",
    "farms_ranks",
    "farms_windows",
    "fit_alpha",
    "prune",
    "pruning_ratios",
]
