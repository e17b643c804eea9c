"""Batch normalisation whose statistics stay those of a few clips while the mini-batch grows: sub-batch norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_float, check_int
from lowdim.surgery import replace_layers

__all__ = ["SubBatchNorm", "convert_batch_norm", "set_bn_splits"]


class SubBatchNorm(nn.Module):
    """Batch normalisation of each of `n = num_splits` parts of the batch alone, with one affine map.

    Sample `i` belongs to part `i mod n`. With mean and (biased) variance of a channel over the samples of a part and all
    positions, in evaluation the running ones over all parts:

        y = (x − mean) / √(var + eps) · weight + bias

    Running statistics are kept for each part, `split ← (1 − momentum) split + momentum batch`, with the unbiased variance.
    `aggregate` makes those of the whole, and so do `eval()` and, in training, `state_dict()`:

        running_mean = average of means,  running_var = average of variances + average of (mean_i − running_mean)²

    Args:
        num_features: `C`, channels, >= 1.
        num_splits: `n`, >= 1; 1 is ordinary batch normalisation.
        eps: added to the variance, >= 0.
        momentum: share of the batch in the running statistics, in [0, 1].
        affine: whether there are `weight` and `bias`.

    Shapes: input and output `(N, C, …)`; `weight`, `bias`, `running_mean`, `running_var (C,)`; `split_mean`, `split_var`
    `(n, C)`. A state dict with another number of parts is taken with that number.

    Raises:
        ValueError: options outside their ranges, an input of another shape, a batch that `n` does not divide (in training), or
            a part with a single value per channel.

    Example:
        >>> import torch
        >>> from lowdim.train import SubBatchNorm
        >>> norm, x = SubBatchNorm(3, num_splits=2), torch.randn(8, 3, 4, 5, 5)
        >>> y = norm(x)
        >>> bool(y[::2].mean((0, 2, 3, 4)).abs().max() < 1e-5)  # each part by itself
        True
        >>> norm.set_splits(4)
        >>> tuple(norm.split_mean.shape)
        (4, 3)

    It does not synchronise devices; `torch.nn.SyncBatchNorm` does. With few samples on each device prefer a normalisation that
    does not look at the batch.

    Source: Wu et al., "A Multigrid Method for Efficiently Training Video Models", arXiv 1912.00998.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor
    split_mean: Tensor
    split_var: Tensor

    def __init__(
        self,
        num_features: int,
        num_splits: int = 1,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_int("num_features", num_features, 1)
        check_int("num_splits", num_splits, 1)
        check_float("eps", eps, 0.0)
        check_float("momentum", momentum, 0.0, 1.0)
        self.num_features, self.num_splits, self.eps, self.momentum, self.affine = (
            num_features,
            num_splits,
            eps,
            momentum,
            affine,
        )
        self.place = ""  # its name in the model, for messages; `convert_batch_norm` sets it
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        self.register_parameter("weight", nn.Parameter(torch.ones(num_features, **how)) if affine else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(num_features, **how)) if affine else None)
        self.register_buffer("running_mean", torch.zeros(num_features, **how))
        self.register_buffer("running_var", torch.ones(num_features, **how))
        self.register_buffer("split_mean", torch.zeros(num_splits, num_features, **how))
        self.register_buffer("split_var", torch.ones(num_splits, num_features, **how))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...)
        """The normalised input, of its shape and dtype."""
        if x.ndim < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"{self._name}: the input must have shape (N, {self.num_features}, ...); got {tuple(x.shape)}")
        held = self.split_mean.dtype
        # torch's kernel takes half precision with statistics in float32, and otherwise wants one dtype.
        fused = x.dtype == held or (held == torch.float32 and x.dtype in (torch.float16, torch.bfloat16))
        return self._normalise(x if fused else x.to(torch.promote_types(x.dtype, held))).to(x.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        how = (self.momentum, self.eps)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, *how)
        n, count = self.num_splits, len(x)
        if count % n:
            raise ValueError(
                f"{self._name}: a batch of {count} cannot be divided into num_splits={n} equal parts; leave out the last, "
                "incomplete batch (drop_last=True), or change the number of parts with set_bn_splits"
            )
        if x.numel() <= n * self.num_features:
            raise ValueError(
                f"{self._name}: each of num_splits={n} parts needs more than one value per channel to be normalised; got a "
                f"batch of shape {tuple(x.shape)}"
            )
        parts = x.reshape(count // n, n * self.num_features, *x.shape[2:])
        weight, bias = (None if p is None else p.repeat(n) for p in (self.weight, self.bias))
        return F.batch_norm(parts, self.split_mean.view(-1), self.split_var.view(-1), weight, bias, True, *how).view(x.shape)

    @torch.no_grad()
    def aggregate(self) -> None:
        """Set `running_mean` and `running_var` from the statistics of the parts."""
        mean = self.split_mean.mean(0)
        self.running_mean.copy_(mean)
        self.running_var.copy_(self.split_var.mean(0) + (self.split_mean - mean).square().mean(0))

    def train(self, mode: bool = True) -> SubBatchNorm:
        """As in every module; on the way from training to evaluation statistics are aggregated."""
        if self.training and not mode:
            self.aggregate()
        return super().train(mode)

    @torch.no_grad()
    def set_splits(self, num_splits: int) -> None:
        """Divide batches into another number of parts; each starts with the aggregated statistics. The same number: nothing.

        Raises:
            ValueError: a number below 1.
        """
        check_int("num_splits", num_splits, 1)
        if num_splits == self.num_splits:
            return
        if self.training:
            self.aggregate()
        self.num_splits = num_splits
        self.split_mean = self.running_mean.repeat(num_splits, 1)
        self.split_var = self.running_var.repeat(num_splits, 1)

    @property
    def _name(self) -> str:
        return f"layer {self.place}" if self.place else "SubBatchNorm"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.training:
            self.aggregate()  # so that what is stored can be used for evaluation at once
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "split_mean")
        if stored is not None and stored.ndim == 2 and len(stored) and len(stored) != self.num_splits:
            self.num_splits = len(stored)
            for name in ("split_mean", "split_var"):
                held = getattr(self, name)
                setattr(self, name, held.new_empty(self.num_splits, self.num_features))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Size and options, for `print`."""
        how = f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}"
        return f"{self.num_features}, num_splits={self.num_splits}, {how}"


def convert_batch_norm(model: nn.Module) -> nn.Module:
    """Put a `SubBatchNorm` with one part in place of each `nn.BatchNorm1d`, `2d` and `3d`, and return the model.

    Parameters are the same objects, so that an optimizer keeps them; running statistics are copied. A model that is itself a
    batch norm is not changed: the new layer is returned. Other normalisations, `nn.SyncBatchNorm` among them, are left alone.

    Args:
        model: changed in place.

    Raises:
        ValueError: a batch norm without running statistics, or with a cumulative average (`momentum=None`); it is named, and
            the model is then as it was.

    Example:
        >>> import torch
        >>> from lowdim.train import convert_batch_norm
        >>> convert_batch_norm(torch.nn.Sequential(torch.nn.Conv3d(3, 8, 3), torch.nn.BatchNorm3d(8)))[1]
        SubBatchNorm(8, num_splits=1, eps=1e-05, momentum=0.1, affine=True)
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    made = {name: _converted(name, module) for name, module in model.named_modules() if isinstance(module, kinds)}
    if "" in made:
        return made[""]
    replace_layers(model, made)
    return model


