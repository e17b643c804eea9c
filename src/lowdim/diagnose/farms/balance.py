"""Learning rates by layer from tail exponents, and the companion that keeps them up to date while a model trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from lowdim.companion import Companion, RateFactor
from lowdim.diagnose.core.weights import is_lowdim_layer, is_peft_layer, plain_model, weights_of
from lowdim.diagnose.farms.spectrum import farms
from lowdim.errors import check_choice, check_float, check_int, refuse_strange

if TYPE_CHECKING:
    import torch

__all__ = ["TempBalance", "balance_groups", "balanced_lrs"]

_METHODS = ("linear", "sqrt", "log2", "step")
_FARMS = ("rows", "ratio", "windows", "step", "method", "xmin_pos", "bins", "conv_scale", "min_eigs", "exclude", "callback")


def balanced_lrs(
    alphas: Sequence[float] | np.ndarray,  # (L,)
    lr: float,
    *,
    method: Literal["linear", "sqrt", "log2", "step"] = "linear",
    low: float = 0.5,
    high: float = 1.5,
) -> np.ndarray:
    """A learning rate for each layer: the lower its exponent, the lower its rate.

    Formula: `linear`: alpha from `[min, max]` mapped to `[low · lr, high · lr]`. `sqrt`: `√alpha / Σ √alpha · L · lr`; `log2`
    the same with log2. `step`: the k-th smallest (from 0) gets `lr · (low + (high - low) k / L)`. Equal exponents: `lr` for
    all.

    Args:
        alphas: exponents of the L layers.
        lr: the global learning rate, > 0.
        method: how exponents become rates.
        low, high: bounds of the factors of `linear` and `step`, > 0.

    Returns:
        `(L,)` float64.

    Raises:
        ValueError: no exponents, exponents that are not positive (`log2`: not above 1), `lr <= 0`, `low > high`, an unknown
            method.

    Example:
        >>> from lowdim.diagnose import balanced_lrs
        >>> balanced_lrs([2.0, 3.0, 4.0], 0.1).round(3).tolist()
        [0.05, 0.1, 0.15]

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280; Zhou et al., "Temperature Balancing", arXiv 2312.00359.
    """
    check_choice("method", method, _METHODS)
    check_float("lr", lr, 0.0, low_open=True)
    check_float("low", low, 0.0, low_open=True)
    check_float("high", high, low)
    a = np.asarray(alphas, dtype=np.float64)
    least = 1.0 if method == "log2" else 0.0
    if a.ndim != 1 or not len(a) or not np.isfinite(a).all() or not (a > least).all():
        raise ValueError(
            f"alphas must be one list of finite numbers above {least:g}; got {a.tolist() if a.size < 20 else a.shape}"
        )
    if a.min() == a.max():
        return np.full(len(a), float(lr))
    if method == "linear":
        return np.interp(a, [a.min(), a.max()], [low * lr, high * lr])
    if method == "step":
        places = np.empty(len(a))
        places[np.argsort(a, kind="stable")] = np.arange(len(a))
        return lr * (low + (high - low) * places / len(a))
    sizes = np.sqrt(a) if method == "sqrt" else np.log2(a)
    return sizes / sizes.sum() * len(a) * lr


def balance_groups(model: nn.Module, *, exclude: Iterable[str] = (), **optimizer_options: Any) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: one for each weight that FARMS can measure, and one for all the rest.

    A layer's bias joins its weight, an adapter's factors the layer that they adapt, and a batch norm the convolution of the
    same name (`bn1` for `conv1`). A layer's group has the key `"layer"`, the weight's name in `state_dict`; the last has none.

    Args:
        model: before it is wrapped for distributed training.
        exclude: layers whose names contain one of these go to the rest.
        **optimizer_options: put into each group, such as `weight_decay`.

    Raises:
        ValueError: no layer of the model is trained.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.diagnose import balance_groups
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> [(group.get("layer"), len(group["params"])) for group in balance_groups(model)]
        [('0.weight', 2), ('2.weight', 2), (None, 2)]
        >>> optimizer = torch.optim.SGD(balance_groups(model), lr=0.1)

    Source: Zhou et al., arXiv 2312.00359.
    """
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a list of parts of names; got the string {exclude!r}")
    parts = tuple(exclude)
    names = [name for name in weights_of(model, convolutions=True) if not any(part in name for part in parts)]
    homes = dict[str, str]()  # module -> the first weight in it
    for name in names:
        homes.setdefault(name.rpartition(".")[0], name)
    groups = {name: list[nn.Parameter]() for name in names}
    rest = list[nn.Parameter]()
    plain = plain_model(model)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            owner = name if name in groups else next((homes[home] for home in _homes(plain, name) if home in homes), None)
            (rest if owner is None else groups[owner]).append(parameter)
    made = [{**optimizer_options, "params": members, "layer": name} for name, members in groups.items() if members]
    if not made:
        raise ValueError("balance_groups: no weight of this model is trained (requires_grad is False, or all are excluded)")
    return [*made, {**optimizer_options, "params": rest}] if rest else made


