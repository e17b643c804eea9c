"""Measurements: spectra, landscapes, dynamics; `model or weights -> result dataclass`."""

from lowdim.diagnose.batch_lr.spectrum import BatchSpectrum, batch_spectrum
from lowdim.diagnose.batch_lr.theory import (
    BatchExtremes,
    batch_extremes,
    effective_batch,
    hessian_variance,
    max_lr,
    scale_lr,
)
from lowdim.diagnose.batch_lr.tuning import TuneSGD, heavy_ball, tune_sgd
from lowdim.diagnose.core.curvature import hessian_matvec
from lowdim.diagnose.core.quadrature import Quadrature, lanczos_quadrature
from lowdim.diagnose.core.subspace import compression_bound, quantize_subspace
from lowdim.diagnose.core.weights import Weights, weights_of
from lowdim.diagnose.farms.balance import TempBalance, balance_groups, balanced_lrs
from lowdim.diagnose.farms.fit import PowerLawFit, fit_alpha
from lowdim.diagnose.farms.pruning import prune, pruning_ratios
from lowdim.diagnose.farms.ranks import farms_ranks
from lowdim.diagnose.farms.spectrum import LayerSpectrum, SpectrumResult, farms
from lowdim.diagnose.farms.windows import farms_eigs, farms_windows
from lowdim.diagnose.generalization_dynamics.features import FeatureDynamics, feature_dynamics
from lowdim.diagnose.generalization_dynamics.flow import LinearFlow
from lowdim.diagnose.generalization_dynamics.theory import (
    GeneralizationDynamics,
    generalization_dynamics,
    optimal_stopping_time,
    ridge_test_error,
)
from lowdim.diagnose.intrinsic_dimension import IntrinsicDimensionResult, intrinsic_dimension
from lowdim.diagnose.intruders.measure import IntruderResult, LayerIntruders, intruder_dimensions, scale_intruders
from lowdim.diagnose.intruders.reduce import Reduction, reduce_intruders, scale_intruders_lora
from lowdim.diagnose.lora_limits.gradient import AttentionGradient, lora_attention_gradient
from lowdim.diagnose.lora_limits.model import HeadLimits, LoRALimitsReport, lora_limits_of
from lowdim.diagnose.lora_limits.norms import LoRALimits, lora_limits

__all__ = [
    "AttentionGradient",
    "BatchExtremes",
    "BatchSpectrum",
    "FeatureDynamics",
    "GeneralizationDynamics",
    "HeadLimits",
    "IntrinsicDimensionResult",
    "IntruderResult",
    "LayerIntruders",
    "LayerSpectrum",
    "LinearFlow",
    "LoRALimits",
    "LoRALimitsReport",
    "PowerLawFit",
    "Quadrature",
    "Reduction",
    "SpectrumResult",
    "TempBalance",
    "TuneSGD",
    "Weights",
    "balance_groups",
    "balanced_lrs",
    "batch_extremes",
    "batch_spectrum",
    "compression_bound",
    "effective_batch",
    "farms",
    "farms_eigs",
    "farms_ranks",
    "farms_windows",
    "feature_dynamics",
    "fit_alpha",
    "generalization_dynamics",
    "heavy_ball",
    "hessian_matvec",
    "hessian_variance",
    "intrinsic_dimension",
    "intruder_dimensions",
    "lanczos_quadrature",
    "lora_attention_gradient",
    "lora_limits",
    "lora_limits_of",
    "max_lr",
    "optimal_stopping_time",
    "prune",
    "pruning_ratios",
    "quantize_subspace",
    "reduce_intruders",
    "ridge_test_error",
    "scale_intruders",
    "scale_intruders_lora",
    "scale_lr",
    "tune_sgd",
    "weights_of",
]
