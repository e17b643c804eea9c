"""aTLAS: task vectors composed with one learned coefficient for each vector and parameter block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from lowdim.adapters.atlas.task_vectors import TaskVector
from lowdim.adapters.core.composed import Composition
from lowdim.adapters.core.whole import WholeAdapted, WholeMethod
from lowdim.errors import CheckpointError, check_float, check_int, nearest
from lowdim.linalg import gather, scaled_sum, stream, wide
from lowdim.surgery import submodule

__all__ = ["ATLAS", "ATLASAdapted"]


class Coefficients(Composition):
    """`coef (T,)`, `(T, P)` or `(T, P, K)`; task vectors stay where they are and are not in a trainer's checkpoints."""

    coef: nn.Parameter

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        vectors: Sequence[Mapping[str, Tensor]],
        method: ATLAS,
        dtype: torch.dtype | None,
    ):
        super().__init__(parameters)
        first = next(iter(parameters.values()))
        size = [len(vectors)]
        size += [len(self.names)] * method.blockwise + ([] if method.partition is None else [method.partition])
        self.coef = nn.Parameter(torch.zeros(size, dtype=dtype or first.dtype, device=first.device))
        self.blockwise, self.partition, self.wraps = method.blockwise, method.partition, method.linearized
        # block -> the tasks that have it, and their tensors
        self.tasks = [[t for t, vector in enumerate(vectors) if name in vector] for name in self.names]
        self.vectors = _Held([[vectors[t][name] for t in tasks] for name, tasks in zip(self.names, self.tasks)])
        for shape, classes in method.maps(self.shapes).items():
            self.register_buffer(_map_name(shape), classes.to(first.device), persistent=False)

    def touches(self, index: int) -> bool:
        """Whether a task vector has the block; with a partition only matrices count."""
        return bool(self.tasks[index]) and (self.partition is None or len(self.shapes[index]) == 2)

    def offset(self, index: int) -> Tensor:
        """`Σ_t c_t τ_t` of one block."""
        if not self.touches(index):
            dtype = torch.promote_types(self.coef.dtype, torch.float32)
            return torch.zeros(self.shapes[index], dtype=dtype, device=self.coef.device)
        coef = self.coef[:, index] if self.blockwise else self.coef
        tasks = self.tasks[index]
        if len(tasks) < len(coef):
            coef = torch.stack([coef[t] for t in tasks])
        classes = getattr(self, _map_name(self.shapes[index])) if self.partition else None
        return scaled_sum(coef, self.vectors.held[index], classes)

    def compose(self, index: int, base: Tensor) -> Tensor:
        """The block; if the model is linearized, the pre-trained block with the offset as its tangent."""
        if not self.wraps:
            return super().compose(index, base)
        offset = self.offset(index).to(base.device, base.dtype)
        try:
            return forward_ad.make_dual(base, offset)
        except RuntimeError as error:
            raise RuntimeError(
                "a linearized model can be called only as a whole: call the model, not one of its modules, and turn off "
                "gradient checkpointing"
            ) from error

    def around(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """`f(x; θ⁰) + J Δθ`, by one pass in forward mode."""
        with forward_ad.dual_level():
            return pytree.tree_map(_linear_part, forward(*args, **kwargs))


class _Held:
    """Tensors that are never modified: a copy of the model shares them."""

    def __init__(self, held: Any):
        self.held = held

    def __deepcopy__(self, memo: Any) -> _Held:
        return self


class ATLASAdapted(WholeAdapted):
    """Returned by `lowdim.adapt` for aTLAS."""

    composition: Coefficients
    method: ATLAS

    @property
    def coef(self) -> nn.Parameter:
        """`(T,)`, `(T, P)` or `(T, P, K)`, from zeros."""
        return self.composition.coef

    @property
    def blocks(self) -> list[str]:
        """The `P` parameter blocks, in the model's order."""
        return self.names

    def delta(self) -> dict[str, Tensor]:
        """`Δθ` of each block, float32 or better, differentiable in `coef`."""
        return self.offsets()

    optional_regularizer = True

    def regularizer(self, p: float = 2, gamma: float = 0.5) -> Tensor:
        """`gamma · mean over blocks of ‖coef[:, j]‖_p`; with `blockwise=False` the only block is the model.

        The penalty is optional, as in the paper: loops that add `regularizer()` of every adapter add it with these defaults.
        """
        check_float("p", p, 1.0)
        check_float("gamma", gamma, 0.0)
        coef = gather(self.coef)
        coef = coef[:, None] if coef.ndim == 1 else coef
        columns = coef.transpose(0, 1).flatten(1)
        return gamma * torch.linalg.vector_norm(columns, ord=p, dim=1).mean()

    def merge(self, *, keep_mask: bool = False) -> nn.Module:
        """Give the model plain parameters `θ⁰ + Δθ`, and return it.

        Args:
            keep_mask: leave 0 what was exactly 0 in a matrix or kernel before attaching.

        Raises:
            ValueError: the model is linearized, and so not a network with other parameters; or it is already merged.
        """
        if self.method.linearized:
            raise ValueError("a linearized model cannot be merged: f(x; θ⁰) + J Δθ is not f(x; θ) for any θ")
        return super().merge(keep_mask=keep_mask)


@dataclass(frozen=True)
class ATLAS(WholeMethod):
    """Task vectors composed with learned coefficients: a few numbers combine the knowledge of earlier fine-tuning runs.

    Formula: `θ_j = θ_j⁰ + Σ_t c_{t,j} τ_{t,j}` for each of the `P` parameter tensors, `τ_t` the change from fine-tuning
    on task `t`. `coef` starts at 0, the pre-trained model, and nothing else is trained. With a partition `c_{t,j,k}` is for
    the entries of class `k`, drawn once for each shape; only matrices are composed then. Linearized, the output is
    `f(x; θ⁰) + J_{θ⁰}(x) Δθ`.

    Args:
        task_vectors: for each task a mapping `name -> tensor` (see `task_vector`) or the path of a safetensors file, which is
            memory-mapped. Each stays on its device; a missing block counts as zero.
        blockwise: one coefficient for each tensor; False: one for each task.
        partition: `K`, coefficients for each tensor.
        partition_maps: shape -> int64 tensor of classes in [0, K), of that shape; others are drawn.
        linearized: compose the linear part of the model. The loss must be computed outside the model; its operations need
            forward-mode derivatives (`attn_implementation="eager"` in transformers).
        seed: of the partition.

    Raises:
        ValueError: no task vector, partition below 1 or with `blockwise=False`, a class out of range (here); a name that the
            model lacks, a shape that differs (at attach), each with the block.

    Example:
        >>> import torch, lowdim
        >>> from lowdim.adapters import ATLAS, task_vector
        >>> base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> adapted = lowdim.adapt(base, ATLAS([task_vector(base, tuned)]))
        >>> with torch.no_grad():
        ...     _ = adapted.coef.fill_(1.0)
        >>> bool(torch.allclose(base(torch.ones(1, 3)), tuned(torch.ones(1, 3))))
        True

    It only composes existing models: without fine-tuned models of the same architecture there is nothing to scale; for one
    new task with enough data use LoRA. `T` copies of the model must be held, on the CPU or in files where they do not fit the
    device.

    Source: Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", arXiv 2407.02880.
    """

    adapted_type: ClassVar[type[ATLASAdapted]] = ATLASAdapted

    task_vectors: Any
    blockwise: bool = True
    partition: int | None = None
    partition_maps: Any = None
    linearized: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        single = isinstance(self.task_vectors, (str, Path, Mapping))
        if single or not isinstance(self.task_vectors, Iterable) or not list(self.task_vectors):
            raise ValueError(f"task_vectors must be a sequence with at least one task vector; got {self.task_vectors!r:.80}")
        object.__setattr__(self, "task_vectors", tuple(TaskVector(given) for given in self.task_vectors))
        if self.partition is not None:
            check_int("partition", self.partition, 1)
            if not self.blockwise:
                raise ValueError("partition needs blockwise=True, as each of its coefficients belongs to one tensor")
        elif self.partition_maps is not None:
            raise ValueError("partition_maps needs partition, the number of classes; got partition=None")
        if self.partition_maps is not None:
            object.__setattr__(self, "partition_maps", _Maps(self.partition_maps, self.partition))

    def select(self, model: nn.Module, kept: Iterable[str] = ()) -> dict[str, nn.Parameter]:
        """Every floating point parameter, tied ones once."""
        whole = {id(p) for name in kept for p in submodule(model, name).parameters()}
        chosen = {
            name: p
            for name, p in model.named_parameters()
            if p.is_floating_point() and p.dtype.itemsize > 1 and id(p) not in whole
        }
        if not chosen:
            raise ValueError(f"{type(model).__name__} has no floating point parameter to compose")
        return chosen

    def composition(
        self, parameters: Mapping[str, Tensor], model: nn.Module, *, seed: int, dtype: torch.dtype | None, initialise: bool
    ) -> Coefficients:
        """`coef`, with the task vectors under the model's own names and in its dtypes."""
        first = {id(p): str(name) for name, p in model.named_parameters()}
        names: dict[str, str] = {
            alias: first[id(p)] for alias, p in model.named_parameters(remove_duplicate=False)
        }  # tied names too
        others = {*names, *(name for name, _ in model.named_buffers())} - set(parameters)  # heads, buffers: those of θ⁰
        vectors = []
        for task, given in enumerate(self.task_vectors):
            found: dict[str, Tensor] = {}
            for block, tensor in given.items():
                name = names[block] if block in names and block not in parameters else str(block)
                if name not in parameters and block in others:
                    continue
                if name not in parameters:
                    close = ", ".join(nearest(block, parameters))
                    raise ValueError(f"task vector {task}: the model has no parameter {block} (nearest: {close})")
                base = parameters[name]
                if tensor.shape != base.shape:
                    raise ValueError(
                        f"task vector {task}: block {block} has shape {tuple(tensor.shape)}; the model's is {tuple(base.shape)}"
                    )
                if not initialise:
                    tensor = torch.empty_like(base)
                elif given.path is None:  # tensors in a file are converted when they are read
                    tensor = tensor.to(base.dtype)
                found.setdefault(name, tensor.detach())
            vectors.append(found)
        return Coefficients(parameters, vectors, self, dtype)

    def maps(self, shapes: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """The class of each entry for each shape of a matrix, in the smallest type that holds it."""
        if self.partition is None:
            return {}
        small = torch.uint8 if self.partition <= 256 else torch.int32
        found = {}
        for shape in dict.fromkeys(shape for shape in shapes if len(shape) == 2):
            given = None if self.partition_maps is None else self.partition_maps.held.get(shape)
            if given is None:
                given = torch.randint(self.partition, shape, generator=stream(self.seed, "ATLAS", *shape))
            found[shape] = given.to(small)
        return found

    def config(self) -> dict[str, Any]:
        """The fields as JSON-able values; task vectors and maps as references (see `saved`)."""
        maps = None if self.partition_maps is None else [list(shape) for shape in self.partition_maps.held]
        return {
            "task_vectors": [vector.reference() for vector in self.task_vectors],
            "blockwise": self.blockwise,
            "partition": self.partition,
            "partition_maps": maps,
            "linearized": self.linearized,
            "seed": self.seed,
        }

    def saved(self) -> dict[str, Tensor]:
        """Task vectors that came as tensors, and maps that were given."""
        found = {}
        for task, vector in enumerate(self.task_vectors):
            if vector.path is None:
                found.update({f"task_vectors.{task}.{name}": tensor for name, tensor in vector.items()})
        for shape, classes in ({} if self.partition_maps is None else self.partition_maps.held).items():
            found[f"partition_maps.{_map_name(shape)}"] = classes
        return found

    @classmethod
    def restored(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> ATLAS:
        """The inverse of `config` and `saved`."""
        vectors = []
        for task, reference in enumerate(config["task_vectors"]):
            prefix = f"task_vectors.{task}."
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            vectors.append(TaskVector.found(reference, own, folder))
        shapes = config["partition_maps"]
        maps = None if shapes is None else {tuple(shape): tensors[f"partition_maps.{_map_name(shape)}"] for shape in shapes}
        method = cls.from_config({**config, "task_vectors": vectors, "partition_maps": maps})
        if not isinstance(method, cls):
            raise CheckpointError("not an aTLAS configuration")
        return method


class _Maps(_Held):
    """Given classes by shape, checked; equal where the numbers are equal."""

    def __init__(self, given: Any, count: Any):
        if isinstance(given, _Maps):
            given = given.held
        if not isinstance(given, Mapping):
            raise ValueError(f"partition_maps must map shapes to tensors; got {type(given).__name__}")
        for shape, classes in given.items():
            if tuple(classes.shape) != tuple(shape) or len(shape) != 2 or classes.is_floating_point():
                raise ValueError(
                    f"partition_maps[{tuple(shape)}] must be an integer matrix of that shape; got {classes.dtype} "
                    f"{tuple(classes.shape)}"
                )
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= count:
                raise ValueError(f"partition_maps: the classes of {tuple(shape)} must be in [0, {count}); got {low} to {high}")
        super().__init__({tuple(shape): classes.detach().to(torch.int64) for shape, classes in given.items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Maps) or self.held.keys() != other.held.keys():
            return False
        return all(torch.equal(classes, other.held[shape]) for shape, classes in self.held.items())

    def __repr__(self) -> str:
        return f"maps of {', '.join(map(str, self.held))}"


def _map_name(shape: Iterable[int]) -> str:
    return "classes_" + "x".join(map(str, shape))


def _linear_part(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    primal, tangent = forward_ad.unpack_dual(value)
    return primal if tangent is None else (wide(primal) + wide(tangent)).to(primal.dtype)
