"""LoRAM: train LoRA on a pruned model, use it in the full one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.fingerprints import layer_fingerprint
from lowdim.adapters.core.guards import plain_model, tied_layers
from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.low_rank import LoRAUpdate
from lowdim.adapters.core.method import Method, Stats, method_class
from lowdim.adapters.loram.channels import ChannelGroup, linear_layer, recover_lora
from lowdim.adapters.loram.masks import Masks, magnitude_mask, pruned_layer
from lowdim.errors import NoMatchingModuleError, check_float, check_int, nearest
from lowdim.linalg import draw_uniform, wide
from lowdim.surgery import find_layers, is_linear, matrix_shape, named_layers, replace_layers, submodule, weight_matrix

__all__ = ["AdaptedLoRAM", "LoRAM", "LoRAMUpdate"]


class LoRAMUpdate(LoRAUpdate):
    """`scaling · B A`, and with `pruned (out, in)`: those entries of the weight that are left out during training.

    In training mode the layer computes `((W₀ − pruned) + scaling · B A) x`, in evaluation mode `(W₀ + scaling · B A) x`.
    """

    def __init__(
        self, out_features: int, in_features: int, rank: int, scaling: float, ratio: float, *, dtype: Any, device: Any
    ):
        super().__init__(out_features, in_features, rank, scaling, dtype=dtype, device=device)
        self.ratio = ratio
        blank = torch.zeros(out_features, in_features, dtype=dtype, device=device) if ratio else None
        self.register_buffer("pruned", blank)

    pruned: Tensor | None

    @torch.no_grad()
    def prune(self, weight: Tensor) -> None:
        """Leave the smallest magnitudes of the weight out while training."""
        if self.pruned is not None:  # in the weight's own dtype: base and pruned part add up to it bit for bit
            self.pruned = torch.where(magnitude_mask(weight, self.ratio), 0.0, weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """`scaling · B A x`, and what was pruned in evaluation mode."""
        y = super().forward(x)
        return y if self._left_out() else y + self.start_forward(x)

    def add_to(self, y: Tensor, x: Tensor, *, inplace: bool = False) -> Tensor:
        """Fused."""
        y = super().add_to(y, x, inplace=inplace)
        return y if self._left_out() else y + self.start_forward(x).to(y.dtype)

    def dense(self) -> Tensor:
        """The matrix that `forward` applies in the layer's current mode."""
        dense = super().dense()
        return dense if self._left_out() else dense + self.start().to(dense.dtype)

    def _left_out(self) -> bool:
        return self.pruned is None or self.training

    def rebase(self, weight: Tensor) -> Tensor | None:
        """The weight without its pruned part: exact, as each entry is either kept or pruned."""
        return None if self.pruned is None else weight - self.pruned.to(weight)

    def start(self) -> Any:
        """The pruned part."""
        return self.pruned

    def start_forward(self, x: Tensor) -> Tensor:
        """One product with the pruned part; only outside training."""
        assert self.pruned is not None
        return F.linear(x, self.pruned.to(x.dtype))

    @torch.no_grad()
    def delta(self) -> Tensor:
        """`scaling · B A` in both modes: the change of the full weight."""
        A, B = self.low_rank_delta()
        return B @ A

    @torch.no_grad()
    def exact(self) -> Tensor:
        """`delta()` and the pruned part, in both modes."""
        return self.delta() if self.pruned is None else self.delta() + wide(self.pruned)

    def saved(self) -> dict[str, Tensor]:
        """`A` and `B`; the pruned part is computed from the weight."""
        return {key: value for key, value in self.state_dict().items() if key != "pruned"}

    def restore(self, tensors: Mapping[str, Tensor], weight: Tensor) -> None:
        """Load `A` and `B`, and prune the weight again."""
        super().restore(tensors, weight)
        self.prune(weight)


