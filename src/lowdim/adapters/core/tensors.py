"""The tensors of an adapted model by their names in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lowdim.surgery import plain_name, submodule

__all__ = ["UPDATE", "below", "by_layer", "kept_tensors", "load_kept"]

#: Between a layer's name and that of a tensor of its update.
UPDATE = ".update."


def kept_tensors(model: nn.Module, module: str) -> dict[str, Tensor]:
    """The tensors of a module that is saved whole.

    Raises:
        ValueError: its state holds something else.
    """
    saved = {plain_name(key): value for key, value in submodule(model, module).state_dict().items()}
    odd = [key for key, value in saved.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(
            f"module {module} cannot be saved whole: {odd[0]} of its state is a {type(saved[odd[0]]).__name__}; adapter "
            "files hold tensors only; name its parts in modules_to_save instead"
        )
    return saved


def load_kept(model: nn.Module, module: str, state: Mapping[str, Tensor]) -> None:
    """Load the tensors of a module that was saved whole, by their plain names."""
    found = submodule(model, module)
    names = {plain_name(key): key for key in found.state_dict()}
    found.load_state_dict({names.get(key, key): value for key, value in state.items()})


def by_layer(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of each layer's update in a checkpoint, under the names that they have in the update."""
    own: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in state.items():
        start = key.find(UPDATE)
        while start >= 0:  # a module of the user's may be called `update`, so the first one need not be ours
            if key[:start] in own:
                own[key[:start]][key[start + len(UPDATE) :]] = value
                break
            start = key.find(UPDATE, start + 1)
    return own


def below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
