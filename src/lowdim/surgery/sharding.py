"""FSDP2: the parameters of a model spread over the processes of a run, block by block."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

__all__ = ["shard", "units"]


def shard(model: nn.Module, mesh: Any = None, **how: Any) -> nn.Module:
    """Spread the model's parameters over the processes (`fully_shard`): each block on its own, then the rest; in place.

    Blocks are what transformers calls so (`_no_split_modules`), else the items of the model's `ModuleList`s, else its direct
    children; an input embedding that no head shares is a unit of its own, too. Weights of integers (8-bit and 4-bit bases,
    `Int8Parameter`) cannot be spread and stay whole on each process. Attach adapters and swap layers before, and build the
    optimizer after. `transformers.Trainer` takes the model as it then is.

    Args:
        mesh: of the processes; None: all of them.
        how: further options of `torch.distributed.fsdp.fully_shard`, such as `mp_policy`.

    Raises:
        RuntimeError: this process is not one of several (start it with torchrun or accelerate).

    Example:
        >>> from lowdim.surgery import shard
        >>> # torch.distributed.init_process_group("gloo"); model = shard(model)  # in each process
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    if mesh is None and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "shard needs a process group: start the script with `torchrun --nproc-per-node N` or `accelerate launch`, and call "
            "torch.distributed.init_process_group first"
        )
    whole = {p for p in model.parameters() if not p.is_floating_point()}
    given = {"mesh": mesh, "ignored_params": whole or None, **how}
    for unit in units(model):
        fully_shard(unit, **given)
    if hasattr(model, "_is_distributed_loading_by_transformers"):
        cast(Any, model)._is_distributed_loading_by_transformers = True  # its Trainer then wraps and places nothing
    fully_shard(model, **given)
    return model


def units(model: nn.Module) -> list[nn.Module]:
    """The modules that `shard` spreads one by one, inner before outer; the model itself is not among them."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [m for m in model.modules() if type(m).__name__ in names]
    found = found or [item for m in model.modules() if isinstance(m, nn.ModuleList) for item in m]
    found = found or list(model.children())
    embedding = _own_embedding(model)
    if embedding is not None and not any(embedding is part for unit in found for part in unit.modules()):
        found.append(embedding)
    return [unit for unit in reversed(found) if any(p.is_floating_point() for p in unit.parameters())]


def _own_embedding(model: nn.Module) -> nn.Module | None:
    """The input embedding, if the head has weights of its own."""
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    shared = head is not None and {id(p) for p in head.parameters()} & {id(p) for p in embedding.parameters()}
    return None if shared else embedding
