"""`lowdim export`, `compress`, `diagnose` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lowdim.errors import CheckpointError, DataError, LowdimError, check_choice, check_float, check_int

__all__ = ["compress", "diagnose", "export", "report"]


def export(
    adapter: Path,
    out: Path,
    model: str | None,
    format: str,
    rank: int | None,
    task: str | None,
    target: str | None,
    max_error: float | None,
) -> None:
    """Write an adapter, or a whole run of `lowdim run`, for other tools."""
    from lowdim import models
    from lowdim.adapters.peft_targets import TARGETS, rank_limit
    from lowdim.export import FORMATS
    from lowdim.export import export as write

    check_choice("--format", format, FORMATS)
    if target is not None:
        check_choice("--for", target, TARGETS)
    _check_free(out)
    name, adapted = _load(adapter, model, task, format)
    source = models.resolve(name)
    tokenizer = models.load_tokenizer(name)
    result = write(adapted, out, format, tokenizer=tokenizer, source=source, rank=rank, max_error=max_error, target=target)
    console = Console()
    if result.errors:
        _show_errors(console, result, rank_limit(target))
    else:
        console.print("exact" if format == "peft" else "merged; rounded once to the weights' dtype", highlight=False)
    for note in result.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"written {out}; how to load it: {out / 'README.md'}", highlight=False, markup=False, soft_wrap=True)


def _show_errors(console: Console, result: Any, limit: int | None) -> None:
    """What truncating cost, layer by layer, and which rank would cost next to nothing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer")
    table.add_column("rank", justify="right")
    table.add_column("relative error of truncating", justify="right")
    for layer, rank in result.ranks.items():
        table.add_row(escape(layer), str(rank), f"{result.errors.get(layer, 0.0):.4f}")
    console.print(table)
    wanted, lines = result.suggested_rank, []
    if max(result.errors.values()) > 0.01:
        if wanted is None:
            lines.append("--max-error 0.01 finds the ranks with an error of 1 % or less.")
        elif limit is not None and wanted > limit:
            lines.append(f"An error of 1 % or less takes rank {wanted}, above the {limit} that it loads.")
        else:
            lines.append(f"--rank {wanted} would bring every layer to an error of 1 % or less.")
    lines.append("The update is not low-rank, so PEFT gets its best approximation; --format merged loses nothing.")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; name another folder")


def _load(folder: Path, model: str | None, task: str | None, format: str) -> tuple[str, Any]:
    from lowdim import models
    from lowdim.adapters import load_adapter
    from lowdim.train.run import load_run

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; name one that `lowdim run` or `adapted.save` wrote")
    if (folder / "run.json").is_file() and (folder / "recipe.yaml").is_file():
        adapted, recipe, _ = load_run(folder)
        if format == "peft" and not recipe.pretrained:
            raise ValueError(f"{folder} started from random weights, which no other tool has; export it with --format merged")
        return recipe.model, adapted
    if (folder / "adapter").is_dir():  # a run of a comparison
        folder = folder / "adapter"
    about, labels = _description(folder)
    name = model or (about.get("base_model") or {}).get("name_or_path")
    if not name:
        raise DataError(f"{folder} does not say which model it is for; name it with --model")
    kind = task or ("classify" if labels else "causal-lm")
    pad = models.load_tokenizer(name).pad_token_id
    return name, load_adapter(models.load_model(name, kind, num_labels=labels or 2, pad_token_id=pad), folder)


def _description(folder: Path) -> tuple[dict[str, Any], int]:
    """What an adapter's file says of itself, and how many classes the head in it tells apart (0 without one)."""
    import json

    from lowdim.files import read_tensors
    from lowdim.surgery import HEAD_NAMES

    file = folder / "adapter.safetensors"
    if not file.is_file() and (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{folder} holds a PEFT adapter already; load it with peft.PeftModel.from_pretrained")
    tensors, metadata = read_tensors(file)
    try:
        about = json.loads(metadata["lowdim"])
        heads = tuple(f"{name}." for name in about["modules_to_save"] if name.rpartition(".")[2] in HEAD_NAMES)
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file} was not written by lowdim (no description in its header)") from None
    sizes = [len(t) for key, t in sorted(tensors.items()) if t.ndim == 2 and heads and key.startswith(heads)]
    return about, sizes[-1] if sizes else 0  # the last matrix of a head gives the logits


