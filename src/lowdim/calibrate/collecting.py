"""Sums over sample batches, layer by layer: covariances, norms, gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.calibrate.batches import given_batches
from lowdim.calibrate.passes import as_it_was, call_model
from lowdim.errors import warn_caller
from lowdim.linalg import recall, wide, widest
from lowdim.surgery import is_conv1d, is_quantized

__all__ = ["KINDS", "LossFn", "collect", "has_statistics"]

KINDS = frozenset({"covariance", "context_covariance", "norms", "output_covariance", "output_norms", "gradient"})
LossFn = Callable[[nn.Module, Any], Tensor]
Stats = dict[str, Any]


def collect(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    needs: Iterable[str],
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None = None,
) -> dict[str, Stats]:
    """Collect statistics of the named layers in one pass; the model is unchanged afterwards (mode, gradients, hooks).

    Padding positions are left out where a batch has an `attention_mask` (an entry, or a named tuple's field) of the shape of
    the layer's rows, or as many entries as the layer has rows in one dimension. Sums run in float64 on the CPU and CUDA, in
    float32 on devices without float64. For a module that is used several times in a pass, sums run over all uses.

    A sample of `"context_covariance"` is one entry of the first dimension; rows `(rows, in)` are one sample, or as many as the
    mask has. Warns where a layer saw fewer rows than it has columns, which leaves this covariance singular.

    Args:
        layers: name -> layer, as `surgery.find_layers` gives them.
        needs: some of `KINDS`.
        batches: an iterable, consumed once.
        loss_fn: `loss_fn(model, batch) -> scalar`, a mean over the batch; needed for `"gradient"`.

    Raises:
        ValueError: no batches, no loss function where gradients are asked for, an unknown kind, a layer that saw no row, whose
            gradient is all zero, whose statistics are NaN or infinite, or for which a sample's largest entry is zero or not
            finite (each names the layer).
        TypeError: `batches` is one batch instead of an iterable of them.
    """
    kinds = set(needs)
    if kinds - KINDS:
        raise ValueError(f"needs must be among {sorted(KINDS)}; got {sorted(kinds - KINDS)}")
    if {"covariance", "context_covariance"} <= kinds:
        raise ValueError("needs: covariance and context_covariance give the same entry; ask for one of them")
    if not kinds:
        return {name: {} for name in layers}
    batches = given_batches(batches, f"{', '.join(sorted(kinds))} must be collected from sample data")
    if "gradient" in kinds and loss_fn is None:
        raise ValueError("loss_fn is missing: gradients need loss_fn(model, batch) -> scalar; batches alone are not enough")
    question = ("collect", model.state_dict(), list(layers), sorted(kinds), batches, _identity(loss_fn))
    return recall(question, lambda: _collect(model, layers, kinds, batches, loss_fn))


def _collect(
    model: nn.Module, layers: Mapping[str, nn.Module], kinds: set[str], batches: Iterable[Any], loss_fn: LossFn | None
) -> dict[str, Stats]:
    collector = _Collector(layers, kinds)
    seen = 0
    with as_it_was(model, layers, want_gradient="gradient" in kinds), collector.hooks():
        for batch in batches:
            seen += 1
            collector.mask = _mask(batch)
            if "gradient" in kinds:
                assert loss_fn is not None
                loss_fn(model, batch).backward()
                collector.take_gradients(_batch_size(batch))
            else:
                with torch.no_grad():
                    call_model(model, batch) if loss_fn is None else loss_fn(model, batch)
    if seen == 0:
        raise ValueError("batches is empty: at least one sample batch is needed")
    return collector.result()


def _identity(loss_fn: LossFn | None) -> Any:
    """Tells the loss functions of two tasks apart; of other functions nothing is remembered."""
    owner = getattr(loss_fn, "__self__", None)
    return loss_fn if owner is None else (getattr(loss_fn, "__qualname__", ""), id(owner))


class _Collector:
    def __init__(self, layers: Mapping[str, nn.Module], kinds: set[str]):
        self.layers, self.kinds = layers, kinds
        self.sums: dict[str, Stats] = {name: {} for name in layers}
        self.mask: Tensor | None = None

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        if self.kinds - {"gradient"}:
            for name, layer in self.layers.items():
                handles.append(layer.register_forward_hook(self._hook(name), with_kwargs=True))
        if "gradient" in self.kinds:
            for name, layer in self.layers.items():
                if is_quantized(layer):
                    handles.append(layer.register_forward_hook(self._gradient_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            with torch.no_grad():
                if self.kinds & {"covariance", "norms", "context_covariance"}:
                    x = _layer_rows(layer, args[0] if args else next(iter(kwargs.values())))
                    if self.kinds & {"covariance", "norms"}:
                        self._add_inputs(name, self._rows(x))
                    if "context_covariance" in self.kinds:
                        self._add_samples(name, x)
                if self.kinds & {"output_covariance", "output_norms"}:
                    y = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
                    if "output_covariance" in self.kinds:
                        self._add_outputs(name, self._rows(y))
                    else:
                        self._add_output_norms(name, self._used(y))

        return hook

    def _gradient_hook(self, name: str) -> Callable[..., Tensor]:
        """The gradient of a weight that cannot have one, from the layer's input and its output's gradient."""

        def hook(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            rows = args[0].detach().reshape(-1, args[0].shape[-1])
            output = output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)

            def take(grad: Tensor) -> None:
                flat = grad.reshape(-1, grad.shape[-1])
                self._add(name, "batch_gradient", (flat.mT @ rows.to(flat.dtype)).to(torch.float32))

            output.register_hook(take)
            return output

        return hook

    def _add_inputs(self, name: str, x: Tensor) -> None:
        if "covariance" in self.kinds:
            self._add_gram(name, "covariance", x)
        self._add(name, "squares", x.square().sum(0))
        self._add(name, "count", x.shape[0])

    def _add_samples(self, name: str, x: Tensor) -> None:
        x = x.detach().float()
        mask = self._mask_of(x)
        if mask is None:
            x = x.flatten(1, -2) if x.ndim > 2 else x.reshape(1, -1, x.shape[-1])
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        else:
            x = x.view(*mask.shape, x.shape[-1])
        there = mask.any(1)
        if not bool(there.any()):
            return
        largest = x.masked_fill(~mask[..., None], -torch.inf).flatten(1).amax(1).abs()
        bad = there & ~(torch.isfinite(largest) & (largest > 0))
        if bool(bad.any()):
            raise ValueError(
                f"layer {name}: the largest input of a sample is {float(largest[bad][0]):g}; context_covariance divides by its "
                "magnitude, which must be finite and above 0"
            )
        self._add_gram(name, "context", (x / largest[:, None, None])[mask])
        self._add(name, "samples", int(there.sum()))
        self._add(name, "rows", int(mask.sum()))

    def _add_outputs(self, name: str, y: Tensor) -> None:
        if not y.shape[0]:
            return
        if "output_norms" in self.kinds:
            self._add_output_norms(name, y)
        else:
            self._add(name, "output_count", y.shape[0])
        # Sums are shifted by the first rows' mean: E[y yᵀ] − μ μᵀ cancels where the mean is large compared with the spread.
        y = y - self.sums[name].setdefault("output_shift", y.mean(0))
        self._add_gram(name, "output_square", y)
        self._add(name, "output_sum", y.sum(0))

    def _add_output_norms(self, name: str, y: Tensor) -> None:
        wide = widest(y.new_empty(0)).dtype
        self._add(name, "output_squares", torch.linalg.vector_norm(y, dim=0, dtype=wide).square())  # without a wide copy
        self._add(name, "output_count", y.shape[0])

    def _rows(self, x: Tensor) -> Tensor:
        return widest(self._used(x))

    def _used(self, x: Tensor) -> Tensor:
        """The rows that are not padding."""
        mask = self._mask_of(x)
        if mask is not None:
            x = x[mask.view(x.shape[:-1])]
        return x.reshape(-1, x.shape[-1])

    def _mask_of(self, x: Tensor) -> Tensor | None:
        """Which rows are not padding, in the shape of the batch's mask; None if there is no mask for these rows."""
        if self.mask is None or x.shape[:-1] not in (self.mask.shape, (self.mask.numel(),)):
            return None
        return self.mask.to(device=x.device, dtype=torch.bool)

    def _add(self, name: str, key: str, value: Any) -> None:
        sums = self.sums[name]
        if key in sums:
            sums[key] += value  # in place for tensors
        else:
            sums[key] = value

    def _add_gram(self, name: str, key: str, rows: Tensor) -> None:
        sums = self.sums[name]
        if key in sums:
            sums[key].addmm_(rows.T, rows)
        else:
            sums[key] = rows.T @ rows

    def take_gradients(self, batch_size: int) -> None:
        for name, layer in self.layers.items():
            found = self.sums[name].pop("batch_gradient", None)
            if found is not None:
                self._add(name, "gradient", found / batch_size)
            grad = None if is_quantized(layer) else cast(Tensor, layer.weight).grad
            if grad is not None:
                grad = wide(grad)
                transposed = is_conv1d(layer) or isinstance(layer, nn.Embedding)
                self._add(name, "gradient", (grad.T if transposed else grad.reshape(len(grad), -1)) / batch_size)
        for layer in self.layers.values():  # only now: two layers may share one weight
            if not is_quantized(layer):
                layer.weight.grad = None  # type: ignore[union-attr]

    def result(self) -> dict[str, Stats]:
        found = {name: self._finish(name) for name in self.layers}
        if "context_covariance" in self.kinds:
            few = [name for name, stats in found.items() if stats["count"] < len(stats["covariance"])]
            if few:
                columns, rows = len(found[few[0]]["covariance"]), found[few[0]]["count"]
                warn_caller(
                    f"layer {few[0]} with {columns} inputs saw {rows} rows of the sample batches, so its covariance is "
                    f"singular ({len(few)} of {len(found)} layers saw too few); use more or longer samples"
                )
        return found

    def _finish(self, name: str) -> Stats:
        sums, out = self.sums[name], Stats()
        if self.kinds - {"gradient"} and not max(sums.get(key, 0) for key in ("count", "rows", "output_count")):
            raise ValueError(f"layer {name} saw no token of the sample batches; it cannot be calibrated")
        if "covariance" in self.kinds:
            out["covariance"] = sums["covariance"]
        if "context_covariance" in self.kinds:
            out["covariance"] = sums.pop("context").div_(sums["samples"])  # in place: of large layers, one of these is much
            out["samples"], out["count"] = sums["samples"], sums["rows"]
        if "norms" in self.kinds:
            out["norms"] = sums["squares"].sqrt()
        if "count" in sums:
            out["count"] = sums["count"]
        if "output_covariance" in self.kinds:
            mean = sums["output_sum"] / sums["output_count"]
            out["output_mean"] = sums["output_shift"] + mean
            out["output_covariance"] = sums.pop("output_square").div_(sums["output_count"]).sub_(torch.outer(mean, mean))
        if "output_norms" in self.kinds:
            out["output_norms"] = sums["output_squares"].sqrt()
        if "output_count" in sums:
            out["output_count"] = sums["output_count"]
        if "gradient" in self.kinds:
            if "gradient" not in sums or not bool(sums["gradient"].any()):
                raise ValueError(f"layer {name} got no gradient from the sample batches (all zero or none)")
            out["gradient"] = sums["gradient"]
        for key, value in out.items():
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                raise ValueError(f"layer {name}: its {key} over the sample batches has NaN or infinite entries")
        return out


def has_statistics(layer: nn.Module, needs: Iterable[str]) -> bool:
    """Whether `collect` can gather these statistics of a layer: those of its inputs are not defined for some."""
    special = isinstance(layer, nn.Embedding) or getattr(layer, "groups", 1) != 1
    return not special or not set(needs) & {"covariance", "context_covariance", "norms"}


def _layer_rows(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Embedding):
        raise ValueError(f"input statistics of an embedding are not defined; got {layer}")
    if not isinstance(layer, nn.Conv2d):
        return x
    if layer.groups != 1:
        raise ValueError(f"input statistics of a grouped convolution are not defined; got {layer}")
    assert not isinstance(layer.padding, str)
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # type: ignore[arg-type]
    return patches.transpose(1, 2)


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)
    return mask if isinstance(mask, Tensor) else None


def _batch_size(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    for value in values:
        if isinstance(value, Tensor) and value.ndim:
            return int(value.shape[0])
    return 1
