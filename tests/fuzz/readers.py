"""Every way in which lowdim reads a file: how a small valid folder is made, and how it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowdim
from golden import adapters, bases, curves, runs
from lowdim.files import write_json, write_tensors
from tiny import save_bert, sentences


@dataclass(frozen=True)
class Reader:
    """One way of reading.

    Attributes:
        make: writes a valid folder.
        files: patterns of the files that are damaged.
        read: reads the folder; what it returns is compared where `sealed`.
        sealed: the files carry checksums, so that what is read is what was written, or an error.
        weight: how often, relative to the others.
        quick: whether the valid folder is made within a second.
    """

    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], Any]
    sealed: bool = False
    weight: int = 1
    quick: bool = True


def _adapter(name: str) -> Reader:
    """A stored adapter, saved again in today's format, on its base."""

    def make(folder: Path) -> None:
        adapters.load(name)[0].save(folder / "adapter")

    def read(folder: Path) -> dict[str, Tensor]:
        model, (x, _) = bases.read(adapters.CASES[name].base)
        adapted = lowdim.load_adapter(model, folder / "adapter")
        return {"y": bases.output(adapted.model, x), **_state(adapted.model)}

    return Reader(make, ("adapter/*",), read, sealed=True, weight=8)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _make_compressed(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from lowdim import compress
    from lowdim.pretrained import save_compressed

    model = AutoModelForCausalLM.from_pretrained(curves.MODELS / "llama")
    save_compressed(compress.welore(model, compress.WeLoreConfig(target=0.5)), folder)


def _read_compressed(folder: Path) -> dict[str, Tensor]:
    from lowdim import models

    model = models.load_model(str(folder), "causal-lm")
    with torch.no_grad():
        return {"y": model(torch.arange(24).view(2, 12)).logits, **_state(model)}


def _read_report(folder: Path) -> None:
    from lowdim.jobs import report

    page = report(folder, folder / "page.html")
    assert page.stat().st_size < 5_000_000
    page.unlink()


def _read_weights(folder: Path) -> int:
    from lowdim.diagnose.core.weights import weights_of

    weights = weights_of(folder)
    return sum(weights[name].numel() for name in weights)


def _make_sharded(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    names = {f"layer.{index}.weight": f"part-{index}.safetensors" for index in range(2)}
    for name, file in names.items():
        write_tensors(folder / file, {name: torch.randn(6, 4, generator=draw)})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 192}, "weight_map": names})
    write_json(folder / "config.json", {"model_type": "llama"})


def _read_folder(folder: Path) -> None:
    from lowdim import models

    models.load_config(str(folder))
    models.load_tokenizer(str(folder))("the film was good")
    models.load_model(str(folder), "classify")


def _read_recipe(folder: Path) -> None:
    from lowdim.train.recipes import load_recipe

    load_recipe(folder / "recipe.yaml")


def _make_recipe(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(
        "model: stories260k\ntask: causal-lm\nmethod: lora\noptions: {rank: 8, target_modules: [q_proj, v_proj]}\n"
        "data: &d [lowdim:shakespeare]\nlr: 1e-3\nsteps: 10\nschedule: cosine\nbf16: false\nout: run\n"
    )


def _make_data(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": text, "label": label} for text, label in sentences(12)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.json").write_text(json.dumps(rows))
    lines = [f'"{row["text"]}",{row["label"]}' for row in rows]
    (folder / "c.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (folder / "d.tsv").write_text("text\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in rows))
    (folder / "e.txt").write_text("".join(f"__label__{row['label']} {row['text']}\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "f.parquet")


def _read_data(folder: Path) -> None:
    """The files that differ from their whole copies: all files together would hide an error behind that of another."""
    from lowdim.train.data import read_examples, read_texts

    whole = folder / ".whole"
    changed = [p for p in sorted(folder.iterdir()) if p.is_file() and p.read_bytes() != (whole / p.name).read_bytes()]
    for path in changed:
        try:
            read_examples([path])
        finally:
            read_texts([path])


def _make_with_whole(folder: Path) -> None:
    _make_data(folder)
    (folder / ".whole").mkdir()
    for path in folder.iterdir():
        if path.is_file():
            shutil.copy(path, folder / ".whole")


def _make_checkpoint(folder: Path) -> None:
    with curves.workplace() as place:
        curves.run({"model": "small", "method": "lamda", "save_steps": 4}, "out")
        newest = max((place / "out" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        shutil.copytree(newest, folder / newest.name)


def _read_checkpoint(folder: Path) -> dict[str, Tensor]:
    from lowdim.errors import CheckpointError
    from lowdim.train.checkpoints import newest_checkpoint

    newest = newest_checkpoint(folder)
    if newest is None:
        raise CheckpointError("it does not count as complete, so training begins anew")
    return load_file(Path(newest) / "model.safetensors")


def _make_compared_run(folder: Path) -> None:
    with curves.workplace() as place:
        runs.compare(resume=False)
        for method in ("linear-probe", "svfit"):
            shutil.copytree(place / "out" / "runs" / method / "seed-0", folder / method)


def _read_compared_run(folder: Path) -> dict[str, Tensor]:
    from lowdim import models
    from lowdim.comparison.winner import restore

    found = {}
    for method in ("linear-probe", "svfit"):
        model = models.load_model(str(curves.MODELS / "bert"), "classify")
        whole = restore(SimpleNamespace(model=model, scratch=False), folder / method)  # type: ignore[arg-type]
        found |= {f"{method}.{key}": value for key, value in _state(getattr(whole, "model", whole)).items()}
    return found


def _read_peft(folder: Path) -> dict[str, Tensor]:
    model, (x, _) = bases.read(adapters.CASES["lora"].base)
    return {"y": bases.output(lowdim.load_adapter(model, folder / "peft").model, x)}


READERS = {
    "adapter": _adapter("lora"),
    "adapter of shared parts": _adapter("randlora-sparse"),
    "adapter with a schedule": _adapter("lamda"),
    "adapter of gates": _adapter("sora"),
    "PEFT adapter": Reader(
        lambda folder: adapters.load("lora")[0].export(folder / "peft"),
        ("peft/*.json", "peft/*.safetensors"),
        _read_peft,
        weight=2,
    ),
    "checkpoint": Reader(_make_checkpoint, ("*/*",), _read_checkpoint, sealed=True, weight=2, quick=False),
    "run of a comparison": Reader(_make_compared_run, ("*/*", "*/adapter/*"), _read_compared_run, sealed=True, quick=False),
    "compressed model": Reader(_make_compressed, ("*.safetensors",), _read_compressed, sealed=True),
    "page of a comparison": Reader(
        lambda folder: shutil.copy(runs.COMPARISON / "comparison.json", folder), ("comparison.json",), _read_report, weight=2
    ),
    "page of a run": Reader(
        lambda folder: shutil.copy(runs.FOLDER / "lora" / "run.json", folder), ("run.json",), _read_report, weight=2
    ),
    "weights of a diagnosis": Reader(_make_sharded, ("*.safetensors", "*.json"), _read_weights, weight=8),
    "model folder": Reader(save_bert, ("*.json",), _read_folder),
    "recipe": Reader(_make_recipe, ("recipe.yaml",), _read_recipe, weight=4),
    "data": Reader(_make_with_whole, ("*.jsonl", "*.json", "*.csv", "*.tsv", "*.txt", "*.parquet"), _read_data, weight=8),
}
