import math

import pytest

from lowdim import errors
from lowdim.errors import check_choice, check_float, check_int, nearest, unknown


def test_every_error_is_a_lowdim_error_and_a_builtin_one():
    for name in ("CheckpointError", "NoMatchingModuleError", "UnknownNameError", "BudgetError", "DataError"):
        kind = getattr(errors, name)
        assert issubclass(kind, errors.LowdimError)
        assert issubclass(kind, ValueError)
    assert issubclass(errors.MissingExtraError, ImportError)


def test_missing_extra_says_what_to_install():
    error = errors.MissingExtraError("peft", "train", "exporting")
    assert str(error) == "exporting needs the package 'peft': pip install 'lowdim[train]'"


def test_nearest_looks_alike_and_never_returns_nothing():
    assert nearest("q_porj", ["k_proj", "q_proj", "lm_head"])[0] == "q_proj"
    assert nearest("zzz", ["a", "b", "c", "d"]) == ["a", "b", "c"]
    assert nearest("x", []) == []


def test_unknown_lists_options_and_the_nearest():
    error = unknown("method", "lroa", iter(["lora", "lamda"]))
    assert isinstance(error, errors.UnknownNameError)
    assert "lora, lamda" in str(error)
    assert "'lroa' (nearest: lora" in str(error)


def test_check_choice():
    check_choice("init", "a", ["a", "b"])
    with pytest.raises(errors.UnknownNameError, match=r"init must be one of a, b; got 'c'"):
        check_choice("init", "c", (x for x in "ab"))


@pytest.mark.parametrize("bad", [0, -3, 11, 1.0, True, "3", None])
def test_check_int(bad):
    check_int("rank", 1, 1, 10)
    check_int("rank", 10**9, 1)
    with pytest.raises(ValueError, match=r"rank must be an int in \[1, 10\]; got"):
        check_int("rank", bad, 1, 10)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan, math.inf, True, "0.5", None])
def test_check_float(bad):
    check_float("x", 0, 0, 1)
    check_float("x", 1.0, 0, 1)
    with pytest.raises(ValueError, match=r"x must be a finite number in \[0, 1\]; got"):
        check_float("x", bad, 0, 1)


def test_check_float_open_ends():
    for value in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"\(0, 1\)"):
            check_float("x", value, 0, 1, low_open=True, high_open=True)


@pytest.mark.parametrize("limit", [20, 80, 200])
def test_a_shown_value_is_short_whatever_it_holds(limit):
    endless: list = []
    endless.append(endless)
    nested = "x"
    for _ in range(12):
        nested = [nested] * 9  # 9 ** 12 elements in all
    for value in ("x" * 10_000, 10**6000, endless, nested, {str(i): "y" * 99 for i in range(1000)}, object()):
        assert len(errors.shown(value, limit)) <= limit
    assert errors.shown({"lr": [1, "a"]}) == "{'lr': [1, 'a']}"


def test_messages_cut_the_value():
    for check in (lambda: check_int("rank", "9" * 10_000, 1), lambda: check_choice("task", "t" * 10_000, ["a"])):
        with pytest.raises(ValueError) as caught:
            check()
        assert len(str(caught.value)) < 300


def test_no_message_is_longer_than_two_thousand_characters():
    from lowdim.errors import CheckpointError, DataError, InUseError, unknown

    long = "x" * 10**6
    for error in (CheckpointError(f"begins {long} ends"), DataError(f"begins {long} ends"), InUseError(f"begins {long} ends")):
        assert len(str(error)) == 2000
        assert str(error).startswith("begins x")
        assert str(error).endswith("x ends")
    assert len(str(unknown("--method", long, [long, *(f"name {i}" for i in range(5000))]))) < 2000
