"""`lowdim list | plan | run | compare | compress | diagnose | export | report | reproduce`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lowdim import __version__
from lowdim.cli.errors import clear_errors, short_warnings

__all__ = ["app", "main"]

app = typer.Typer(
    name="lowdim",
    help="Train, adapt, compress and explain neural networks in few dimensions.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
)

_Model = Annotated[str, typer.Option("--model", help="A folder, a hub id, or minilm, stories260k, smollm2-135m, llama-7b.")]
_Methods = Annotated[str, typer.Option("--methods", help="Names, families (adapters, optim, layers) or all, with commas.")]


def _version(show: bool) -> None:
    if show:
        typer.echo(f"lowdim {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train, adapt, compress and explain neural networks in few dimensions."""


@app.command("list")
def list_systems(
    family: Annotated[str | None, typer.Argument(help="Only this family.")] = None,
    available: Annotated[bool, typer.Option("--available", help="Only what works today.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """The catalogue: sixty systems, what works today and what does not yet."""
    from lowdim.cli.catalogue import show

    show(family, available, as_json)


@app.command()
def plan(
    model: _Model,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB.")] = None,
    methods: _Methods = "all",
    task: Annotated[str, typer.Option("--task", help="classify, causal-lm or pretrain.")] = "causal-lm",
    batch_size: Annotated[int, typer.Option("--batch-size")] = 1,
    length: Annotated[int, typer.Option("--length", help="Tokens in a sequence.")] = 512,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", help="Instead of each method's own, where it has one.")] = None,
    layerwise: Annotated[bool, typer.Option("--layerwise", help="Optimizers that can: free gradients at once.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show which modules the patterns match.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Forecast the peak memory of training by each method, without allocating the model."""
    from lowdim.cli.planning import plan as run

    run(model, budget, methods, task, batch_size, length, dtype, checkpointing, rank, layerwise, layers, as_json)


@app.command()
def compare(
    model: _Model = "minilm",
    data: Annotated[list[str] | None, typer.Option("--data", help="jsonl, csv, tsv, parquet or text; may be repeated.")] = None,
    evaluation: Annotated[str | None, typer.Option("--eval", help="A test file of its own.")] = None,
    task: Annotated[str, typer.Option("--task", help="classify, causal-lm or pretrain.")] = "classify",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="pretrain: bytes, characters, a folder.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Name of the text column.")] = None,
    label: Annotated[str | None, typer.Option("--label", help="Name of the label column.")] = None,
    methods: Annotated[str | None, typer.Option("--methods", help="Names, families or all, with commas.")] = None,
    budget: Annotated[str | None, typer.Option("--budget", help="Memory, e.g. 8GiB; what does not fit is left out.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="accuracy, f1, mcc; perplexity, loss.")] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", help="Runs of each method at its chosen rate.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="Learning rates tried for each method, 1 to 5.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Optimizer steps of each run.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size")] = 16,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens kept of a text.")] = None,
    time_limit: Annotated[str | None, typer.Option("--time-limit", help="e.g. 90s, 10m, 2h: fewer seeds if need be.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and of everything drawn.")] = 0,
    out: Annotated[str, typer.Option("--out", help="Folder of the results.")] = "lowdim-compare",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in --out.")] = False,
) -> None:
    """Which method is best for this model, this data and this memory? Forecast, train fairly, hand over the winner."""
    from lowdim.cli.comparing import compare as run

    options = {
        "model": model, "data": data, "evaluation": evaluation, "task": task, "tokenizer": tokenizer, "text": text, "label":
        label, "methods": methods, "budget": budget, "metric": metric, "seeds": seeds, "trials": trials, "steps": steps,
        "batch_size": batch_size, "max_length": max_length, "time_limit": time_limit, "seed": seed,
    }  # fmt: skip
    run(options, out, resume)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe in YAML.")],
    out: Annotated[Path | None, typer.Option("--out", help="Instead of the recipe's folder.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option("--steps", help="Instead of the recipe's.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the recipe and print it filled in.")] = False,
) -> None:
    """Fine-tune with one method, as a recipe says."""
    from lowdim.cli.running import run as run_it

    run_it(recipe, out, resume, steps, check)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="A folder that lowdim saved an adapter in.")],
    out: Annotated[Path, typer.Argument(help="Where to write.")],
    model: Annotated[str | None, typer.Option("--model", help="The base model; found in the run's record if left out.")] = None,
    format: Annotated[str, typer.Option("--format", help="peft or merged.")] = "peft",
    rank: Annotated[int | None, typer.Option("--rank", help="Where an update of full rank is truncated.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="classify or causal-lm.")] = None,
    target: Annotated[str | None, typer.Option("--for", help="vllm or llamacpp: LoRA that it loads, checked first.")] = None,
    max_error: Annotated[float | None, typer.Option("--max-error", help="Choose each layer's rank by this error.")] = None,
) -> None:
    """Write an adapter for PEFT (vLLM, llama.cpp), or merge it into a transformers checkpoint."""
    from lowdim.cli.shipping import export as run_it

    run_it(adapter, out, model, format, rank, task, target, max_error)


@app.command()
def compress(
    model: _Model,
    out: Annotated[Path, typer.Option("--out", help="Where to write the smaller model.")],
    data: Annotated[list[str], typer.Option("--data", help="Text of the model's own domain.")],
    method: Annotated[
        str, typer.Option("--method", help="lord: by a layer's outputs on the text; welore: by its weights.")
    ] = "lord",
    param_ratio: Annotated[
        float | None, typer.Option("--param-ratio", help="lord: share of each layer's parameters that is kept (0.7).")
    ] = None,
    target: Annotated[float | None, typer.Option("--target", help="welore: share of all ranks that is to go (0.5).")] = None,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="welore: on normalised singular values, instead of --target.")
    ] = None,
    tune_steps: Annotated[int | None, typer.Option("--tune-steps", help="welore: then tune the factors on the text.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of --tune-steps (5e-5).")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Sequences that lord looks at (200), or that are tuned on (all).")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length")] = 128,
) -> None:
    """Shrink a trained model, and say what it cost."""
    from lowdim.cli.shipping import compress as run_it

    run_it(model, out, data, method, param_ratio, target, threshold, tune_steps, lr, samples, max_length)


