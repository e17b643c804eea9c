"""The smallest change that fits: found by search, against all settings tried one by one; and what it costs to find it."""

import dataclasses
import itertools

import pytest
import torch
from subjects import llama

from lowdim.errors import UnknownNameError
from lowdim.plan import fit, forecast
from lowdim.plan.fitting import BITS, _Search

pytest.importorskip("transformers")

GIVEN = {
    "batch_size": 12,
    "accumulate": 2,
    "dtype": "float32",
    "gradient_checkpointing": False,
    "layerwise": False,
    "quantize": None,
}
KINDS = ("weights", "gradients", "optimizer_state", "activations", "workspace")


def need(settings):
    """A training's parts by formula: `{part: {kind: bytes}}`. Gradients are held from the second pass on."""
    width = BITS[settings["quantize"]] / 8 or (4 if settings["dtype"] == "float32" else 2)
    size = 4 if settings["dtype"] == "float32" else 2
    gradients = 0 if settings["layerwise"] else 300 * size
    state = 500 * size
    activations = settings["batch_size"] * size * (20 if settings["gradient_checkpointing"] else 90)
    held = gradients if settings["accumulate"] > 1 else 0
    weights = int(1000 * width)
    return (
        dict(zip(KINDS, (weights, held, state, activations, settings["batch_size"]))),
        dict(zip(KINDS, (weights, gradients, state, 0, 7))),
    )


class Forecaster:
    """Answers by `need`, and counts the questions."""

    def __init__(self):
        self.asked = []

    def __call__(self, settings):
        self.asked.append(dict(settings))
        parts = need(settings)
        largest = max(parts, key=lambda part: sum(part.values()))
        settings = {name: value for name, value in settings.items() if name != "quantize"}
        return dataclasses.replace(TEMPLATE, **largest, total=sum(largest.values()), parts=parts, **settings)


TEMPLATE = forecast(
    lambda: torch.nn.Linear(2, 1), "full", batch=lambda: torch.ones(1, 2), loss_fn=lambda m, x: m(x).sum(), batch_size=1
)


def search(budget, kind="optimizer", given=GIVEN, bits=(None,)):
    made = _Search(Forecaster(), dict(given), budget, kind)
    made.bits = list(bits)
    changes, found = made.run()
    return changes, found, made


def all_settings(given, kind, bits):
    """Every change in the documented order, by the settings that it gives."""
    batch, exact = given["batch_size"], []
    smaller = [size for size in range(batch - 1, 0, -1) if batch % size == 0]
    exact.append([{"batch_size": size, "accumulate": given["accumulate"] * batch // size} for size in smaller])
    exact.append([] if given["gradient_checkpointing"] else [{"gradient_checkpointing": True}])
    exact.append([{"layerwise": True}] if kind == "optimizer" and not given["layerwise"] else [])
    for quantize, half in itertools.product(bits, (False, True)):
        rounding = {**({"quantize": quantize} if quantize else {}), **({"dtype": "bfloat16"} if half else {})}
        for count in range(4):
            for chosen in itertools.combinations([change for change in exact if change], count):
                for parts in itertools.product(*chosen):
                    yield {name: value for part in (rounding, *parts) for name, value in part.items()}


@pytest.mark.parametrize("kind", ["optimizer", "adapter", "full"])
@pytest.mark.parametrize("bits", [(None,), (None, "int8", "nf4")])
def test_the_search_finds_what_trying_everything_in_order_finds(kind, bits):
    asked = []
    for budget in range(2000, 13000, 250):
        fitting = (
            changes
            for changes in all_settings(GIVEN, kind, bits)
            if max(sum(part.values()) for part in need({**GIVEN, **changes})) <= budget
        )
        want = next(fitting, None)
        changes, found, made = search(budget, kind, bits=bits)
        asked.append(made.tried)
        if want is None:
            assert found.total > budget
            assert found.total == min(
                max(sum(part.values()) for part in need({**GIVEN, **c})) for c in all_settings(GIVEN, kind, bits)
            )
        else:
            assert dict(changes) == want, budget
    assert len(list(all_settings(GIVEN, kind, bits))) > 3 * max(asked)


def test_what_fits_is_left_alone_after_one_forecast():
    changes, _, made = search(10**6)
    assert (changes, made.tried) == ({}, 1)


def test_weights_that_are_too_large_alone_are_seen_from_the_first_forecast():
    given = {**GIVEN, "batch_size": 1}
    _, found, made = search(1000, "full", given)
    assert found.total > 1000
    assert made.tried == 2  # as given, and with everything: no rounding of the weights leaves less than a half


def test_a_change_that_a_model_cannot_take_is_not_tried_again():
    class Refuses(Forecaster):
        def __call__(self, settings):
            if settings["gradient_checkpointing"]:
                self.refused = getattr(self, "refused", 0) + 1
                raise ValueError("gradient_checkpointing: this model does not support it")
            return super().__call__(settings)

    made = _Search(Refuses(), dict(GIVEN), 9000, "full")
    made.bits = [None]
    changes, _ = made.run()
    assert changes == {"batch_size": 4, "accumulate": 6}
    assert getattr(made.predict, "refused", 0) <= 1


def test_the_forecast_of_a_fit_is_that_of_its_settings():
    how = {"task": "causal-lm", "sequence_length": 64, "batch_size": 8}
    whole = forecast(llama(), "full", **how).total
    found = fit(llama(), "full", int(0.8 * whole), **how)
    assert found.fits
    assert found.changes == {"batch_size": found.forecast.batch_size, "accumulate": 8 // found.forecast.batch_size}
    again = forecast(llama(), "full", **{**how, **found.changes}, budget_bytes=int(0.8 * whole))
    assert again.to_dict() | {"seconds_per_step": 0} == found.forecast.to_dict() | {"seconds_per_step": 0}
    larger = 2 * found.forecast.batch_size
    if larger < 8:
        wider = forecast(llama(), "full", **{**how, "batch_size": larger, "accumulate": 8 // larger})
        assert wider.total > 0.8 * whole
    assert found.flags == f"--batch-size {found.forecast.batch_size} --accumulate {found.forecast.accumulate}"


def test_what_is_missing_is_the_smallest_need_less_the_budget():
    how = {"task": "causal-lm", "sequence_length": 16, "batch_size": 2}
    found = fit(llama(), "galore", "1MiB", **how)
    assert not found.fits
    assert found.missing_bytes == found.forecast.total - 2**20
    assert found.forecast.dtype == "bfloat16"
    assert found.forecast.layerwise
    assert str(found).startswith("GaLore: ")
    assert "are missing with --" in str(found)
    assert found.to_dict()["fits"] is False


def test_weights_in_bfloat16_need_no_autocast():
    how = {"task": "causal-lm", "sequence_length": 16, "batch_size": 2, "bf16": True}
    whole = forecast(llama(), "full", **how).total
    kept, cut = fit(llama(), "full", whole, **how), fit(llama(), "full", whole // 2, **how)
    assert kept.forecast.bf16
    assert cut.forecast.dtype == "bfloat16"
    assert not cut.forecast.bf16


def test_wrong_arguments_of_a_fit():
    with pytest.raises(ValueError, match="batch_size must be an int >= 1; got 0"):
        fit(llama(), "lora", "1GiB", batch_size=0)
    with pytest.raises(UnknownNameError, match="nearest"):
        fit(llama(), "lorra", "1GiB")
    with pytest.raises(ValueError, match="such as 8GiB"):
        fit(llama(), "lora", "much")
