"""Second derivatives of a loss: Hessian-vector products, and attention that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.errors import is_machine_failure, listed
from lowdim.linalg import Operator, is_sharded, mean_over_processes
from lowdim.surgery import unwrap

__all__ = ["gradient_and_hessian", "hessian_matvec", "mean_hessian", "twice_differentiable"]

_ADVICE = (
    "The closure must return the loss without calling backward(), the model must not use reentrant gradient checkpointing, and "
    'attention of its own kernel needs from_pretrained(..., attn_implementation="eager")'
)


def hessian_matvec(loss_closure: Callable[[], Tensor], params: Iterable[Tensor]) -> Operator:
    """Products `v -> H v` with the Hessian of a loss, without building it.

    Formula: `H v = ∂(g · v)/∂θ`, `g = ∂L/∂θ`; `θ`, `g` and `v` are flat, in the order of `params`, each row by row.

    Args:
        loss_closure: gives the loss, a scalar, without calling backward. It is called once, here, so dropout and the like are
            fixed; put the model into evaluation mode if they shall be off. It runs with attention that can be differentiated
            twice (`SDPBackend.MATH`).
        params: the parameters.

    Returns:
        An operator that can be used again and again; it holds the graph of the pass. Between processes of
        `torch.distributed` products are averaged, so all of them must call it, with the same vectors.

    Raises:
        ValueError: no parameters, a loss that is no scalar, is not finite or does not depend on them, one that cannot be
            differentiated twice (the message says why), or sharded parameters.

    Example:
        >>> import torch
        >>> from lowdim.diagnose import hessian_matvec
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> H = hessian_matvec(lambda: (w[0] ** 2 * w[1]), [w])
        >>> H @ torch.tensor([1.0, 0.0])
        tensor([4., 2.])

    A product costs about two gradients. Through ReLU second derivatives are 0 almost everywhere: that is the Hessian that
    autograd gives.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6(1), 1994.
    """
    return gradient_and_hessian(loss_closure, params)[1]


def gradient_and_hessian(loss_closure: Callable[[], Tensor], params: Iterable[Tensor]) -> tuple[Tensor, Operator]:
    """The flat gradient `(n,)` of a loss, and `hessian_matvec`, from one pass."""
    wanted = list(params)
    if not wanted:
        raise ValueError("params must hold at least one parameter; got none")
    if any(map(is_sharded, wanted)):
        raise ValueError("the parameters are sharded over processes: second derivatives need whole ones")
    with torch.enable_grad(), twice_differentiable(), _explained():
        loss = loss_closure()
        _check_loss(loss)
        gradients = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    _refuse_once_differentiable(gradients)
    if all(gradient is None for gradient in gradients):
        raise ValueError("the loss of loss_closure does not depend on params")
    sizes = [parameter.numel() for parameter in wanted]
    pairs = [(g, i) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def product(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        if pairs:
            outputs = [g for g, _ in pairs]
            along = [parts[i].view_as(g).to(g.dtype) for g, i in pairs]
            with _explained():
                found: Sequence[Tensor | None] = torch.autograd.grad(
                    outputs, wanted, along, retain_graph=True, allow_unused=True
                )
        else:  # the loss is linear
            found = [None] * len(wanted)
        return mean_over_processes(_flat(found, wanted, vector.dtype))

    operator = _operator(product, wanted)
    return mean_over_processes(_flat(gradients, wanted, operator.dtype)), operator


def mean_hessian(parts: Iterable[tuple[Callable[[], Tensor], float]], params: Iterable[Tensor]) -> Operator:
    """The operator of `Σ w_i H_i`, for losses over more samples than a pass can hold: the graph of one part is held at a time.

    Args:
        parts: for each part its loss, as in `hessian_matvec`, and its weight. Every product runs all of them again.
        params: the parameters.

    Example:
        >>> import torch
        >>> from lowdim.diagnose.core.curvature import mean_hessian
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> parts = [(lambda: (w**2).sum(), 0.5), (lambda: (w**4).sum(), 0.5)]
        >>> mean_hessian(parts, [w]) @ torch.tensor([1.0, 0.0])
        tensor([7., 0.])
    """
    wanted, fixed = list(params), list(parts)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        for closure, weight in fixed:
            total += weight * hessian_matvec(closure, wanted)(vector)
        return total

    return _operator(product, wanted)


@contextmanager
def twice_differentiable(model: nn.Module | None = None) -> Iterator[None]:
    """Attention within this block has second derivatives; afterwards everything is as it was.

    Fused kernels of `scaled_dot_product_attention` have none, so it runs as plain products. A model of transformers that
    was loaded with a kernel of its own (flash attention) is switched to `"eager"` where it can be.

    Args:
        model: whose attention may have to be switched.

    Raises:
        ValueError: the model's attention cannot be switched.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain: Any = None if model is None else unwrap(model)
    before = _attention(plain)
    switch = any(kind not in (None, "eager", "sdpa") for kind in before.values())
    if switch:
        _set_attention(plain, dict.fromkeys(before, "eager"))
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if switch:
            _set_attention(plain, before)


def _operator(product: Callable[[Tensor], Tensor], params: list[Tensor]) -> Operator:
    # Vectors in half precision would lose what Lanczos needs; the passes themselves run in the parameters' types.
    kinds = {p.dtype for p in params}
    dtype = torch.promote_types(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32
    return Operator(product, sum(p.numel() for p in params), dtype=dtype, device=params[0].device)


def _attention(model: Any) -> dict[str, Any]:
    """How a model of transformers computes attention: of itself under "", and of each of its parts."""
    config = getattr(model, "config", None)
    if not hasattr(config, "_attn_implementation"):
        return {}
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ()}
    return {name: part._attn_implementation for name, part in {"": config, **parts}.items() if part is not None}


def _set_attention(model: Any, kinds: dict[str, Any]) -> None:
    setter = getattr(model, "set_attn_implementation", None)
    if setter is not None:
        setter(kinds)
    if setter is None or _attention(model) != kinds:
        now = listed(sorted({str(kind) for kind in _attention(model).values()}))
        raise ValueError(
            f"{type(model).__name__} computes attention with {now}, which has no second derivative, and cannot be switched; "
            'load it with from_pretrained(..., attn_implementation="eager")'
        )


@contextmanager
def _explained() -> Iterator[None]:
    """Errors of autograd name the reason and what to do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if is_machine_failure(error):
            raise
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the loss cannot be differentiated twice: {text}. {_ADVICE}") from error


def _refuse_once_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """A function marked `@once_differentiable` ends the graph of its gradient, and autograd would give zeros beyond it."""
    waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "Error":
            raise ValueError(
                "the loss cannot be differentiated twice: a function on the way is marked @once_differentiable (a fused "
                "kernel, or an autograd.Function of another library). Replace it by plain operations"
            )
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_closure must return the loss, a tensor with one number; got {shape}")
    if not bool(torch.isfinite(loss.detach()).all()):
        raise ValueError(f"the loss is {float(loss.detach()):g}; it must be finite")
    if not loss.requires_grad:
        raise ValueError("the loss of loss_closure does not depend on params")


def _flat(found: Iterable[Tensor | None], params: Iterable[Tensor], dtype: torch.dtype | None) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if g is None else g).detach().reshape(-1).to(dtype) for g, p in zip(found, params)])
