"""Loading a compressed model's tensors into a freshly built dense one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lowdim.errors import CheckpointError
from lowdim.modules import LowRankLinear
from lowdim.surgery import is_linear, matrix_shape, swap_layers, tied_parameters

__all__ = ["load_low_rank"]


def load_low_rank(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Load the state of a model whose layers had become low-rank into a freshly built dense one, in place.

    Where `tensors` has `NAME.A` and `NAME.B` and the model a linear layer at NAME, a LowRankLinear of their rank takes its
    place; then everything is loaded. A tensor that is tied to one in the file may be missing.

    Returns:
        The model.

    Raises:
        CheckpointError: the tensors do not fit the model, which is left as it was.

    Example:
        >>> from torch import nn
        >>> from lowdim.compress import LowRankLinear, load_low_rank
        >>> small = nn.Sequential(LowRankLinear(6, 4, rank=2), nn.ReLU())
        >>> type(load_low_rank(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), small.state_dict())[0]).__name__
        'LowRankLinear'
    """
    layers: dict[str, nn.Module] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        A, B = tensors.get(f"{name}.A"), tensors.get(f"{name}.B")
        if A is not None and B is not None and is_linear(layer):
            if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or (B.shape[0], A.shape[1]) != matrix_shape(layer):
                raise CheckpointError(
                    f"layer {name} is {matrix_shape(layer)}; the file's factors are B {tuple(B.shape)} and A {tuple(A.shape)}"
                )
            layers[name] = layer
    _check_rest(model, tensors, layers)
    swap_layers(model, layers, lambda name, _: _from_file(tensors, name))
    model.load_state_dict(dict(tensors), strict=False)
    return model


def _from_file(tensors: Mapping[str, Tensor], name: str) -> LowRankLinear:
    return LowRankLinear.from_factors(tensors[f"{name}.A"], tensors[f"{name}.B"], tensors.get(f"{name}.bias"))


def _check_rest(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, nn.Module]) -> None:
    own = {name: value for name, value in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    rest = {name: value for name, value in tensors.items() if name.rpartition(".")[0] not in layers}
    ties = {name: group for group in tied_parameters(model) for name in group}
    missing = {name for name in own.keys() - rest.keys() if not any(other in rest for other in ties.get(name, []))}
    misshapen = {name for name in own.keys() & rest.keys() if own[name].shape != rest[name].shape}
    wrong = sorted(missing | misshapen | (rest.keys() - own.keys()))
    if wrong:
        raise CheckpointError(
            f"the tensors do not fit {type(model).__name__}: {', '.join(wrong[:5])}"
            f"{' ...' if len(wrong) > 5 else ''} missing, superfluous or misshapen"
        )