class AdaptedLoRAM(Adapted):
    """LoRA on a pruned model, which can be recovered for the full one."""

    method: LoRAM

    def recovered(self, model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> `A_R (r, in)`, `B_R (out, r)` at the size of `model`'s layers; zeros at channels that had been pruned.

        Raises:
            ValueError: the model lacks a layer, or a layer's size does not fit the channels that were kept.
        """
        modules = named_layers(model)
        rows, columns = self.method.kept()
        found = {}
        for name, layer in self.layers.items():
            if name not in modules:
                close = ", ".join(nearest(name, modules))
                raise NoMatchingModuleError(f"the whole model has no layer {name!r} (nearest: {close})")
            out_features, in_features = matrix_shape(modules[name])
            update: Any = layer.update
            A, B = update.A.detach(), update.B.detach()
            try:
                found[name] = recover_lora(A, B, in_features, out_features, columns.get(name), rows.get(name))
            except ValueError as error:
                raise ValueError(f"layer {name} ({out_features}, {in_features}): {error}") from error
        return found

    def attach_to(self, model: nn.Module) -> Adapted:
        """Attach the recovered factors to the full `model`, in place, as a plain LoRA that can be exported, saved or merged.

        Modules that were trained and saved whole (a head) are copied too.

        Raises:
            ValueError: as `recovered`; a saved module has another shape in the whole model; the model has an adapter already.
        """
        if not self.layers:
            raise ValueError("there is no adapter to recover: the model has been merged")
        if any(isinstance(module, AdaptedLayer) for module in model.modules()):
            raise ValueError("the whole model already has an adapter; merge it first, or use a fresh copy")
        model = plain_model(model)
        factors = self.recovered(model)
        plain = method_class("LoRA")(self.method.rank, self.method.alpha, target_modules=list(factors))
        heads = {name: self._head(model, name) for name in self.modules_to_save}
        layers = {name: submodule(model, name) for name in factors}
        prints = {name: layer_fingerprint(layer) for name, layer in layers.items()}
        tied = tied_layers(model, layers)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        wrapped = {}
        for name, (A, B) in factors.items():
            wrapped[name] = plain.attach(layers[name], dtype=A.dtype, initialise=False)
            update: Any = wrapped[name].update
            with torch.no_grad():
                update.A.copy_(A)
                update.B.copy_(B)
        replace_layers(model, wrapped)
        for name, state in heads.items():
            head = submodule(model, name)
            head.load_state_dict(state)
            head.requires_grad_(True)
        return Adapted(model, plain, wrapped, prints, self.modules_to_save, self.seed, tied)

    def recover(self, model: nn.Module) -> nn.Module:
        """A deep copy of the whole `model` with `W₀ + scaling · B_R A_R` in it; `merge_report` says what changed.

        Raises:
            ValueError: as `attach_to`.
        """
        whole = self.attach_to(copy.deepcopy(model))
        merged = whole.merge()
        self.merge_report = whole.merge_report
        return merged

    def _head(self, model: nn.Module, name: str) -> dict[str, Tensor]:
        own = submodule(self.model, name).state_dict()
        try:
            other = submodule(model, name).state_dict()
        except AttributeError:
            raise NoMatchingModuleError(f"the whole model has no module {name!r}") from None
        shapes = [{key: value.shape for key, value in state.items()} for state in (own, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"module {name} has a different shape in the whole model; it cannot be copied")
        return own


@dataclass(frozen=True)
class LoRAM(Method):
    """LoRA trained on a pruned model and used in the full one: the memory of the small, the quality of the large.

    Formula: pruned layers compute `W[kept_out][:, kept_in] x + s·B A x` with `s = alpha / rank`, `A (r, in_kept)` as in LoRA
    and `B (out_kept, r) = 0` at the start. Then `A_R[:, kept_in] = A`, `B_R[kept_out] = B`, zeros elsewhere, and the whole
    model gets `W₀ + s·B_R A_R`. Without structure `W₀ ∘ mask` stands in for the small weight, and `A_R = A`, `B_R = B`.

    `method.shrink(model)` gives the small model, `lowdim.adapt(small, method)` trains there, `adapted.recover(model)` gives the
    whole model with the update. With `ratio` alone no second model is needed: layers are pruned in training mode and whole in
    evaluation mode, so that merging, saving, exporting and scores are the whole model's.

    Args:
        rank: inner size; it may exceed the sides of the pruned layers.
        alpha: numerator of the scale.
        dropout: on the update's input, while training.
        groups: which channels stay, `ChannelGroup` each; a layer may be a producer in one and a consumer in another.
        masks: layer name -> bool matrix `(out, in)`, True where a weight stays.
        target_modules: which layers get an adapter, pruned or not (see `lowdim.surgery.find_layers`).
        ratio: prune this share of each target layer's weights by magnitude; instead of `groups` and `masks`. It saves no
            memory; it is for testing whether an update survives the recovery.

    Raises:
        ValueError: a hyperparameter out of range, or a layer that two groups prune on the same side.

    Example:
        >>> import torch, lowdim
        >>> from torch import nn
        >>> from lowdim.adapters import ChannelGroup, LoRAM, select_channels
        >>> large = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> kept = select_channels(large, ["0"], ["2"], ratio=0.75)
        >>> method = LoRAM(rank=2, groups=[ChannelGroup(["0"], ["2"], kept)])
        >>> small = method.shrink(large)
        >>> adapted = lowdim.adapt(small, method)  # train `small` with any loop, then:
        >>> small[0].out_features, adapted.recover(large)[0].out_features
        (8, 32)

    The pruned model must still resemble the whole one on the new data; where it does not, the update does not carry over. Where
    the whole model fits into memory, LoRA on it is better.

    Source: Zhang et al., "Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models", ICLR 2025,
    arXiv 2502.13533.
    """

    adapted_type: ClassVar[type[AdaptedLoRAM]] = AdaptedLoRAM

    takes: ClassVar[frozenset[str]] = frozenset({"linear"})

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.05
    groups: Any = ()
    masks: Any = None
    target_modules: Any = None
    ratio: float = 0.0

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        check_float("alpha", self.alpha, 0.0, low_open=True)
        check_float("dropout", self.dropout, 0.0, 1.0, high_open=True)
        check_float("ratio", self.ratio, 0.0, 1.0, high_open=True)
        groups = [ChannelGroup(**group) if isinstance(group, Mapping) else group for group in self.groups]
        wrong = [group for group in groups if not isinstance(group, ChannelGroup)]
        if wrong:
            raise ValueError(f"groups must hold ChannelGroup objects; got {wrong[0]!r}")
        object.__setattr__(self, "groups", tuple(groups))
        object.__setattr__(self, "masks", None if self.masks is None else Masks(self.masks))
        if self.ratio and (groups or self.masks):
            raise ValueError(f"ratio={self.ratio} already prunes; give groups or masks, or ratio, not both")
        for field in ("producers", "consumers"):
            names = [name for group in groups for name in getattr(group, field)]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise ValueError(f"layer {twice[0]} is among the {field} of two groups; its channels can be pruned only once")

    def kept(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Layer -> rows that stay, and layer -> columns that stay."""
        rows = {name: group.kept for group in self.groups for name in group.producers}
        return rows, {name: group.kept for group in self.groups for name in group.consumers}

    def shrink(self, model: nn.Module) -> nn.Module:
        """A deep copy of `model` with the pruned channels gone (or, by masks or `ratio`, the pruned weights zero).

        Only the layers' own sizes change: the caller must adjust what depends on a width (the number of attention heads).

        Raises:
            NoMatchingModuleError: a layer that the model lacks.
            ValueError: channels or masks that do not fit a layer's size.
            TypeError: channels of another layer than nn.Linear.
        """
        rows, columns = self.kept()
        masks = dict(self.masks or {})
        if self.ratio:
            targets = find_layers(model, self.target_modules, accept=is_linear)
            masks = {name: magnitude_mask(weight_matrix(layer), self.ratio) for name, layer in targets.items()}
        memo: dict[int, Any] = {}  # deepcopy skips these, so that no full weight of a pruned layer is copied
        for name in dict.fromkeys([*masks, *rows, *columns]):
            layer = linear_layer(model, name) if name in rows or name in columns else _find(model, name)
            memo[id(layer)] = pruned_layer(name, layer, masks.get(name), rows.get(name), columns.get(name))
        return copy.deepcopy(model, memo)

    def blank(self, out_features: int, in_features: int, *, stats: Stats, dtype: Any, device: Any) -> LoRAMUpdate:
        """Allocate `A`, `B` and the pruned part."""
        scaling = self.alpha / self.rank
        return LoRAMUpdate(out_features, in_features, self.rank, scaling, self.ratio, dtype=dtype, device=device)

    def initialise(self, update: LoRAMUpdate, weight: Tensor, stats: Stats, generator: torch.Generator | None) -> None:
        """Draw `A`; `B` is zero, so the whole model does not change."""
        draw_uniform(update.A, 1 / math.sqrt(update.in_features), generator)
        update.prune(weight)

    def config(self) -> dict[str, Any]:
        """The fields as JSON-able values: channels as lists, masks as packed bits."""
        packed = None if self.masks is None else self.masks.to_json()
        return {**super().config(), "groups": [group.to_json() for group in self.groups], "masks": packed}


def _find(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules(remove_duplicate=False))
    if name not in modules:
        raise NoMatchingModuleError(f"the model has no module {name!r} (nearest: {', '.join(nearest(name, modules))})")
    return modules[name]
