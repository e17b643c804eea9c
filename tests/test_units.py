import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowdim.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("8Gi", 8 * 2**30),
        ("500MB", 500 * 10**6),
        ("500M", 500 * 10**6),
        ("1.5GB", 1_500_000_000),
        (".5KiB", 512),
        ("2TiB", 2 * 2**40),
        ("4096", 4096),
        ("4096 B", 4096),
    ],
)
def test_parse(text, want):
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GiB", "8 GiBs", "8XB", "-1GiB", "1e3", "8,5GiB", "nan", None, 8])
def test_what_is_not_a_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match="such as 8GiB") as error:
        parse_bytes(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.2B"])
def test_zero_is_refused(text):
    with pytest.raises(ValueError, match="above zero"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "want"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (10 * 1024, "10.0 KiB"),
        (999 * 1024, "999 KiB"),
        (1000 * 1024, "0.98 MiB"),
        (8 * 2**30, "8.00 GiB"),
        (5000 * 2**40, "5000 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format(count, want):
    assert format_bytes(count) == want


@given(st.integers(1, 10**15))
def test_a_formatted_size_reads_back_within_its_three_digits(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"),
        (3e-6, "3.00 µs"),
        (0.0009994, "999 µs"),
        (0.0312, "31.2 ms"),
        (0.9996, "1.00 s"),
        (1.5, "1.50 s"),
        (101, "101 s"),
        (119, "119 s"),
        (119.6, "1.99 min"),
        (180, "3.00 min"),
        (7199, "2.00 h"),
        (9000, "2.50 h"),
        (172_799, "2.00 days"),
        (1e6, "11.6 days"),
        (-1.5, "-1.50 s"),
    ],
)
def test_times_have_units_that_people_use(seconds, shown):
    assert format_seconds(seconds) == shown
