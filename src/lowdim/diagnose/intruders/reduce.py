"""Scaling the intruder dimensions of LoRA factors and of whole models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.diagnose.core.weights import is_lowdim_layer, is_peft_layer, plain_model
from lowdim.diagnose.intruders.measure import check_options, find_intruders, paired_weights
from lowdim.errors import check_float
from lowdim.linalg import canonical_signs
from lowdim.results import Result

__all__ = ["Reduction", "reduce_intruders", "scale_intruders_lora"]


@dataclass(frozen=True, eq=False)  # equal to any mapping with the same items
class Reduction(Result, Mapping[str, float]):
    """The changes from scaling intruders: a read-only mapping from layer to relative change.

    Attributes:
        changes: layer -> `‖W_new - W‖_F / ‖W‖_F` of its effective weight; 0 without intruders.
        truncation: layer -> `‖D - B_new A_new‖_F / ‖D‖_F`, with D the exact update: the part that LoRA factors of this rank
            cannot hold. LoRA layers only.
    """

    changes: dict[str, float] = field(default_factory=dict)
    truncation: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        return self.changes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each layer."""
        return [{"layer": n, "change": change, "truncation": self.truncation.get(n)} for n, change in self.changes.items()]

    @property
    def summary(self) -> str:
        """One line."""
        changed = sum(change > 0 for change in self.changes.values())
        largest = max(self.changes.values(), default=0.0)
        return f"intruders scaled in {changed} of {len(self)} layers; largest relative change {largest:.3g}"


