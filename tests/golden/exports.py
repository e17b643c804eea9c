"""Golden files for other tools, and what several adapters give together: PEFT adapters, compressed checkpoints, a diagnosis."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from golden import adapters, bases, curves

FOLDER = bases.FILES / "exports"

#: Golden adapters that are written for PEFT, with the options of that.
PEFT: dict[str, dict[str, Any]] = {
    "block-lora": {},
    "lamda": {},
    "lora": {},
    "lora-conv2d": {},
    "lora-embedding": {},
    "lora-stabilized": {},
    "randlora-sparse": {},  # PEFT has the method itself
    "sora": {},
}


def export(name: str, folder: Path) -> Any:
    """Write a golden adapter for PEFT."""
    return adapters.load(name)[0].export(folder, **PEFT[name])


def write_peft(name: str) -> None:
    """Store what is written, and what it lost."""
    result = export(name, FOLDER / "peft" / name)
    (FOLDER / "peft" / name / "errors.json").write_text(json.dumps(result.errors, indent=1) + "\n", encoding="utf-8")


def together() -> dict[str, Tensor]:
    """What golden adapters on one model answer: one by one, weighed, by row of the batch, combined and merged."""
    from lowdim.adapters import AdapterSet

    model, (x, _) = bases.read("blocks")
    chosen = AdapterSet(model)
    names = ("lora", "lamda", "sora", "svfit", "s2ft")
    for name in names:
        chosen.add(name, adapters.FOLDER / name)
    found = {}
    for name in names:
        chosen.activate(name)
        found[name] = bases.output(model, x)
    chosen.activate(lora=0.7, lamda=-0.4, svfit=1.1)
    found["weighed"] = bases.output(model, x)
    with chosen.disabled():
        found["disabled"] = bases.output(model, x)
    with chosen.rows([*names, None, *names[::-1][:4]]):
        found["rows"] = bases.output(model, x)
    chosen.combine("both", {"lora": 0.5, "sora": 0.5}, rank=3)
    chosen.activate("both")
    found["combined"] = bases.output(model, x)
    chosen.activate(lora=0.7, s2ft=0.5)
    chosen.merge()
    found["merged"] = bases.output(model, x)
    return found


def logits(folder: Path) -> Tensor:
    """What a checkpoint answers, as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


def compressed(method: str) -> dict[str, Tensor]:
    """The logits of the small Llama after `compress.lord` and `compress.welore`."""
    from transformers import AutoModelForCausalLM

    from lowdim import compress

    model = AutoModelForCausalLM.from_pretrained(curves.MODELS / "llama")
    ids = torch.arange(24).view(2, 12)
    if method == "lord":
        sample = [{"input_ids": (torch.arange(288).view(24, 12) * step) % 24} for step in (5, 7)]
        small = compress.lord(model, compress.LoRDConfig(param_ratio=0.6), sample)
    else:
        small = compress.welore(model, compress.WeLoreConfig(target=0.5))
    count = sum(p.numel() for p in small.parameters())
    with torch.no_grad():
        return {"logits": small(ids).logits, "parameters": torch.tensor(count)}


def write_compressed(method: str) -> None:
    """Store the dense folder of `lowdim compress`, what it answers, and what the function itself gives."""
    from lowdim.cli import main

    folder = FOLDER / "compressed" / method
    with curves.workplace() as place:
        try:
            main(
                [
                    *[
                        "compress",
                        "--dense",
                        "--model",
                        "llama",
                        "--data",
                        "text.txt",
                        "--max-length",
                        "12",
                        "--out",
                        "out",
                        "--method",
                    ],
                    method,
                ]
            )
        except SystemExit as end:
            if end.code:
                raise
        shutil.copytree(place / "out", folder)
    expected = {"folder": logits(folder), **compressed(method)}
    save_file(expected, folder / "expected.safetensors")


def read_compressed(method: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the stored folder and the function give now, and what they must give."""
    folder = FOLDER / "compressed" / method
    return {"folder": logits(folder), **compressed(method)}, load_file(folder / "expected.safetensors")


def intruders() -> dict[str, Any]:
    """The record of `lowdim diagnose intruders` for a base and a golden adapter that is merged into it."""
    from lowdim.diagnose import intruder_dimensions

    base, _ = bases.read("blocks")
    tuned = adapters.load("lora")[0].merge()
    return intruder_dimensions(base, tuned, k=4, threshold=0.7).to_dict()


def write_others(name: str) -> None:
    """Store what several adapters give together, or a diagnosis."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if name == "together.safetensors":
        save_file(together(), FOLDER / name)
    else:
        (FOLDER / name).write_text(json.dumps(intruders(), indent=1) + "\n", encoding="utf-8")
