"""Sentence encoders as sentence-transformers has them: by folder, built-in name or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowdim.errors import MissingExtraError
from lowdim.files import read_json_object, write_json
from lowdim.models.configurations import encoder_options, load_config
from lowdim.models.sources import Source, quiet, resolve

__all__ = ["draw_weights", "load_sentence_encoder", "without_pooler"]


def load_sentence_encoder(name: str, *, device: str | None = None, pooler: bool = True) -> Any:
    """The `SentenceTransformer` of a name; a folder of transformers alone gets mean pooling, as sentence-transformers does.

    Code that a folder holds never runs.

    Args:
        pooler: whether to load BERT's pooler, which sentence-transformers never runs.

    Raises:
        UnknownNameError: no such model, or one that cannot be read.
        MissingExtraError: sentence-transformers, or the package that holds the model, is not installed.
    """
    folder = Path(name).expanduser()
    source = Source(str(folder), folder.resolve().name) if (folder / "modules.json").is_file() else resolve(name)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "embed", f"the sentence encoder {source.label}") from error
    options: dict[str, Any] = {key: value for key, value in source.options.items() if key == "local_files_only"}
    try:
        with quiet():
            if not pooler and (given := encoder_options(load_config(name))):
                options["model_kwargs"] = given
            return SentenceTransformer(source.path, device=device, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        raise source.failure(name, "no sentence encoder could be read", error) from error


def draw_weights(encoder: Any, seed: int) -> None:
    """Give the transformer of a sentence encoder, in place, weights that are drawn from the seed."""
    import torch

    inner = encoder[0].auto_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = type(inner)(inner.config).state_dict()
    inner.load_state_dict({key: drawn[key] for key in inner.state_dict()})


def without_pooler(model: Any, folder: Path) -> None:
    """Let a written folder of a model without a pooler load without one, which would be random."""
    file = folder / "sentence_bert_config.json"
    if getattr(model[0].auto_model, "pooler", True) is None and file.is_file():
        found = read_json_object(file)
        write_json(file, {**found, "model_kwargs": {**(found.get("model_kwargs") or {}), "add_pooling_layer": False}})