def _homes(model: nn.Module, parameter: str) -> Iterator[str]:
    """Whose weight a parameter follows: its own module, the layer that it adapts, the convolution of its batch norm."""
    own = parameter.rpartition(".")[0]
    yield own
    path = own
    while path:
        if _wraps(model.get_submodule(path)):
            yield path
        path = path.rpartition(".")[0]
    parent, _, last = own.rpartition(".")
    if "bn" in last and isinstance(model.get_submodule(own), nn.modules.batchnorm._BatchNorm):
        yield f"{parent}.{last.replace('bn', 'conv')}".lstrip(".")


def _wraps(module: nn.Module) -> bool:
    return is_lowdim_layer(module) or is_peft_layer(module) or hasattr(module, "original_module")


class TempBalance(Companion):
    """Learning rates by layer from tail exponents while a model trains: one factor for each parameter group.

    Formula: `factor = balanced_lrs(alphas, 1.0)` over the groups with the key `"layer"`; 1 for groups without it, for the first
    and the last measured layer, and for layers that cannot be measured. The factors act within `optimizer.step()` only, so
    any scheduler keeps its own rates.

    Args:
        model: the model that is trained.
        optimizer: made from `balance_groups(model)`; a wrapper with an attribute `.optimizer` is unwrapped.
        lr_method: `linear`, `sqrt`, `log2` or `step`, as in `balanced_lrs`.
        low, high: smallest and largest factor.
        skip_first, skip_last: leave the rate of the first and the last measured layer alone.
        interval: measure anew at every so many calls of `step()`; None: only `update()` measures.
        **farms_options: as in `farms`.

    Attributes:
        factors: weight -> factor; empty (all 1) before the first `update()`.
        spectrum: the last measurement, or None.

    Raises:
        ValueError: no group has `"layer"`, too few layers to balance, an option out of range. TypeError: an unknown option.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.diagnose import TempBalance, balance_groups
        >>> model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        >>> optimizer = torch.optim.SGD(balance_groups(model), lr=0.1)
        >>> balance = TempBalance(model, optimizer)
        >>> balance.update()  # once an epoch
        >>> sorted(balance.factors.values())
        [0.5, 1.5]

    Source: Hu, Goel, Killiakov, Yang, arXiv 2506.06280; Zhou et al., "Temperature Balancing", arXiv 2312.00359.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        lr_method: Literal["linear", "sqrt", "log2", "step"] = "linear",
        low: float = 0.5,
        high: float = 1.5,
        skip_first: bool = True,
        skip_last: bool = True,
        interval: int | None = None,
        **farms_options: Any,
    ):
        balanced_lrs([2.0], 1.0, method=lr_method, low=low, high=high)  # checks them
        if interval is not None:
            check_int("interval", interval, 1)
        refuse_strange("TempBalance", farms_options, _FARMS)
        plain = getattr(optimizer, "optimizer", optimizer)
        self._layers = list(dict.fromkeys(group["layer"] for group in plain.param_groups if "layer" in group))
        if not self._layers:
            raise ValueError(
                'no parameter group has the key "layer": make the optimizer from lowdim.diagnose.balance_groups(model)'
            )
        if len(self._layers) <= skip_first + skip_last:
            raise ValueError(
                f"{len(self._layers)} layers leave nothing to balance without the first and the last; "
                "set skip_first=False or skip_last=False"
            )
        self.model, self.interval, self.farms_options = model, interval, farms_options
        self.skip_first, self.skip_last = skip_first, skip_last
        self._how = {"method": lr_method, "low": low, "high": high}
        self.factors: dict[str, float] = {}
        self.spectrum: Any = None
        self._count, self._optimizer = 0, plain
        self._rate = RateFactor(plain, self._by_group)

    def update(self) -> None:
        """Measure the layers and set their factors."""
        weights = weights_of(self.model, convolutions=True)
        self.spectrum = farms(weights.only(self._layers), **self.farms_options)
        alphas = list(self.spectrum.alphas.items())
        alphas = alphas[int(self.skip_first) : len(alphas) - int(self.skip_last)]
        if not alphas:
            raise ValueError(f"too few layers can be measured to balance them: {self.spectrum.summary}")
        factors = balanced_lrs([alpha for _, alpha in alphas], 1.0, **self._how)
        self.factors = {name: float(factor) for (name, _), factor in zip(alphas, factors)}

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Count a step; every `interval` of them measures anew."""
        self._count += 1
        if self.interval is not None and self._count % self.interval == 0:
            self.update()

    def state_dict(self) -> dict[str, Any]:
        """The factors and the count."""
        return {"factors": dict(self.factors), "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned: the factors are those of the last measurement, which is not repeated.

        Raises:
            ValueError: factors of layers that the optimizer's groups lack.
        """
        strange = [name for name in state["factors"] if name not in self._layers]
        if strange:
            raise ValueError(f"the state has a factor of layer {strange[0]!r}, which no parameter group has")
        self.factors = {name: float(factor) for name, factor in state["factors"].items()}
        self._count = int(state["count"])

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        self._rate.remove()

    def _by_group(self) -> list[float]:
        return [self.factors.get(group.get("layer"), 1.0) for group in self._optimizer.param_groups]
