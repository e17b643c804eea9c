"""`lowdim export`, `compress`, `diagnose` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowdim.errors import DataError, check_choice, check_float, check_int

__all__ = ["compress", "diagnose", "export", "report"]


def export(adapter: Path, out: Path, model: str | None, format: str, rank: int | None, task: str | None) -> None:
    """Write an adapter, or a whole run of `lowdim run`, for other tools."""
    from lowdim import models
    from lowdim.export import FORMATS
    from lowdim.export import export as write

    check_choice("--format", format, FORMATS)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder")
    name, adapted = _load(adapter, model, task)
    source = models.resolve(name)
    result = write(adapted, out, format, tokenizer=models.load_tokenizer(name), source=source, rank=rank)
    console = Console()
    if result.errors:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layer")
        table.add_column("relative error of truncating", justify="right")
        for layer, error in result.errors.items():
            table.add_row(layer, f"{error:.4f}")
        console.print(table)
        console.print("The update is not low-rank, so PEFT gets its best approximation; --format merged loses nothing.")
    else:
        console.print("exact" if format == "peft" else "merged; rounded once to the weights' dtype", highlight=False)
    console.print(f"written {out}; how to load it: {out / 'README.md'}", highlight=False, soft_wrap=True)


def _load(folder: Path, model: str | None, task: str | None) -> tuple[str, Any]:
    from lowdim import models
    from lowdim.adapters import load_adapter
    from lowdim.files import read_json
    from lowdim.train.run import load_run

    if (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file():
        adapted, recipe, _ = load_run(folder)
        return recipe.model, adapted
    about = read_json(folder / "adapter.json")
    name = model or (about.get("base_model") or {}).get("name_or_path")
    if not name:
        raise DataError(f"{folder} does not say which model it is for; name it with --model")
    saved = about.get("modules_to_save") or []
    kind = task or ("classify" if saved else "causal-lm")
    labels = 2
    if saved:
        from lowdim.files import read_tensors

        tensors, _ = read_tensors(folder / "adapter.safetensors")
        labels = next(len(t) for key, t in tensors.items() if key.startswith(saved[0] + ".") and t.ndim == 2)
    return name, load_adapter(models.load_model(name, kind, num_labels=labels), folder)


def compress(model: str, out: Path, data: list[str], method: str, param_ratio: float, samples: int, max_length: int) -> None:
    """Decompose a causal language model's or encoder's layers from its outputs on sample text."""
    check_choice("--method", method, ("lord",))
    check_float("--param-ratio", param_ratio, 0.0, 1.0, low_open=True)
    check_int("--samples", samples, 1)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder")
    import math

    from lowdim import models
    from lowdim.compress import LoRDConfig, lord
    from lowdim.files import write_json
    from lowdim.layers import densify
    from lowdim.train.metrics import metric_for
    from lowdim.train.tasks import language_modelling

    console = Console()
    tokenizer = models.load_tokenizer(model)
    task = language_modelling(tokenizer, data, max_length=max_length, limit=samples)
    loaded = models.load_model(model, "causal-lm", pad_token_id=tokenizer.pad_token_id)
    metric = metric_for("causal-lm", "perplexity")
    before = task.evaluate(loaded, task.test, metric)
    size = sum(p.numel() for p in loaded.parameters())
    batches = (batch for batch in task.sample_batches(math.ceil(len(task.train) / 8), 8, next(loaded.parameters()).device))
    small = lord(loaded, LoRDConfig(param_ratio=param_ratio), ({"input_ids": b["input_ids"]} for b in batches))
    after = task.evaluate(small, task.test, metric)
    kept = sum(p.numel() for p in small.parameters())
    console.print(f"parameters {size:,} -> {kept:,} ({kept / size:.2f} x)", highlight=False)
    console.print(f"perplexity on held-out blocks {before:.3f} -> {after:.3f}", highlight=False)
    from lowdim.files import write_tensors

    write_tensors(out / "factors.safetensors", {k: v for k, v in small.state_dict().items() if k.endswith((".A", ".B"))})
    densify(small)
    small.save_pretrained(out)  # type: ignore[operator]
    tokenizer.save_pretrained(out)
    write_json(
        out / "compression.json",
        {"method": method, "param_ratio": param_ratio, "parameters": [size, kept], "perplexity": [before, after], "data": data},
    )
    console.print(
        f"written {out}: the dense equivalent as a transformers checkpoint, and the thin factors in factors.safetensors",
        highlight=False,
        soft_wrap=True,
    )


def diagnose(diagnostic: str, base: str, tuned: str, k: int, threshold: float, out: Path | None) -> None:
    """Count intruder dimensions between two models."""
    check_choice("diagnostic", diagnostic, ("intruders",))
    from lowdim.diagnose import intruder_dimensions
    from lowdim.files import write_json

    result = intruder_dimensions(_place(base), _place(tuned), k=k, threshold=threshold)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layer", "intruders", "least similar"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for name, layer in result.layers.items():
        table.add_row(name, str(layer.count), f"{float(min(layer.similarity)):.3f}")
    console = Console()
    console.print(table)
    console.print(f"{result.total} intruder dimensions among the first {k} of {len(result.layers)} matrices", highlight=False)
    if out is not None:
        console.print(f"written {write_json(out, result.to_dict())}", highlight=False, soft_wrap=True)


def _place(name: str) -> Any:
    path = Path(name)
    if path.exists():
        return path
    from lowdim import models

    source = models.resolve(name)
    return models.load_model(name, "causal-lm") if source.gguf else Path(source.path)


def report(source: Path, out: Path | None) -> None:
    """Draw the page again."""
    from lowdim.files import read_json
    from lowdim.report import write, write_run

    candidates = [source / "comparison.json", source / "run.json"] if source.is_dir() else [source]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise DataError(f"{source} holds neither comparison.json nor run.json")
    record = read_json(found)
    target = out or found.parent / "report.html"
    (write if "methods" in record else write_run)(record, target)
    Console().print(f"written {target}", highlight=False, soft_wrap=True)
