"""`lowdim compress`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lowdim.cli.options import Model, Pairs, print_line

__all__ = ["compress"]


def compress(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Where to write the smaller model.")],
    data: Annotated[list[str], typer.Option("--data", help="Text from the model's domain; repeatable.")],
    text: Annotated[str | None, typer.Option("--text", help="Name of the text column.")] = None,
    method: Annotated[str, typer.Option("--method", help="A name of `lowdim list compress`.")] = "lord",
    option: Pairs = None,
    param_ratio: Annotated[float | None, typer.Option("--param-ratio", help="Same as --option param_ratio=…")] = None,
    target: Annotated[float | None, typer.Option("--target", help="Same as --option target=…")] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Same as --option threshold=…")] = None,
    tune_steps: Annotated[int | None, typer.Option("--tune-steps", help="Then train what stays trainable.")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate of --tune-steps (5e-5).")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Sequences that the method looks at (200) or is tuned on (all).")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", help="Tokens in a sequence.")] = 128,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write the dense equivalent, of full size, which loads without lowdim.")
    ] = False,
) -> None:
    """Shrink a trained model, and report the loss of quality. `lowdim list METHOD` shows a method's own options."""
    from lowdim.jobs import CompressSettings
    from lowdim.jobs import compress as run

    spelled = {"param_ratio": param_ratio, "target": target, "threshold": threshold}
    settings = CompressSettings(
        model=model, data=tuple(data), text=text, out=out, method=method, options=_options(method, option, spelled),
        tune_steps=tune_steps, lr=lr, samples=samples, max_length=max_length, dense=dense,
    )  # fmt: skip
    console = Console()
    show = partial(print_line, console)
    outcome = run(settings, say=show, tell=show)
    details = ", ".join(f"{name} {value:g}" for name, value in outcome.report.details.items() if isinstance(value, float))
    print_line(console, f"{outcome.summary}{f'; {details}' if details else ''}")
    loads = "transformers loads it after `import lowdim`"
    if dense:
        loads = "transformers loads it; the thin factors are in factors.safetensors"
    print_line(console, f"written {out}: {loads}")


def _options(method: str, pairs: list[str] | None, spelled: dict[str, Any]) -> dict[str, Any]:
    """Options with their own flag, and the others."""
    from lowdim.jobs import parse_options

    flags = [f"{name}={value!r}" for name, value in spelled.items() if value is not None]
    return parse_options(method, [*flags, *(pairs or ())])
