"""A model's blocks on sample batches one at a time, each on what the ones before gave as long as they were unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowdim.calibrate.collecting import collect
from lowdim.calibrate.passes import as_it_was, call_model, give_back
from lowdim.surgery import blocks_of

__all__ = ["BlockWalk", "walk_blocks"]


def walk_blocks(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any], *, max_bytes: int
) -> BlockWalk | None:
    """Run the model over the batches once, and remember with what it calls its blocks; the model is unchanged.

    Args:
        layers: name -> layer, as `surgery.find_layers` gives them; those outside of every block play no part.
        batches: an iterable, consumed once.
        max_bytes: bound on the tensors that are kept: what the first block gets, and masks and positions, which blocks share.

    Returns:
        What runs one block after another again, with the same bits. None if that cannot be: no block holds a layer; the blocks
        do not each run once in a pass, in one order; an argument is neither a tensor nor plain, or is changed in place; a layer
        is also called from outside of its block; or more bytes would be kept.

    Raises:
        ValueError: no batches, or a layer in a block that saw no row, or whose outputs are not finite (named).
        TypeError: `batches` is one batch instead of an iterable of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowdim.calibrate import walk_blocks
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2))
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> model = Net()
        >>> walk = walk_blocks(model, {"blocks.1.0": model.blocks[1][0]}, [torch.ones(3, 2)], max_bytes=100)
        >>> walk.skip("blocks.0")
        >>> walk.collect("blocks.1", {"blocks.1.0": model.blocks[1][0]}, {"norms"})["blocks.1.0"]["count"]
        3
    """
    blocks = blocks_of(model)
    owners = {name: block for name in layers for block in blocks if name.startswith(f"{block}.")}
    if not owners:
        return None
    recorder = _Recorder(max_bytes)

    def run(whole: nn.Module, batch: Any) -> Any:
        recorder.begin(batch)
        call_model(whole, batch)
        recorder.end()
        give_back()

    try:
        with _without_cache(model), recorder.hooks(model, blocks, {name: (layers[name], owners[name]) for name in owners}):
            collect(model, {name: layers[name] for name in owners}, {"output_norms"}, batches, run)
    except _NotWalkable:
        return None
    return BlockWalk(model, recorder.passes)


@dataclass
class _Pass:
    """What one batch calls each block with, in order; `_PREVIOUS` stands for `state`, the output of the block before."""

    attention_mask: Tensor | None
    calls: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    state: Tensor | None = None


class BlockWalk:
    """See `walk_blocks`. Each block is left, by `collect` or `skip`, before it is changed and before the next one is run.

    Attributes:
        blocks: their names, in the order in which the model calls them.
    """

    def __init__(self, model: nn.Module, passes: list[_Pass]):
        self._model, self._passes = model, passes
        self.blocks = tuple(passes[0].calls)

    def collect(
        self, block: str, layers: Mapping[str, nn.Module], needs: Iterable[str], *, leave: bool = True
    ) -> dict[str, dict[str, Any]]:
        """`lowdim.calibrate.collect` for layers of this block, for which only the block is run.

        Args:
            leave: go on to the next block; False where this one is run again, for other layers.
        """
        give_back()
        return collect(
            self._model.get_submodule(block), layers, needs, self._passes, lambda module, each: _run(module, each, block, leave)
        )

    def skip(self, block: str) -> None:
        """Run the block and go on to the next."""
        module = self._model.get_submodule(block)
        with as_it_was(module, {}, want_gradient=False), torch.no_grad():
            for each in self._passes:
                _run(module, each, block, leave=True)


def _run(module: nn.Module, each: _Pass, block: str, leave: bool) -> Tensor:
    args, kwargs = each.calls[block]
    found = _first(module(*_filled(args, each.state), **_filled(kwargs, each.state)))
    if leave:
        each.state = found
        del each.calls[block]
    return found


class _NotWalkable(Exception):
    """Blocks cannot be run one by one."""


class _Previous:
    """Stands for the output of the block before."""


_PREVIOUS = _Previous()


class _Recorder:
    """Keeps what the blocks are called with."""

    def __init__(self, limit: int):
        self.passes: list[_Pass] = []
        self.left = limit
        self.open: str | None = None  # the block that is running
        self.last: tuple[Tensor | None, int] = None, 0  # what the one before gave, and the version of these numbers
        self.kept: dict[int, tuple[Tensor, int]] = {}  # of this pass, by the address of the storage

    def begin(self, batch: Any) -> None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else getattr(batch, "attention_mask", None)
        self.passes.append(_Pass(mask))
        self.open, self.last, self.kept = None, (None, 0), {}

    def end(self) -> None:
        order = [list(each.calls) for each in (self.passes[0], self.passes[-1])]
        if order[0] != order[1] or any(tensor._version != version for tensor, version in self.kept.values()):
            raise _NotWalkable

    @contextmanager
    def hooks(self, model: nn.Module, blocks: Iterable[str], layers: Mapping[str, tuple[nn.Module, str]]) -> Iterator[None]:
        with ExitStack() as stack:
            for block in blocks:
                module = model.get_submodule(block)
                stack.callback(module.register_forward_pre_hook(self._enter(block), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave).remove)
            for layer, block in layers.values():
                stack.callback(layer.register_forward_pre_hook(self._inside(block)).remove)
            yield

    def _enter(self, block: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls = self.passes[-1].calls
            if self.open is not None or block in calls:
                raise _NotWalkable
            self.open = block
            calls[block] = self._keep(args), self._keep(kwargs)

        return hook

    def _leave(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        found, (before, version) = _first(output), self.last
        if (before is not None and before._version != version) or not _is_plain(found):
            raise _NotWalkable
        self.open, self.last = None, (found, found._version)

    def _inside(self, block: str) -> Any:
        def hook(*_: Any) -> None:
            if self.open != block:
                raise _NotWalkable

        return hook

    def _keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._keep_tensor(value)
        if type(value) is dict:
            return {key: self._keep(each) for key, each in value.items()}
        if type(value) in (tuple, list):
            return type(value)(self._keep(each) for each in value)
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
            return value
        raise _NotWalkable

    def _keep_tensor(self, value: Tensor) -> Any:
        last, version = self.last
        if not _is_plain(value):
            raise _NotWalkable
        if value is last and value._version == version:
            return _PREVIOUS
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.kept:
            self.kept[storage.data_ptr()] = value, value._version
            self.left -= storage.nbytes()
        if self.left < 0:
            raise _NotWalkable
        return value


def _is_plain(value: Tensor) -> bool:
    """Whether it holds numbers, and tells when they change."""
    return type(value) in (Tensor, nn.Parameter) and not value.is_meta and not value.is_inference()


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(found, Tensor):
        raise _NotWalkable
    return found


def _filled(value: Any, state: Tensor | None) -> Any:
    """The recorded arguments with `state` in its place."""
    if value is _PREVIOUS:
        return state
    if type(value) is dict:
        return {key: _filled(each, state) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_filled(each, state) for each in value)
    return value


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """A cache would be filled by the first pass, and found full by what runs a block again."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
    before = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", None)]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
