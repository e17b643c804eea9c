"""A LoRA folder of PEFT's, in and out again: how exact each way is, and how long it takes.

    python bench/peft_roundtrip.py [--layers 30] [--rank 16] [--runs 5] [--out results/peft-roundtrip.json]

PEFT writes an adapter of every linear layer for a model of SmolLM2-135M's shape with random weights. lowdim reads it, merges
it, writes it for PEFT again, and cuts it to half the rank; PEFT loads what was written. Errors are of the logits of four texts
of 32 random tokens: `‖got − want‖ / ‖want − untouched‖`, so that 1 means that the adapter's whole effect is lost. `cut` also
gives the errors of the updates themselves, as lowdim states them, and beside them as recomputed from dense matrices by PEFT's
own `get_delta_weight`, and by the singular values that were left out. `--runs` imports are timed, by the clock and of the
processor: on a busy machine only the latter says much.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowdim

#: SmolLM2-135M's shape.
SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
#: Name -> options of PEFT's LoraConfig, and the dtype of the base.
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "plain": ({}, torch.float32),
    "rank-stabilised, with patterns": (
        {"use_rslora": True, "rank_pattern": {"down_proj": 8}, "alpha_pattern": {"q_proj": 4}},
        torch.float32,
    ),
    "plain, bfloat16 base": ({}, torch.bfloat16),
}
#: Layers whose cut is recomputed from dense matrices.
CHECKED = 7


def written(base: nn.Module, folder: Path, rank: int, options: dict[str, Any]) -> Any:
    """PEFT's model with an adapter whose update is as large as a short training makes it, saved to a folder."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # columns fall off, as those of trained factors do
                fall = torch.linspace(1.0, 0.05, parameter.shape[1])
                parameter.copy_(0.02 * fall * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits.double()


def timed(call: Callable[[Any], Any], make: Callable[[], Any] = lambda: None, runs: int = 1) -> tuple[dict[str, float], Any]:
    """The median time of `call(make())`, without that of `make`, by the clock and of the processor, and the last result."""
    spent: list[tuple[float, float]] = []
    result = None
    for _ in range(runs):
        given = make()
        begun = time.perf_counter(), time.process_time()
        result = call(given)
        spent.append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    clock, processor = (round(statistics.median(column), 3) for column in zip(*spent))
    return {"clock": clock, "processor": processor}, result


def measure(base: nn.Module, ids: Tensor, rank: int, options: dict[str, Any], runs: int) -> dict[str, Any]:
    def bare() -> nn.Module:
        return copy.deepcopy(base)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        untouched = logits(base, ids)
        theirs = written(bare(), folder / "peft", rank, options)
        want = logits(theirs, ids)
        effect = float(torch.linalg.vector_norm(want - untouched))

        def error(got: Tensor, wanted: Tensor = want) -> float:
            return float(torch.linalg.vector_norm(got - wanted)) / effect

        def in_peft(name: str) -> Any:
            return peft.PeftModel.from_pretrained(bare(), str(folder / name))

        seconds_in, adapted = timed(lambda model: lowdim.load_adapter(model, folder / "peft"), bare, runs)
        seconds_peft, _ = timed(lambda model: peft.PeftModel.from_pretrained(model, str(folder / "peft")), bare, runs)
        errors = {"in": error(logits(adapted.model, ids))}
        seconds = {"import": seconds_in, "import_by_peft": seconds_peft}
        seconds["export"], out = timed(lambda _: adapted.export(folder / "out"))
        errors["out, in PEFT again"] = error(logits(in_peft("out"), ids))
        seconds["cut"], cut = timed(lambda _: adapted.export(folder / "cut", rank=rank // 2))
        loaded = in_peft("cut")
        of_cut = logits(loaded, ids)
        again = lowdim.load_adapter(bare(), folder / "cut")
        errors["cut, in again"] = error(logits(again.model, ids), of_cut)
        seconds["merge"], merged = timed(lambda _: again.merge())
        errors["cut and merged"] = error(logits(merged, ids), of_cut)
        errors["cut and merged by PEFT"] = error(logits(in_peft("cut").merge_and_unload(), ids), of_cut)
        errors["merged"] = error(logits(adapted.merge(), ids))
        errors["merged by PEFT"] = error(logits(in_peft("peft").merge_and_unload(), ids))
        return {
            "effect_of_the_adapter": effect / float(torch.linalg.vector_norm(untouched)),
            "trained_numbers": sum(p.numel() for name, p in theirs.named_parameters() if "lora_" in name),
            "layers": len(cut.ranks),
            "exact": out.exact,
            "seconds": seconds,
            "errors_of_logits": {name: float(f"{value:.3g}") for name, value in errors.items()},
            "cut": {
                "rank": rank // 2,
                "error_of_logits": round(error(of_cut), 4),
                "error_of_updates": {
                    "smallest": round(min(cut.errors.values()), 4),
                    "mean": round(statistics.mean(cut.errors.values()), 4),
                    "largest": round(max(cut.errors.values()), 4),
                },
                "checked": checks(theirs, loaded, cut),
            },
        }


def checks(whole: Any, cut: Any, told: Any) -> list[dict[str, Any]]:
    """The error of some layers' updates: as stated, from dense matrices, and of the best approximation."""
    rows = []
    for name in list(told.errors)[:CHECKED]:
        before, after = (m.base_model.model.get_submodule(name).get_delta_weight("default").double() for m in (whole, cut))
        values = torch.linalg.svdvals(before)
        rows.append(
            {
                "layer": name,
                "rank": told.ranks[name],
                "whole_rank": told.whole_ranks[name],
                "stated": round(told.errors[name], 6),
                "recomputed": round(float((after - before).norm() / before.norm()), 6),
                "best": round(float(values[told.ranks[name] :].norm() / values.norm()), 6),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=options.layers, **SHAPE)).eval()
    ids = torch.randint(0, SHAPE["vocab_size"], (4, 32), generator=torch.Generator().manual_seed(0))
    cases = []
    for name, (how, dtype) in CASES.items():
        found = measure(copy.deepcopy(base).to(dtype), ids, options.rank, how, options.runs)
        cases.append({"case": name, "dtype": str(dtype).removeprefix("torch."), **found})
        print(json.dumps(cases[-1], indent=1), flush=True)
    record = {
        "command": "python bench/peft_roundtrip.py",
        "base": f"SmolLM2-135M's shape, {options.layers} layers, random weights",
        "rank": options.rank,
        "runs": options.runs,
        "parameters": sum(p.numel() for p in base.parameters()),
        "cases": cases,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": round(os.getloadavg()[0], 1),
        },
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
