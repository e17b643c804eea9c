"""`lowdim compress`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lowdim.cli.options import MODEL_HELP, Pairs, print_line

__all__ = ["compress"]


def compress(
    model: Annotated[str | None, typer.Option("--model", help=MODEL_HELP)] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the smaller model.")] = None,
    data: Annotated[list[str] | None, typer.Option("--data", help="Text from the model's domain; repeatable.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Name of the text column.")] = None,
    method: Annotated[str, typer.Option("--method", help="A name of `lowdim list compress`.")] = "lord",
    option: Pairs = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="0.5x of the dense model, or 60MiB: finds ranks, sparsities, cache ranks by layer."),
    ] = None,
    ratios: Annotated[
        str | None, typer.Option("--ratios", help="farms: the share left out of each layer from FARMS (wina); or uniform.")
    ] = None,
    param_ratio: Annotated[float | None, typer.Option("--param-ratio", help="Same as --option param_ratio=…")] = None,
    target: Annotated[float | None, typer.Option("--target", help="Same as --option target=…")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Same as --option threshold=…")] = None,
    tune_steps: Annotated[int | None, typer.Option("--tune-steps", help="Then train what stays trainable.")] = None,
    stage: Annotated[int | None, typer.Option("--stage", help="Steps in which the dense model teaches the small one.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of --tune-steps or --stage (5e-5).")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Sequences that the method looks at (200) or is tuned on (all).")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens in a sequence.")] = 128,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write the dense equivalent, of full size, which loads without lowdim.")
    ] = False,
    steps: Annotated[
        Path | None, typer.Option("--steps", help="A recipe of several steps (YAML), each measured; with --out at most.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="With --steps: go on after the last finished step.")] = False,
    check: Annotated[bool, typer.Option("--check", help="With --steps: only check the recipe and print it filled in.")] = False,
) -> None:
    """Shrink a trained model, and report the loss of quality. `lowdim list METHOD` shows a method's own options."""
    console = Console()
    if steps is not None:
        given = {"--model": model, "--data": data, "--text": text, "--option": option, "--budget": budget}
        given |= {"--param-ratio": param_ratio, "--target": target, "--threshold": threshold, "--tune-steps": tune_steps}
        given |= {"--ratios": ratios, "--stage": stage, "--lr": lr, "--samples": samples, "--dense": dense or None}
        _pipeline(steps, given, out, resume, check, console)
        return
    if resume or check:
        raise ValueError(f"{'--resume' if resume else '--check'} is for a recipe of several steps: add --steps FILE")
    missing = [name for name, value in (("--model", model), ("--data", data), ("--out", out)) if not value]
    if model is None or out is None or not data:
        raise ValueError(f"{', '.join(missing)} missing; or --steps FILE for a recipe of several steps")
    from lowdim.jobs import CompressSettings
    from lowdim.jobs import compress as run

    spelled = {"param_ratio": param_ratio, "target": target, "threshold": threshold}
    settings = CompressSettings(
        model=model, data=tuple(data), text=text, out=out, method=method, options=_options(method, option, spelled),
        budget=budget, ratios=ratios or "uniform",
        tune_steps=tune_steps, stage_steps=stage, lr=lr, samples=samples, max_length=max_length, dense=dense,
    )  # fmt: skip
    show = partial(print_line, console)
    outcome = run(settings, say=show, tell=show)
    details = ", ".join(f"{name} {value:g}" for name, value in outcome.report.details.items() if isinstance(value, float))
    print_line(console, f"{outcome.summary}{f'; {details}' if details else ''}")
    loads = "transformers loads it after `import lowdim`"
    if dense:
        loads = "transformers loads it; the thin factors are in factors.safetensors"
    print_line(console, f"written {out}: {loads}")


def _pipeline(steps: Path, given: dict[str, Any], out: Path | None, resume: bool, check: bool, console: Console) -> None:
    """The steps of a recipe."""
    strange = [name for name, value in given.items() if value is not None]
    if strange:
        raise ValueError(f"{', '.join(strange)}: the recipe of --steps says this; leave out one or the other")
    import yaml

    from lowdim.comparison.runner import quote
    from lowdim.pipeline import load_pipeline, run_pipeline

    recipe = load_pipeline(steps, out=None if out is None else str(out))
    if check:
        print_line(console, yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True).rstrip())
        return
    run_pipeline(recipe, resume=resume, command=quote(sys.argv[1:]), say=partial(print_line, console))
    folder = Path(recipe.out)
    print_line(console, f"written {folder}, with pipeline.json and report.html")


def _options(method: str, pairs: list[str] | None, spelled: dict[str, Any]) -> dict[str, Any]:
    """Options with their own flag, and the others."""
    from lowdim.jobs import parse_options

    flags = [f"{name}={value!r}" for name, value in spelled.items() if value is not None]
    return parse_options(method, [*flags, *(pairs or ())])