def scale_intruders_lora(
    base: Tensor,  # (out, in)
    A: Tensor,  # (r, in)
    B: Tensor,  # (out, r)
    *,
    scaling: float,
    scale: float = 0.75,
    k: int = 10,
    threshold: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """LoRA factors whose merged weight has its intruder dimensions scaled, as far as rank r allows.

    Formula: `W = W0 + scaling B A`, `D = (W_new - W0) / scaling = P diag(q) Rᵀ` with `W_new` from scale_intruders;
    `B_new = P_r diag(√q_r)`, `A_new = diag(√q_r) R_rᵀ`.

    Args:
        base: frozen weight `(out, in)`.
        A, B: factors `(r, in)` and `(out, r)`.
        scaling: `alpha / r` of the adapter, not 0.
        scale, k, threshold: as in scale_intruders.

    Returns:
        `(A_new, B_new)` of the same shapes and dtypes; plain copies if there is no intruder. D can have rank up to r plus
        the number of intruders, so this truncates; reduce_intruders reports by how much.

    Raises:
        ValueError: shapes that do not fit, a scaling of 0, options out of range, NaN or infinity.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import scale_intruders_lora
        >>> base, A, B = torch.eye(4, 3), torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0], [0.0], [0.0], [9.0]])
        >>> A2, B2 = scale_intruders_lora(base, A, B, scaling=1.0, scale=0.5)
        >>> bool((B2 @ A2).norm() < (B @ A).norm())
        True

    Source: Shuttleworth et al., arXiv 2410.21228.
    """
    check_options(k, threshold, scale)
    A2, B2, _, _ = _scale_pair(base, A, B, scaling, scale, k, threshold, "")
    return A2, B2


def reduce_intruders(
    base_model: Any,
    tuned_model: Any,
    *,
    scale: float = 0.75,
    k: int = 10,
    threshold: float = 0.5,
    names: Iterable[str] | None = None,
) -> Reduction:
    """Scale the intruder dimensions of every layer of a tuned model, in place.

    Formula: per layer `W ← W + (scale - 1) Σ_{j in intruders} s_j u_j v_jᵀ`; for a PEFT LoRA layer its factors become those of
    scale_intruders_lora and the frozen weight stays.

    Args:
        base_model: module, mapping or path, as in intruder_dimensions.
        tuned_model: a module (plain, or wrapped by PEFT with one active LoRA adapter, not merged) or a dict of tensors.
        scale, k, threshold: as in scale_intruders.
        names: only these weights; None means every 2-D weight of the base.

    Returns:
        Reduction: name -> relative change of the effective weight (0 without intruders); `.truncation` for LoRA
        layers. Names, shapes and adapters are checked before anything is changed; NaN in a layer stops at that layer.

    Raises:
        ValueError: as intruder_dimensions. TypeError: a tuned model that cannot be changed in place (a path), an adapter that
            is not plain LoRA (merge it first).

    Example:
        >>> import torch
        >>> from lowdim.diagnose import reduce_intruders
        >>> base = {"w": torch.diag(torch.tensor([3.0, 2.0, 1.0]))[:, :2]}
        >>> tuned = {"w": base["w"] + 9 * torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, 1.0]])}
        >>> changes = reduce_intruders(base, tuned, scale=0.5)
        >>> 0 < changes["w"] < 1
        True

    Keep a copy of the tuned model: the change is not reversible.

    Source: Shuttleworth et al., arXiv 2410.21228, section 5.
    """
    check_options(k, threshold, scale)
    targets = _targets(tuned_model)
    base, tuned, wanted = paired_weights(base_model, tuned_model, names)
    for name in wanted:  # before anything is changed
        if isinstance(targets.get(name), str):
            raise TypeError(f"layer {name}: {targets[name]}")
        if base.shape(name) != tuned.shape(name):
            raise ValueError(
                f"layer {name}: base and tuned must have the same shape; got {base.shape(name)} and {tuned.shape(name)}"
            )
    changes, truncation, done = dict[str, float](), dict[str, float](), dict[int, str]()
    for name in wanted:
        target = targets[name]
        if id(target) in done:  # a tied weight, already changed under its other name
            changes[name] = changes[done[id(target)]]
            continue
        done[id(target)] = name
        if isinstance(target, Tensor):
            changes[name] = _scale_in_place(base[name], tuned[name], scale, k, threshold, name)
        else:
            changes[name], truncation[name] = _scale_lora_layer(base[name], target, scale, k, threshold, name)
    return Reduction(changes, truncation)


def _scale_in_place(base: Tensor, tuned: Tensor, scale: float, k: int, threshold: float, name: str) -> float:
    layer, (u, s, vh) = find_intruders(base, tuned, k=k, threshold=threshold, name=name)
    j = layer.indices
    if not j or scale == 1.0:
        return 0.0
    with torch.no_grad():  # `tuned` is a view of the model's own tensor
        tuned.copy_(tuned.to(u) + (scale - 1) * (u[:, j] * s[j]) @ vh[j])
    return _change(s, j, scale)


@torch.no_grad()
def _scale_lora_layer(base: Tensor, layer: Any, scale: float, k: int, threshold: float, name: str) -> tuple[float, float]:
    (adapter,) = layer.active_adapters
    first, second = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    result = _scale_pair(base, first, second, float(layer.scaling[adapter]), scale, k, threshold, name)
    first.copy_(result[0])
    second.copy_(result[1])
    return result[2], result[3]


def _scale_pair(
    base: Tensor, A: Tensor, B: Tensor, scaling: float, scale: float, k: int, threshold: float, name: str
) -> tuple[Tensor, Tensor, float, float]:
    """New factors, relative change of the effective weight, relative truncation error of the update."""
    where = f"layer {name}: " if name else ""
    check_float(f"{where}scaling", scaling)
    if scaling == 0:
        raise ValueError(f"{where}scaling must not be 0: such an adapter changes nothing")
    if A.ndim != 2 or B.ndim != 2 or base.ndim != 2 or B.shape[1] != A.shape[0] or base.shape != (B.shape[0], A.shape[1]):
        raise ValueError(
            f"{where}base must be (out, in), A (r, in) and B (out, r); "
            f"got {tuple(base.shape)}, {tuple(A.shape)} and {tuple(B.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(base.dtype, A.dtype), torch.float32)
    a, b = A.detach().to(wide), B.detach().to(wide)
    w0 = base.detach().to(device=a.device, dtype=wide)
    layer, (u, s, vh) = find_intruders(w0, w0 + scaling * (b @ a), k=k, threshold=threshold, name=name)
    j = layer.indices
    if not j or scale == 1.0:
        return A.detach().clone(), B.detach().clone(), 0.0, 0.0
    # D = [B, u_j s_j] [A; c v_jᵀ] has rank r + len(j): its SVD comes from two thin QRs, D itself is never built.
    left = torch.linalg.qr(torch.cat([b, u[:, j] * s[j]], dim=1))
    right = torch.linalg.qr(torch.cat([a, (scale - 1) / scaling * vh[j]]).T)
    p, q, rh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    rank = A.shape[0]
    new_b, new_a = canonical_signs(left.Q @ p[:, :rank], rh[:rank] @ right.Q.T)
    assert new_a is not None
    root = q[:rank].sqrt()
    new_a, new_b = _pad(root[:, None] * new_a, rank, 0), _pad(new_b * root, rank, 1)
    lost = float(q[rank:].norm() / q.norm()) if float(q.norm()) > 0 else 0.0
    moved = float(torch.linalg.matrix_norm(scaling * (new_b @ new_a - b @ a)) / s.norm())
    return new_a.to(A.dtype), new_b.to(B.dtype), moved, lost


def _pad(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Pad with zeros up to the rank, if the layer has fewer rows or columns."""
    missing = rank - factor.shape[dim]
    if missing <= 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


def _change(s: Tensor, j: list[int], scale: float) -> float:
    return abs(scale - 1) * float(s[j].norm() / s.norm())


def _targets(model: Any) -> dict[str, Any]:
    """The object to change for each weight: a tensor, a PEFT LoRA layer, or the reason why it cannot be changed (str)."""
    if isinstance(model, Mapping):
        return {str(name): tensor for name, tensor in model.items() if isinstance(tensor, Tensor)}
    if not isinstance(model, nn.Module):
        raise TypeError(f"tuned_model must be a module or a dict of tensors, changed in place; got {type(model).__name__}")
    found: dict[str, Any] = {}
    _collect(plain_model(model), "", found)
    return found


def _collect(module: Any, prefix: str, found: dict[str, Any]) -> None:
    if is_peft_layer(module):
        for key, _ in module.get_base_layer().named_parameters():
            found[prefix + key] = _lora_target(module)
    elif is_lowdim_layer(module):
        for key, _ in module.base.named_parameters():
            found[prefix + key] = "a lowdim adapter has no factors of its own to rescale; merge it first (adapted.merge())"
    elif hasattr(module, "original_module") and hasattr(module, "active_adapters"):
        copies = getattr(module, "modules_to_save", {})
        active = [name for name in module.active_adapters if name in copies]
        _collect(copies[active[0]] if active else module.original_module, prefix, found)
    else:
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            sharded = hasattr(tensor, "full_tensor")
            found[prefix + key] = "a sharded weight cannot be changed here; gather the model first" if sharded else tensor
        for key, child in module._modules.items():
            if child is not None:
                _collect(child, f"{prefix}{key}.", found)


def _lora_target(layer: Any) -> Any:
    active = list(layer.active_adapters)
    ok = len(active) == 1 and not layer.merged and not layer.disable_adapters and active[0] in getattr(layer, "lora_A", {})
    ok = ok and active[0] not in getattr(layer, "lora_magnitude_vector", {})
    return layer if ok else f"{type(layer).__name__} must hold one active plain LoRA adapter; merge it first"
