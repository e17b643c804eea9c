"""Settings of comparisons on a tiny model, and one that is whole."""

import dataclasses

import pytest

from comparing import METHODS, run
from lowdim.comparison import CompareSettings


@pytest.fixture(scope="module")
def make(pooled_folder, two_classes):
    def settings(**changes):
        keys = {
            "model": str(pooled_folder), "data": (str(two_classes),), "methods": METHODS, "seeds": 2, "rates": 2, "sizes": 1,
            "steps": 5, "batch_size": 8, "max_length": 16,
        }  # fmt: skip
        return CompareSettings(**{**keys, **changes})

    return settings


@pytest.fixture(scope="module", autouse=True)
def _forecast_once():
    """The same forecast is not made again for each comparison."""
    import lowdim.plan

    known = {}
    original = lowdim.plan.forecast

    def forecast(config, chosen, *, budget_bytes=None, **keywords):
        if not hasattr(config, "to_json_string"):  # a module
            return original(config, chosen, budget_bytes=budget_bytes, **keywords)
        key = (config.to_json_string(), chosen.name, tuple(chosen.options.items()), tuple(keywords.items()))
        if key not in known:
            known[key] = original(config, chosen, **keywords)
        return dataclasses.replace(known[key], budget_bytes=budget_bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lowdim.plan, "forecast", forecast)
        yield


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory):
    """A comparison that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return (folder, *run(make(), folder))
