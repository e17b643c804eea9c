"""Classifiers smoothed by noise: on whole images (Cohen et al.), and on two halves of the pixels."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import MissingExtraError, check_choice, check_float, check_int
from lowdim.linalg import stream_on
from lowdim.represent.drs.bounds import ABSTAIN, RULES, dual_smoothing_radius, smallest_n, smoothing_radius
from lowdim.represent.drs.certificates import Certificate, Certificates
from lowdim.represent.drs.halves import FILLS, Spread, check_mask, checkerboard
from lowdim.surgery import evaluating

__all__ = ["DualRandomizedSmoothing", "RandomizedSmoothing"]

_DRAW = 100  # samples whose noise is drawn at once, so that the numbers do not depend on the batch size
Model = Callable[[Tensor], Any]
Write = Callable[[Tensor, Tensor], Any]  # (numbers of noise, images (_DRAW, C, H, W) to write)


class _Smoothed(ABC):
    """Counts of classes under noise, and certificates from them."""

    def __init__(self, models: tuple[Model, ...], num_classes: int, sigma: float):
        check_int("num_classes", num_classes, 2)
        check_float("sigma", sigma, 0.0, low_open=True)
        for model in models:
            if not callable(model):
                raise TypeError(f"a model must be a module or a function of images; got {type(model).__name__}")
        self.num_classes, self.sigma = num_classes, sigma
        self._models = models

    @abstractmethod
    def _noisy(self, branch: int, x: Tensor) -> tuple[int, Write]:
        """Numbers of noise in a sample of the branch, and what writes images of `_DRAW` times as many."""

    @abstractmethod
    def _radius(self, counts: list[int], n: int, alpha: float) -> float: ...

    @abstractmethod
    def _smallest(self, alpha: float) -> int: ...

    def certify(
        self,
        x: Tensor,  # (C, H, W)
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        generator: torch.Generator | None = None,
    ) -> Certificate:
        """The class that `n0` samples (of each branch) choose, and its radius from n fresh ones.

        Args:
            alpha: probability that the certificate is wrong.
            batch_size: images in one call of the model; it does not change the noise.
            generator: of the noise; None: torch's own.

        Raises:
            ValueError: x not (C, H, W), options out of range, an n with which nothing could be certified, logits of another
                shape or NaN. MissingExtraError: scipy is not installed.
        """
        self._check(n0, n, alpha, batch_size)
        self._check_image(x)
        with evaluating(*self._models):
            return self._certify(x, n0, n, alpha, batch_size, generator)

    def certify_all(
        self,
        x: Any,  # (B, C, H, W)
        labels: Any = None,  # (B,)
        *,
        n0: int = 100,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        seed: int = 0,
        callback: Callable[[int, Certificate], Any] | None = None,
    ) -> Certificates:
        """`certify` of each image, with a generator of its own: neither order nor `batch_size` changes the noise.

        Args:
            x: a tensor or a numpy array.
            labels: right classes, for certified accuracy.
            n0, n, alpha, batch_size: as in certify.
            seed: image i draws from the stream of `(seed, i)`.
            callback: called with `(i, certificate)` after each image.

        Returns:
            Certificates; `predictions, radii = ...` unpacks it.

        Raises:
            ValueError: as certify; x not (B, C, H, W), labels of another length.
        """
        images = torch.as_tensor(x)
        self._check(n0, n, alpha, batch_size)
        check_int("seed", seed, 0)
        if images.ndim != 4 or not len(images):
            raise ValueError(f"x must be (B, C, H, W) with at least one image; got shape {tuple(images.shape)}")
        given = None if labels is None else torch.as_tensor(labels).cpu().numpy().astype(np.int64)
        if given is not None and given.shape != (len(images),):
            raise ValueError(f"labels must have one entry for each of the {len(images)} images; got shape {given.shape}")
        self._check_image(images[0])
        start, found = time.perf_counter(), []
        with evaluating(*self._models):
            for i, image in enumerate(images):
                generator = stream_on(image.device, seed, "certify", i)
                found.append(self._certify(image, n0, n, alpha, batch_size, generator))
                if callback is not None:
                    callback(i, found[-1])
        return Certificates(
            predictions=np.array([each.prediction for each in found], dtype=np.int64),
            radii=np.array([each.radius for each in found]),
            seconds=time.perf_counter() - start,
            labels=given,
        )

    def _certify(self, x: Tensor, n0: int, n: int, alpha: float, batch_size: int, generator: Any) -> Certificate:
        branches = [(model, *self._noisy(branch, x)) for branch, model in enumerate(self._models)]
        chosen = sum(self._counts(*branch, x, n0, batch_size, generator) for branch in branches)
        assert isinstance(chosen, Tensor)
        best = int(chosen.argmax())
        counts = [int(self._counts(*branch, x, n, batch_size, generator)[best]) for branch in branches]
        radius = self._radius(counts, n, alpha)
        return Certificate(best, radius) if radius > 0.0 else Certificate(ABSTAIN, 0.0)

    def _counts(self, model: Model, size: int, write: Write, x: Tensor, n: int, batch_size: int, generator: Any) -> Tensor:
        """How often each class came out of n noisy images `(num_classes,)`, int64; size and write are those of `_noisy`."""
        counts = torch.zeros(self.num_classes, dtype=torch.int64)
        for inputs in _batches(x, n, batch_size, generator, size, write):
            out = model(inputs)
            logits = getattr(out, "logits", out)
            if tuple(logits.shape) != (len(inputs), self.num_classes):
                raise ValueError(f"the model must give logits ({len(inputs)}, {self.num_classes}); got {tuple(logits.shape)}")
            if bool(logits.isnan().any()):
                raise ValueError("the model gave NaN")
            counts += torch.bincount(logits.argmax(1), minlength=self.num_classes).cpu()
            del inputs, out, logits  # so that the next batch takes their memory
        return counts

    def _check(self, n0: int, n: int, alpha: float, batch_size: int) -> None:
        check_int("n0", n0, 1)
        check_int("n", n, 1)
        check_int("batch_size", batch_size, 1)
        least = self._smallest(alpha)
        if n < least:
            raise ValueError(f"n must be >= {least} for alpha={alpha:g}: with fewer samples every image abstains; got {n}")

    def _check_image(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.ndim != 3 or not x.is_floating_point():
            what = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be an image (C, H, W) of floating point numbers; got {what}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError("x has NaN or infinite entries")


class RandomizedSmoothing(_Smoothed):
    """A classifier smoothed by Gaussian noise on the image, with Cohen's certificate: the baseline.

    Formula: `g(x) = argmax_c P[f(x + ε) = c]`, `ε ~ N(0, σ² I)`; radius `σ Φ⁻¹(p)` with p the lower bound of the class's
    probability, an abstention where `p < 1/2`.

    Args:
        model: images (B, C, H, W) -> logits (B, num_classes), or an output with `.logits`. A module runs in evaluation mode
            without gradients and is put back into its former mode.
        num_classes: of the logits.
        sigma: standard deviation of the noise, in the units of the pixels; train the model with the same.

    Raises:
        ValueError: sigma <= 0, num_classes < 2. TypeError: a model that cannot be called.

    Example:
        >>> import torch
        >>> from lowdim.represent import RandomizedSmoothing
        >>> bright = lambda images: images.mean((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])
        >>> smoothed = RandomizedSmoothing(bright, num_classes=2, sigma=0.5)
        >>> certificate = smoothed.certify(torch.ones(1, 4, 4), n=1000, generator=torch.Generator().manual_seed(0))
        >>> certificate.prediction, round(certificate.radius, 3)  # all samples agree
        (1, 1.232)

    Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019, arXiv 1902.02918.
    """

    def __init__(self, model: Model, num_classes: int, sigma: float):
        super().__init__((model,), num_classes, sigma)

    def predict(
        self,
        x: Tensor,  # (C, H, W)
        *,
        n: int = 100_000,
        alpha: float = 0.001,
        batch_size: int = 1000,
        generator: torch.Generator | None = None,
    ) -> int:
        """The class of the smoothed classifier, or ABSTAIN where a two-sided test cannot tell the two most frequent ones apart.

        Raises:
            ValueError: as certify.
        """
        try:
            from scipy.stats import binomtest
        except ImportError as error:
            raise MissingExtraError("scipy", "science", "predict") from error
        check_int("n", n, 1)
        check_int("batch_size", batch_size, 1)
        check_float("alpha", alpha, 0.0, 1.0, low_open=True, high_open=True)
        self._check_image(x)
        with evaluating(*self._models):
            top = self._counts(self._models[0], *self._noisy(0, x), x, n, batch_size, generator).topk(2)
        first, second = top.values.tolist()
        return ABSTAIN if binomtest(first, first + second, 0.5).pvalue > alpha else int(top.indices[0])

    def _noisy(self, branch: int, x: Tensor) -> tuple[int, Write]:
        return x.numel(), lambda drawn, out: torch.add(drawn.mul_(self.sigma).view(out.shape), x, out=out)

    def _radius(self, counts: list[int], n: int, alpha: float) -> float:
        return smoothing_radius(counts[0], n, alpha, self.sigma)

    def _smallest(self, alpha: float) -> int:
        return smallest_n(alpha)


class DualRandomizedSmoothing(_Smoothed):
    """Two classifiers, each smoothed on half of the pixels: noise in half the dimension gives a larger radius.

    Formula: `g(x) = argmax_c p_l(c) + p_r(c)`, `p_l(c) = P[f_l(fill(x ⊙ left + ε ⊙ left)) = c]`, likewise right; radius
    `(σ/√2)(Φ⁻¹(p_l) + Φ⁻¹(p_r))` with both lower bounds at `alpha / 2`, signed; an abstention where it is not positive.

    Args:
        left_model, right_model: as the model of RandomizedSmoothing, each trained on its own half with noise and fill.
        num_classes: of the logits.
        sigma: standard deviation of the noise on the kept pixels.
        masks: `(left, right)` bool (H, W) that share no pixel and leave none out; None: `checkerboard`.
        fill: what stands in for the other half: see fill_masked.
        rule: see dual_smoothing_radius.

    Raises:
        ValueError: masks that overlap or leave pixels out, sigma <= 0, an unknown fill or rule. TypeError: a model that cannot
            be called, masks that are not bool.

    Example:
        >>> import torch
        >>> from lowdim.represent import DualRandomizedSmoothing
        >>> bright = lambda images: images.mean((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])
        >>> smoothed = DualRandomizedSmoothing(bright, bright, num_classes=2, sigma=0.5)
        >>> found = smoothed.certify_all(torch.ones(2, 1, 4, 4), labels=[1, 0], n=500)
        >>> predictions, radii = found
        >>> predictions.tolist(), radii.round(3).tolist(), round(found.average_radius(), 3)
        ([1, 1], [1.533, 1.533], 0.766)

    A radius is certified for the pair of models as they are: it says nothing of their accuracy, which suffers where
    neighbouring pixels are not redundant (small print, spectra). The authors' programs claim more than the theorem does.

    Source: Xia, Yu, Jiang, Ding, "Mitigating the Curse of Dimensionality for Certified Robustness via Dual Randomized
    Smoothing", ICLR 2024, arXiv 2404.09586.
    """

    def __init__(
        self,
        left_model: Model,
        right_model: Model,
        num_classes: int,
        sigma: float,
        *,
        masks: tuple[Tensor, Tensor] | None = None,
        fill: str = "neighbour",
        rule: str = "sound",
    ):
        super().__init__((left_model, right_model), num_classes, sigma)
        check_choice("fill", fill, FILLS)
        check_choice("rule", rule, RULES)
        if masks is not None:
            left, right = (torch.as_tensor(mask) for mask in masks)
            height, width = left.shape if left.ndim == 2 else (0, 0)
            check_mask("masks[0]", left, height, width)
            check_mask("masks[1]", right, height, width)
            twice, none = int((left & right).sum()), int((~left & ~right).sum())
            if twice or none or not bool(left.any()) or not bool(right.any()):
                raise ValueError(f"each pixel must be in one of the two masks; {twice} are in both and {none} in none")
            masks = left, right
        self.masks, self.fill, self.rule = masks, fill, rule

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return checkerboard(x.shape[1], x.shape[2]) if self.masks is None else self.masks

    def _check_image(self, x: Tensor) -> None:
        super()._check_image(x)
        for side, mask in enumerate(self._halves(x)):
            check_mask(f"masks[{side}]", mask, x.shape[1], x.shape[2])
            if not bool(mask.any()):
                raise ValueError(f"an image of {x.shape[1]} x {x.shape[2]} pixels has no second half")

    def _noisy(self, branch: int, x: Tensor) -> tuple[int, Write]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        pixels = self._halves(x)[branch].cpu().numpy()
        spread = _spread(pixels.tobytes(), pixels.shape, self.fill, x.device, dtype)
        kept = x.flatten(1)[:, spread.kept, None]
        return kept.numel(), lambda drawn, out: spread(drawn.mul_(self.sigma).view(len(x), -1, _DRAW).add_(kept), out)

    def _radius(self, counts: list[int], n: int, alpha: float) -> float:
        return dual_smoothing_radius(counts[0], counts[1], n, alpha, self.sigma, rule=self.rule)

    def _smallest(self, alpha: float) -> int:
        return smallest_n(alpha, dual=self.rule == "sound")


@lru_cache(maxsize=8)
def _spread(mask: bytes, shape: tuple[int, int], fill: str, device: torch.device, dtype: torch.dtype) -> Spread:
    """`Spread`, which all images of a size share."""
    return Spread(torch.frombuffer(bytearray(mask), dtype=torch.bool).view(shape), fill, device, dtype)


def _batches(
    x: Tensor, n: int, batch_size: int, generator: torch.Generator | None, size: int, write: Write
) -> Iterator[Tensor]:
    """Batches of noisy images, n in all, each a fresh tensor; made in pieces that stay in a core's cache."""
    how: Any = {"generator": generator, "dtype": torch.promote_types(x.dtype, torch.float32)}
    how["device"] = x.device if generator is None else generator.device
    over = x.new_empty(0, *x.shape)  # drawn for a batch that was full

    def batch(count: int) -> Tensor:
        nonlocal over
        images = x.new_empty(count, *x.shape)
        filled = min(count, len(over))
        images[:filled], over = over[:filled], over[filled:]
        while filled < count:
            room = images[filled : filled + _DRAW]
            piece = room if len(room) == _DRAW else x.new_empty(_DRAW, *x.shape)
            write(torch.randn(_DRAW * size, **how).to(x.device), piece)
            if piece is not room:
                room[:], over = piece[: len(room)], piece[len(room) :]
            filled += len(room)
        return images

    while n > 0:
        count = min(batch_size, n)
        n -= count
        yield batch(count)  # not held here, so that the next takes the same memory
