"""Numbers are rounded into the unit that a reader expects."""

import pytest

from lowdim.report.text import count, date, duration, error, number, percent, plain, rate, ratio, series, size


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (size(0), "0 B"), (size(1023), "1.00 KiB"), (size(1_310_720), "1.25 MiB"), (size(2**40), "1.00 TiB"),
        (size(2**52), "4096 TiB"),
        (count(0), "0"), (count(999), "999"), (count(999.9), "1.00K"), (count(147_456), "147K"), (count(7e9), "7.00B"),
        (duration(0), "0 s"), (duration(3e-6), "3.00 µs"), (duration(0.9996), "1.00 s"), (duration(119.6), "1.99 min"),
        (duration(7200), "2.00 h"),
        (rate(1e-5), "1e-5"), (rate(2.5e-4), "2.5e-4"), (rate(0.1), "0.1"), (rate(1), "1"),
        (ratio(3, 5), "0.60×"), (ratio(1, 924), "1/924"), (ratio(25, 1), "25×"), (ratio(0, 1), None), (ratio(1, None), None),
        (error(110, 100), "+10 %"), (error(90, 100), "−10 %"), (error(100.1, 100), "±0 %"), (error(1, 0), None),
        (percent(1), "100 %"), (percent(0.0996), "10 %"), (percent(0.0065), "0.65 %"), (percent(6.8e-5), "0.0068 %"),
        (date("2026-11-23T20:18:00+00:00"), "23 Nov 2026, 20:18 UTC"), (date("2026-11-23"), "23 Nov 2026"),
        (date("soon"), "soon"), (series(["a"]), "a"), (series(["a", "b", "c"]), "a, b and c"),
        (plain("a\r\nb\x00\x9b\u202e"), "a\nb"), (plain("x" * 50, 10), "x" * 9 + "…"),
    ],
)  # fmt: skip
def test_shown(shown, wanted):
    assert shown == wanted


@pytest.mark.parametrize("value", [True, "1", None, float("nan"), float("inf"), 10**400, [1], {}])
def test_what_is_not_a_number(value):
    assert number(value) is None
