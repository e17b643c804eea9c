"""Options are read from configs and functions: every one has a help text, and the range it states is the range that holds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from lowdim.errors import UnknownNameError
from lowdim.jobs import Option, compressor, diagnostic, options_of, parse_options
from lowdim.jobs.options import REQUIRED, check_options
from lowdim.jobs.systems import described_system, names_of

COMPRESSORS = [compressor(name) for name in names_of("compress")]
DIAGNOSTICS = [diagnostic(name) for name in names_of("diagnose")]
OPTIONS = [(system, option) for system in (*COMPRESSORS, *DIAGNOSTICS) for option in system.options.values()]
NUMBERS = [(system, option) for system, option in OPTIONS if "number" in option.kind]
each = {"ids": lambda value: getattr(value, "name", None) or getattr(getattr(value, "entry", None), "slug", "")}


@pytest.mark.parametrize(("system", "option"), OPTIONS, **each)
def test_every_option_says_what_it_means(system, option):
    assert option.help, f"{option.name} of {system.entry.slug}: describe it in the docstring's Attributes or Args"


@pytest.mark.parametrize(("system", "option"), NUMBERS, **each)
def test_a_number_says_its_range(system, option):
    assert option.range, f"{option.name} of {system.entry.slug}: say where it must lie, e.g. `in (0, 1]` or `>= 1`"


def _outside(option):
    """A value just outside each bound, of the option's own type."""
    low, high, open_low, open_high = option.bounds
    step = 1 if "whole" in option.kind else 1e-6
    kind = int if "whole" in option.kind else float
    below = [] if low == -math.inf else [kind(low) if open_low else kind(low - step)]
    above = [] if high == math.inf else [kind(high) if open_high else kind(high + step)]
    return below + above


@pytest.mark.parametrize(("system", "option"), [(s, o) for s, o in NUMBERS if s in COMPRESSORS], **each)
def test_the_config_holds_the_range_that_is_stated(system, option):
    alternatives = {name for group in getattr(system.config, "one_of", ()) if option.name in group for name in group}
    others = {name: value for name, value in system.entry.options.items() if name not in alternatives}
    for value in _outside(option):
        assert not option.accepts(value)
        with pytest.raises(ValueError, match=option.name):
            system.config(**{**others, option.name: value})


@pytest.mark.parametrize(("system", "option"), [(s, o) for s, o in NUMBERS if s in DIAGNOSTICS], **each)
def test_the_diagnostic_holds_the_range_that_is_stated(system, option):
    import torch

    inputs = [torch.eye(3) for _ in system.inputs]
    required = {o.name: [1] if o.kind == "a list" else 1 for o in system.options.values() if o.default is REQUIRED}
    for value in _outside(option):
        assert not option.accepts(value)
        with pytest.raises(ValueError, match=option.name):
            system.function(*inputs, **{**required, option.name: value})


@pytest.mark.parametrize("system", COMPRESSORS, **each)
def test_a_compression_can_be_called_with_the_defaults_of_its_row(system):
    config = system.build({})
    for name, value in system.entry.options.items():
        assert getattr(config, name) == value
        assert system.options[name].accepts(value)


def test_an_alternative_replaces_the_default_of_the_row():
    lord = compressor("lord")
    assert (lord.build({}).param_ratio, lord.build({"centered": False}).param_ratio) == (0.7, 0.7)
    assert (lord.build({"rank": 4}).rank, lord.build({"rank": 4}).param_ratio) == (4, None)


@dataclass(frozen=True)
class _Base:
    """Attributes:
    shared: from the base, in [0, 1).
    """

    shared: float = 0.5


@dataclass(frozen=True)
class _Config(_Base):
    """A config.

    Attributes:
        rank, ranks: one text for two names,
            that goes on in the next line, >= 2.
        table: by name.
        words: some.
        flag: yes or no.

    Raises:
        ValueError: never; this is no option.
    """

    rank: int = 4
    ranks: int | None = None
    table: Mapping[str, int] | None = None
    words: tuple[str, ...] = ()
    flag: bool = True
    noted: float = field(default=1.0, metadata={"help": "from the metadata, > 0"})
    silent: int = 0


def test_options_of_a_config():
    found = options_of(_Config)
    assert list(found) == ["shared", "rank", "ranks", "table", "words", "flag", "noted", "silent"]
    assert found["rank"] == Option("rank", int, 4, "one text for two names, that goes on in the next line, >= 2.")
    assert found["ranks"].what == "a whole number >= 2 or null"
    assert found["noted"].bounds == (0.0, math.inf, True, False)
    assert found["silent"].help == "", "which the test above would refuse"
    assert found["flag"].what == "true or false"


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("rank", [2, 100], [1, 2.0, True, "2", None]),
        ("ranks", [2, None], [1, "null"]),
        ("table", [{"a": 1}, None], [[1], "a"]),
        ("words", [["a"], ()], ["a", [1]]),
        ("flag", [True, False], [1, "true"]),
        ("noted", [1e-9, 3], [0, -1.0, math.inf, math.nan, True]),
    ],
)
def test_what_an_option_accepts(name, good, bad):
    option = options_of(_Config)[name]
    assert all(option.accepts(value) for value in good)
    assert not any(option.accepts(value) for value in bad)


def test_options_of_a_function_are_its_keywords():
    def measure(model, *, k: int = 3, scale: float):
        """Measure.

        Args:
            model: not an option.
            k: how many, >= 1.
            scale: how much.
        """

    found = options_of(measure)
    assert list(found) == ["k", "scale"]
    assert (found["k"].help, found["scale"].default) == ("how many, >= 1.", REQUIRED)
    assert found["scale"].default_text == "required"
    with pytest.raises(TypeError, match="class or a function"):
        options_of(3)


def test_an_unknown_option_names_the_nearest_with_their_ranges():
    with pytest.raises(UnknownNameError, match=r"toy has no option 'rnk'; nearest: rank \(a whole number >= 2\); ranks"):
        check_options("toy", options_of(_Config), {"rnk": 3})
    with pytest.raises(UnknownNameError, match=r"toy has no option 'x' \(lord has\); it has no options"):
        check_options("toy", {}, {"x": 3}, ["lord"])


def test_values_are_read_as_in_recipes():
    given = ["rate=1e-3", "rank-choices=[4, 8]", "flag=no-such-word", "off=false", "nothing=null", "path=a=b"]
    assert parse_options("toy", given) == {
        "rate": 1e-3, "rank_choices": [4, 8], "flag": "no-such-word", "off": False, "nothing": None, "path": "a=b",
    }  # fmt: skip


def test_every_system_that_works_can_be_described():
    from lowdim.catalogue import entries, variants

    for entry in entries():
        assert described_system(entry.slug)[0] is entry
    for name, variant in variants().items():
        options = described_system(name)[1][name]
        for option, value in variant.options.items():
            assert options[option].default == value
        bare = [option.name for option in options.values() if not option.help]
        assert not bare, f"{name}: describe {', '.join(bare)} in the docstring's Attributes or Args"
