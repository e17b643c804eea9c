"""A second device that needs no GPU: torch's `lazy`, with numbers.

A tensor on `lazy` wraps one on the CPU that holds the numbers. Whether an operation may be done, and on which device its result
is, torch's own fake tensors say: they know `lazy` and refuse to mix it with `cpu`. So a test runs the code that a GPU would
run, its branches on numbers included, and a tensor left on the CPU raises `FakeTensorDeviceMismatchError` where it meets one of
the model's.

What torch knows of real devices only has stand-ins: fused optimizers run the CPU's kernel, `autocast` on `lazy` is off, and a
generator on `lazy` draws the CPU's numbers.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = ["LAZY", "FakeTensorDeviceMismatchError", "LazyTensor", "numbers", "second_device", "to_lazy"]

LAZY = torch.device("lazy", 0)
CPU = torch.device("cpu")
#: Torch's judge of devices and shapes.
_JUDGE = FakeTensorMode(allow_non_fake_inputs=True)
_VERDICTS: dict[Any, bool] = {}
#: What may read from another device, or write to one.
_CROSSING = {"aten::copy_", "aten::_to_copy", "aten::_foreach_copy_", "aten::index", "aten::index_put_", "aten::index_put"}
#: What only looks at the numbers or at the storage.
_LOOKS = {Tensor.tolist, Tensor.data_ptr, Tensor.untyped_storage}
#: Views that only set a bit, which is not seen on this side of a dispatch, and what computes their numbers.
_PHYSICAL = {
    torch.ops.aten._conj.default: torch.ops.aten.conj_physical.default,
    torch.ops.aten._neg_view.default: torch.ops.aten.neg.default,
}
_TORCHS_GENERATOR = torch.Generator


class LazyTensor(Tensor):
    """A tensor on `lazy` with the numbers of `held`, which is on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> LazyTensor:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=LAZY
        )
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyTensor({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            made = self.detach().clone()
            memo[id(self)] = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return memo[id(self)]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            target, value = args
            if not isinstance(value, LazyTensor) or not isinstance(target, LazyTensor):
                raise FakeTensorDeviceMismatchError("set_data", target.device, value.device)
            target.held = value.held
        if func in _LOOKS:
            return func(args[0].held, *args[1:], **(kwargs or {}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees the calls that make tensors on `lazy` from none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _GeneratorType(type(torch.Generator)):
    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _TORCHS_GENERATOR)


class Generator(torch.Generator, metaclass=_GeneratorType):
    """`torch.Generator`, for `lazy` as well."""

    device = property(lambda self: self._place)  # type: ignore[assignment]

    def __new__(cls, device: Any = "cpu") -> Generator:
        place = torch.device(device)
        made = super().__new__(cls, CPU if place.type == "lazy" else place)
        made._place = LAZY if place.type == "lazy" else place
        return made


class _Generators(TorchFunctionMode):
    """Refuses draws on one device from a generator of another, as torch does for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None:
            place = args[0].device if args and isinstance(args[0], Tensor) else torch.device(kwargs.get("device") or "cpu")
            if place.type not in (generator.device.type, "meta"):
                raise FakeTensorDeviceMismatchError(func, place, generator.device)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, form = tree_flatten((args, kwargs))
    lazies = [x for x in leaves if isinstance(x, LazyTensor)]
    if not lazies and not any(isinstance(x, torch.device) and x.type == "lazy" for x in leaves):
        return func(*args, **kwargs)
    key = (func, *map(_kind, leaves))
    if key not in _VERDICTS:
        _check_writes(func, args)
        _VERDICTS[key] = _judge(func, leaves, form)
    args, kwargs = tree_unflatten([_on_cpu(x) for x in leaves], form)
    result = _PHYSICAL.get(func, func)(*args, **kwargs)
    same = {id(x.held): x for x in lazies}  # an operation in place gives back what it was given
    on_lazy = _VERDICTS[key]

    def placed(value: Tensor) -> Tensor:
        return same[id(value)] if id(value) in same else LazyTensor(value) if on_lazy else value

    return tree_map_only(Tensor, placed, result)


def _kind(value: Any) -> Any:
    """What of an argument decides on which devices a call works."""
    if isinstance(value, Tensor):
        return isinstance(value, LazyTensor), value.ndim == 0
    return value.type if isinstance(value, torch.device) else type(value)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return value.held
    return CPU if isinstance(value, torch.device) and value.type == "lazy" else value


def _as_fake(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=LAZY)
    return LAZY if isinstance(value, torch.device) and value.type == "lazy" else value


def _check_writes(func: Any, args: Any) -> None:
    """Results of one device are not written into a tensor of the other, even where they are one number."""
    if func._schema.name in _CROSSING or not func._schema.is_mutable:
        return
    for argument, value in zip(func._schema.arguments, args):
        if argument.alias_info is not None and argument.alias_info.is_write and _is_plain(value):
            raise FakeTensorDeviceMismatchError(func, LAZY, value.device)


def _judge(func: Any, leaves: list[Any], form: Any) -> bool:
    """Whether the results are on `lazy`, from torch's fake tensors.

    Raises:
        FakeTensorDeviceMismatchError: tensors of both devices in one call.
    """
    name = func._schema.name
    try:
        with _disable_current_modes(), _JUDGE:
            args, kwargs = tree_unflatten([_as_fake(x) for x in leaves], form)
            said = [x.device.type for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
    except FakeTensorDeviceMismatchError as error:
        error.add_note(f"{name}: " + ", ".join(f"{tuple(x.shape)} on {x.device}" for x in leaves if isinstance(x, Tensor)))
        raise
    except (DataDependentOutputException, DynamicOutputShapeException):  # the answer depends on numbers
        other = next((x for x in leaves if _is_plain(x) and x.ndim), None)
        if other is not None and name not in _CROSSING:
            raise FakeTensorDeviceMismatchError(func, LAZY, other.device) from None
        return True
    assert len(set(said)) <= 1, f"{name} gives tensors on several devices"
    return said == [] or said[0] == "lazy"


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, LazyTensor)


def to_lazy(thing: Any) -> Any:
    """A copy on the second device: of a tensor, of a module (ties stay ties), or of containers of tensors."""
    if isinstance(thing, nn.Module):
        memo: dict[int, Any] = {}
        for parameter in thing.parameters():
            memo[id(parameter)] = nn.Parameter(to_lazy(parameter.detach()), parameter.requires_grad)
        for buffer in thing.buffers():
            memo[id(buffer)] = to_lazy(buffer)
        return copy.deepcopy(thing, memo)
    return tree_map_only(Tensor, _moved, thing)


def _moved(tensor: Tensor) -> LazyTensor:
    return LazyTensor(tensor.detach().clone())


def numbers(thing: Any) -> Any:
    """The same containers with plain tensors in the place of those on the second device."""
    return tree_map_only(LazyTensor, lambda x: x.detach().held, thing)


@contextmanager
def second_device() -> Iterator[None]:
    """Inside, `lazy` can be used as a GPU would be."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    lifting = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` fills a tensor on the CPU and sends it
    optimizers = importlib.import_module("torch.optim.optimizer")
    try:
        with pytest.MonkeyPatch.context() as patch, _Factories(), _Generators():
            patch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: ["cpu", "lazy"])
            patch.setattr(torch, "Generator", Generator)
            patch.setattr(torch, "autocast", lambda kind, *a, **k: nullcontext() if kind == "lazy" else autocast(kind, *a, **k))
            patch.setattr(torch, "is_autocast_enabled", lambda *kind: kind != ("lazy",) and enabled(*kind))
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(lifting)
