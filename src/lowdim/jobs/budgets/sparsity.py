"""How sparse WINA makes the inputs of each layer, for the bytes that a token reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowdim.calibrate import call_model, to_device
from lowdim.calibrate.passes import as_it_was
from lowdim.jobs.budgets.budget import Budget, Fitted, check_reachable
from lowdim.jobs.systems import Compressor
from lowdim.linalg import wide
from lowdim.surgery import blocks_of, find_layers, is_linear, is_quantized, matrix_shape, model_device, without_tied

__all__ = ["fit_sparsity", "sparse_layers"]

COUNTED = "of weights read for a token"
_STEP = 0.1
_ROWS = 2  # sequences on which blocks are compared


def fit_sparsity(
    method: Compressor, given: Mapping[str, Any], model: nn.Module, batches: Sequence[Any], budget: Budget
) -> Fitted:
    """WINA: in each block by `greedy_sparsity`, all blocks at one mean; layers outside of blocks have that mean."""
    from lowdim.compress import WINALinear, greedy_sparsity

    if not batches:
        raise ValueError("batches is empty: sparsities are found by the outputs of blocks on sample data")
    config = method.build(given)
    layers = sparse_layers(model, config)
    sizes = {name: math.prod(matrix_shape(layer)) for name, layer in layers.items()}
    rows = {
        name: matrix_shape(layer)[0] * cast(Tensor, layer.weight).element_size() for name, layer in layers.items()
    }  # bytes of an input
    dense = sum(matrix_shape(layer)[1] * rows[name] for name, layer in layers.items())
    parts = {block: [n for n in layers if n.startswith(f"{block}.")] for block in blocks_of(model, layers)}

    def read(shares: Mapping[str, float]) -> int:
        return sum(int(matrix_shape(layers[name])[1] * (1 - share)) * rows[name] for name, share in shares.items())

    least = read(_sparsest(parts, sizes))
    allowed = check_reachable("wina", budget, COUNTED, dense, least)
    masks = {
        name: WINALinear(layer, sparsity=0.0, criterion=config.criterion, dense_prefix=config.dense_prefix)
        for name, layer in layers.items()
    }
    calls = _inputs_of(model, list(parts), batches[0])
    target = 1 - allowed / dense
    while True:
        shares = dict.fromkeys(layers, target)
        for block, names in parts.items():
            with _error_of(model.get_submodule(block), calls[block], {n: (layers[n], masks[n]) for n in names}) as error:
                shares |= greedy_sparsity(error, {n: sizes[n] for n in names}, target=target, base_step=_STEP)
        if read(shares) <= allowed:
            return Fitted(method.build({**given, "sparsity": shares}), COUNTED, dense, allowed, least)
        target += (read(shares) - allowed) / dense + 1e-3  # the state nearest to the target may be below it


def sparse_layers(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The layers whose inputs WINA makes sparse."""
    found = find_layers(
        model, config.target_modules, exclude=config.exclude, accept=lambda layer: is_linear(layer) and not is_quantized(layer)
    )
    return without_tied(model, found, named=config.target_modules is not None)[0]


def _sparsest(parts: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, float]:
    """The last state that the search can reach: as many steps of each projection as stay below 1."""
    found = dict.fromkeys(sizes, 1 - 1e-09)
    for names in parts.values():
        for name in names:
            step = _STEP * sizes[names[0]] / sizes[name]
            found[name] = step * (math.ceil(1 / step - 1e-9) - 1)
    return found


def _inputs_of(model: nn.Module, blocks: Sequence[str], batch: Any) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each block is called with for the first rows of a batch."""
    few = {key: value[:_ROWS] for key, value in batch.items()} if isinstance(batch, Mapping) else batch[:_ROWS]
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            without = {key: None for key in kwargs if key.startswith("past_key_value")}
            calls[name] = args, {**kwargs, **without, **({"use_cache": False} if "use_cache" in kwargs else {})}

        return hook

    handles = [model.get_submodule(b).register_forward_pre_hook(keep(b), with_kwargs=True) for b in blocks]
    try:
        with as_it_was(model, {}, want_gradient=False), torch.no_grad():
            call_model(model, to_device(few, model_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    return calls


@contextmanager
def _error_of(block: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]], layers: Mapping[str, Any]) -> Iterator[Any]:
    """A function of sparsities: `‖y - y'‖ / ‖y‖` of the block's output."""

    def sparse(mask: Any) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            return (args[0] * mask.mask(args[0]), *args[1:]) if mask.sparsity else None

        return hook

    def output() -> Tensor:
        args, kwargs = call
        found = block(*args, **kwargs)
        return wide(found[0] if isinstance(found, (tuple, list)) else found)

    handles = []
    with as_it_was(block, {}, want_gradient=False), torch.no_grad():
        right = output()
        handles = [layer.register_forward_pre_hook(sparse(mask)) for layer, mask in layers.values()]

        def error(shares: dict[str, float]) -> float:
            for name, share in shares.items():
                layers[name][1].sparsity = share
            return float((output() - right).norm() / right.norm().clamp_min(1e-30))

        try:
            yield error
        finally:
            for handle in handles:
                handle.remove()