def compress(
    model: str,
    out: Path,
    data: list[str],
    method: str,
    param_ratio: float | None,
    target: float | None,
    threshold: float | None,
    tune_steps: int | None,
    lr: float | None,
    samples: int | None,
    max_length: int,
) -> None:
    """Make a causal language model's layers low-rank, by their outputs on sample text (lord) or by their weights (welore)."""
    check_choice("--method", method, ("lord", "welore"))
    tuned = {"--tune-steps": tune_steps, "--lr": lr}
    _check_options(
        method, {"lord": {"--param-ratio": param_ratio}, "welore": {"--target": target, "--threshold": threshold, **tuned}}
    )
    param_ratio = 0.7 if param_ratio is None else param_ratio
    check_float("--param-ratio", param_ratio, 0.0, 1.0, low_open=True)
    if target is not None and threshold is not None:
        raise ValueError(
            f"--target {target:g} and --threshold {threshold:g} exclude each other: the threshold follows from the target"
        )
    target = 0.5 if target is None else target
    check_float("--target", target, 0.0, 1.0, low_open=True, high_open=True)
    if threshold is not None:
        check_float("--threshold", threshold, 0.0, 1.0)
    _check_tuning(method, tune_steps, lr, samples)
    check_int("--max-length", max_length, 4)
    _check_free(out)
    import math

    from lowdim import models
    from lowdim.compress import LoRDConfig, WeLoreConfig, lord, welore
    from lowdim.train.metrics import metric_for
    from lowdim.train.tasks import language_modelling

    console = Console()
    tokenizer = models.load_tokenizer(model)
    limit = 200 if samples is None and method == "lord" else samples
    task = language_modelling(tokenizer, data, max_length=max_length, most=models.longest_text(model), limit=limit)
    loaded = models.load_model(model, "causal-lm", pad_token_id=tokenizer.pad_token_id)
    metric = metric_for("causal-lm", "perplexity")
    perplexity = [task.evaluate(loaded, task.test, metric)]
    size = sum(p.numel() for p in loaded.parameters())
    record: dict[str, Any] = {"method": method}
    if method == "lord":
        batches = (batch for batch in task.sample_batches(math.ceil(len(task.train) / 8), 8, next(loaded.parameters()).device))
        small = lord(loaded, LoRDConfig(param_ratio=param_ratio), ({"input_ids": b["input_ids"]} for b in batches))
        record["param_ratio"] = param_ratio
    else:
        config = WeLoreConfig(target=target) if threshold is None else WeLoreConfig(threshold=threshold)
        small = welore(loaded, config)
        record |= _found(small, console, None if threshold is not None else target)
    perplexity.append(task.evaluate(small, task.test, metric))
    kept = sum(p.numel() for p in small.parameters())
    console.print(f"parameters {size:,} -> {kept:,} ({kept / size:.2f} x)", highlight=False)
    if tune_steps is not None:
        record |= _tune(small, task, tune_steps, 5e-5 if lr is None else lr)
        perplexity.append(task.evaluate(small, task.test, metric))
    steps = " -> ".join(f"{value:.3f}" for value in perplexity)
    console.print(f"perplexity on held-out blocks {steps}{' (tuned)' if len(perplexity) > 2 else ''}", highlight=False)
    record |= {"parameters": [size, kept], "perplexity": perplexity, "data": data}
    _write_small(small, tokenizer, record, out)
    console.print(
        f"written {out}: the dense equivalent as a transformers checkpoint, and the thin factors in factors.safetensors",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _check_options(method: str, own: dict[str, dict[str, Any]]) -> None:
    """Refuse what belongs to another method, rather than ignore it."""
    for other, options in own.items():
        foreign = [name for name, value in options.items() if value is not None]
        if other != method and foreign:
            takes = ", ".join(own[method])
            raise ValueError(f"only --method {other} has {', '.join(foreign)}; --method {method} takes {takes}")


def _check_tuning(method: str, steps: int | None, lr: float | None, samples: int | None) -> None:
    if samples is not None:
        check_int("--samples", samples, 1)
    if steps is not None:
        check_int("--tune-steps", steps, 1)
    if lr is not None:
        check_float("--lr", lr, 0.0, low_open=True)
    idle = {"--lr": lr is not None, "--samples": samples is not None and method == "welore"}
    if steps is None and any(idle.values()):
        names = [name for name, given in idle.items() if given]
        raise ValueError(f"{', '.join(names)}: only tuning uses it; add --tune-steps (welore looks at weights, not at data)")


def _found(small: Any, console: Console, target: float | None) -> dict[str, Any]:
    """Say which threshold and components WeLore found; the same for the record."""
    from lowdim.compress import last_report

    found, details = small.welore_report, last_report(small).details
    components = {name: rank for name, (kind, rank) in found["layers"].items() if kind == "lrc"}
    console.print(
        f"threshold {found['threshold']:g}: {len(components)} of {len(found['layers'])} matrices are low-rank components; "
        f"{details['reduction_in_components']:.3f} of all ranks are cut ({details['reduction']:.3f} by the rule)",
        highlight=False,
        soft_wrap=True,
    )
    return {"target": target, "threshold": found["threshold"], "ranks": components}


def _tune(small: Any, task: Any, steps: int, lr: float) -> dict[str, Any]:
    """Train the factors of the low-rank components, and nothing else."""
    import tempfile

    import torch

    from lowdim.catalogue import variant
    from lowdim.compress import welore_freeze
    from lowdim.strategies import Applied
    from lowdim.train.loop import FitSettings, fit

    parameters = welore_freeze(small)
    applied = Applied(small, "full", variant("full"), lambda rate: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0))
    with tempfile.TemporaryDirectory() as folder:
        result = fit(applied, task, FitSettings(steps=steps, lr=lr, schedule="cosine"), Path(folder))
    if result.failure:
        raise LowdimError(f"{result.failure}; try a smaller --lr than {lr:g}. Nothing was written")
    return {"tune_steps": steps, "lr": lr, "trained": applied.trained(), "losses": result.losses}


def _write_small(small: Any, tokenizer: Any, record: dict[str, Any], out: Path) -> None:
    from lowdim import models
    from lowdim.files import whole_folder, write_json, write_tensors
    from lowdim.layers import densify

    factors = {key: value for key, value in small.state_dict().items() if key.endswith((".A", ".B"))}
    densify(small)
    with whole_folder(out) as draft, models.quiet():
        write_tensors(draft / "factors.safetensors", factors)
        small.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        write_json(draft / "compression.json", record)


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
        table.add_row(escape(name), str(layer.count), f"{float(min(layer.similarity)):.3f}")
    console = Console()
    console.print(table)
    console.print(f"{result.total} intruder dimensions among the first {k} of {len(result.layers)} matrices", highlight=False)
    if out is not None:
        console.print(f"written {write_json(out, result.to_dict())}", highlight=False, markup=False, soft_wrap=True)


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
    if not isinstance(record, dict) or not {"methods", "losses", "failure"} & set(record):
        raise CheckpointError(f"{found} is no record of `lowdim compare` or `lowdim run`")
    target = out or found.parent / "report.html"
    (write if "methods" in record else write_run)(record, target)
    Console().print(f"written {target}", highlight=False, markup=False, soft_wrap=True)