@app.command()
def diagnose(
    diagnostic: Annotated[str, typer.Argument(help="intruders.")],
    base: Annotated[str, typer.Option("--base", help="The model before: a folder, safetensors file or name.")],
    tuned: Annotated[str, typer.Option("--tuned", help="The model after.")],
    k: Annotated[int, typer.Option("--k", help="Singular vectors that are looked at.")] = 10,
    threshold: Annotated[float, typer.Option("--threshold", help="Similarity below which a vector is an intruder.")] = 0.5,
    out: Annotated[Path | None, typer.Option("--out", help="Write the result as JSON.")] = None,
) -> None:
    """Measure what training left in the weights."""
    from lowdim.cli.shipping import diagnose as run_it

    run_it(diagnostic, base, tuned, k, threshold, out)


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="comparison.json, run.json, or a folder that holds one.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page; beside the source if left out.")] = None,
) -> None:
    """Draw the page of a comparison or run again from its record."""
    from lowdim.cli.shipping import report as run_it

    run_it(source, out)


@app.command()
def reproduce(
    slug: Annotated[str, typer.Argument(help="A system of the catalogue.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder of data sets (or LOWDIM_DATA).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer seeds and steps: shows that it runs, proves nothing.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder of the result file.")] = Path("results"),
) -> None:
    """Run a paper's claim as an experiment: prints the claim, the numbers and a verdict."""
    from lowdim.cli.reproducing import reproduce as run_it

    run_it(slug, data, quick, out)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: usage errors and errors that the user can mend end with exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait by spinning make a machine that also does something else up to eight times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with clear_errors(), short_warnings():
        _quiet_libraries()
        app(args=sys.argv[1:] if arguments is None else arguments, prog_name="lowdim")


def _quiet_libraries() -> None:
    """Keep other libraries' notes about optional speed-ups out of our output."""
    import logging
    import warnings

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("peft", "transformers", "accelerate", "bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*Redirects are currently not supported.*")
