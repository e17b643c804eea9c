"""`lowdim plan --rates curvature`: a learning rate for each method, measured as `lowdim compare` measures it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowdim.errors import check_choice

if TYPE_CHECKING:
    from lowdim.jobs.plan import PlanSettings
    from lowdim.records import MeasuredRate

__all__ = ["plan_rates"]

_ORIGINS = ("curvature",)
_STEPS = 100  # of a training, whose warm-up comes before a measurement


def plan_rates(
    settings: PlanSettings, data: Sequence[str], origin: str = "curvature", *, say: Callable[[str], None] = lambda line: None
) -> dict[str, MeasuredRate]:
    """The rate of each method, by name; a method where it cannot be measured has a reason instead.

    The model is loaded, and each method trains a copy for a few steps, so this needs the memory that is forecast and somewhat
    more: 16 vectors as large as the trained parameters.

    Args:
        settings: of the forecast; an optimizer step has `batch_size * accumulate` rows of `length` tokens.
        data: files of texts, or a folder of images, as for `lowdim compare`.
        origin: `"curvature"`.
        say: called with a line before each measurement.

    Raises:
        UnknownNameError: another origin.
        ValueError: no data, or settings that `lowdim compare` does not train with.
        DataError: the data cannot be read.
    """
    from lowdim.comparison import CompareSettings
    from lowdim.comparison.measured_rates import measure
    from lowdim.comparison.setting_up import make_contest
    from lowdim.comparison.workbench import workbench

    check_choice("--rates", origin, _ORIGINS)
    if not data:
        raise ValueError(
            f"--rates {origin} needs --data: a rate is measured on the loss of your rows; lowdim compare --rates {origin} does "
            "it on the shipped ones, too"
        )
    strange = {"--dtype": settings.dtype != "float32", "--ffn": settings.ffn, "--mixer": settings.mixer}
    strange |= {"--devices": settings.devices > 1}
    if any(strange.values()):
        names = ", ".join(name for name, given in strange.items() if given)
        raise ValueError(f"--rates {origin} measures float32 weights on one device; leave out {names}")
    chosen = [settings.at_rank(each) for each in settings.chosen()]
    asked = CompareSettings(
        model=settings.model,
        data=tuple(data),
        task=settings.task,
        tokenizer=settings.tokenizer,
        methods=tuple(each.name for each in chosen),
        batch_size=settings.batch_size * settings.accumulate,
        max_length=settings.length,
        steps=_STEPS,
        quantize=settings.quantize,
        optimizer=settings.optimizer,
    )
    bench = workbench(asked, say=say)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        contest = make_contest(asked, bench, Path(folder), lambda kind, line: None)
        for each in chosen:
            say(f"measuring the rate of {each.label}")
            found[each.name] = measure(contest, each, None, asked.seed)
    return found