def _converted(name: str, old: Any) -> SubBatchNorm:
    if not old.track_running_stats or old.momentum is None:
        what = "no running statistics" if not old.track_running_stats else "momentum=None"
        raise ValueError(
            f"layer {name or type(old).__name__} has {what}; SubBatchNorm needs track_running_stats=True and a momentum in "
            "[0, 1]"
        )
    mean = old.running_mean
    new = SubBatchNorm(
        old.num_features, eps=old.eps, momentum=old.momentum, affine=False, device=mean.device, dtype=mean.dtype
    ).train(old.training)
    new.affine, new.weight, new.bias, new.place = old.affine, old.weight, old.bias, name
    for own, value in (("mean", mean), ("var", old.running_var)):
        getattr(new, f"running_{own}").copy_(value)
        getattr(new, f"split_{own}").copy_(value)
    return new


def set_bn_splits(model: nn.Module, num_splits: int) -> None:
    """`set_splits` of every `SubBatchNorm` of a model, as after each change of the long cycle. Other layers are left alone.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> from lowdim.train import SubBatchNorm, set_bn_splits
        >>> norm = SubBatchNorm(4)
        >>> set_bn_splits(norm, 8)
        >>> norm.num_splits
        8
    """
    check_int("num_splits", num_splits, 1)
    for module in model.modules():
        if isinstance(module, SubBatchNorm):
            module.set_splits(num_splits)
