"""The page in a browser: it draws what the record holds, answers to mouse and keys, and fits a phone."""

import re

import pytest
from browser import asked, dumped
from fake import comparison, run
from judged import before_and_after, judged

from lowdim import report

pytestmark = pytest.mark.slow


def test_the_policy_admits_the_pages_own_script_and_style():
    text = dumped(report.render(comparison()))
    assert 'data-drawn="yes"' in text
    assert len(re.findall(r'class="point ', text)) == 10


def test_every_chart_is_drawn():
    wanted = {".point": 10, ".point.chosen": 1, ".front": 1, ".series .line": 5, ".legend button": 10}
    wanted |= {".panel svg": 10, ".context": 5, ".trial": 48, ".trial.chosen": 10, ".methods th button": 8}
    script = f"return {list(wanted)}.map((selector) => document.querySelectorAll(selector).length)"
    assert dict(zip(wanted, asked(report.render(comparison()), script))) == wanted


@pytest.mark.parametrize("width", [320, 360, 390, 768, 1280])
@pytest.mark.parametrize(
    "page",
    [comparison(), run(), judged(19), judged(6, task="instruct"), before_and_after()],
    ids=["old", "old run", "search", "samples", "run"],
)
def test_no_sideways_scroll(page, width):
    html = report.render(page) if "methods" in page else report.render_run(page)
    inner, scroll = asked(html, "return [innerWidth, document.documentElement.scrollWidth]", width)
    assert inner == width
    assert scroll <= inner


def test_long_names_do_not_widen_a_phone():
    record = comparison()
    for method in record["methods"]:
        method["label"] = "Anextraordinarilylongnamewithoutasingleblank" + method["name"]
    record["title"] = record["methods"][10]["reason"] = record["command"] = "x" * 300
    assert asked(report.render(record), "return document.documentElement.scrollWidth <= innerWidth", 360)


def test_points_lie_where_their_numbers_are():
    """Higher scores are higher, larger memory is further right, on both kinds of axis."""
    found = asked(
        report.render(comparison()),
        """const read = () => [...document.querySelectorAll('.point')].map((p) =>
          [p.getAttribute('aria-label').split(':')[0], ...p.getAttribute('transform').match(/[\\d.]+/g).map(Number)]);
        const linear = read();
        document.querySelector('.controls input').click();
        const log = read();
        document.querySelectorAll('.switch button')[1].click();
        return [linear, log, read()];""",
    )
    methods = {m["label"]: m for m in comparison()["methods"][:10]}
    for points, key in zip(found, ("measured_peak_bytes", "measured_peak_bytes", "seconds_per_step")):
        place = {name: (x, y) for name, x, y in points}
        assert sorted(place, key=lambda n: place[n][0]) == sorted(methods, key=lambda n: methods[n][key])
        assert sorted(place, key=lambda n: -place[n][1]) == sorted(methods, key=lambda n: methods[n]["mean"])
    assert found[0] != found[1]


def test_filled_points_are_the_front_on_the_axis_shown():
    record = comparison()
    shown = asked(
        report.render(record),
        """const name = (point) => point.getAttribute('aria-label').split(':')[0];
        const read = () => [...document.querySelectorAll('.point.on')].map(name);
        return [...document.querySelectorAll('.switch button')].map((b) => { b.click(); return read(); });""",
    )
    methods = record["methods"][:10]
    for names, key in zip(shown, ("measured_peak_bytes", "seconds_per_step", "trained_parameters", "file_bytes")):
        front = {
            m["label"]
            for m in methods
            if not any(
                o["mean"] >= m["mean"] and o[key] <= m[key] and (o["mean"], o[key]) != (m["mean"], m[key]) for o in methods
            )
        }
        assert set(names) == front


def test_keys_walk_the_points_and_open_the_tooltip():
    steps = asked(
        report.render(comparison()),
        """const seen = [];
        const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
        const tip = document.querySelector('[data-chart=scatter] .tip');
        document.querySelector('.point').focus();
        for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft']) {
          press(key);
          seen.push(tip.hidden ? '' : tip.querySelector('b').textContent);
        }
        press('Escape');
        return [...seen, tip.hidden, document.querySelectorAll('.point[tabindex="0"]').length];""",
    )
    order = [m["label"] for m in sorted(comparison()["methods"][:10], key=lambda m: m["measured_peak_bytes"])]
    assert steps == [order[1], order[2], order[1], True, 1]


def test_legend_toggles_and_smoothing():
    counts = asked(
        report.render(comparison()),
        """const lines = () => document.querySelectorAll('.series .line').length;
        const path = () => document.querySelector('[data-name=lamda] .line').getAttribute('d');
        const button = [...document.querySelectorAll('.legend button')].find((b) => b.textContent === 'LaMDA'), all = lines();
        button.click();
        const less = lines(), pressed = button.getAttribute('aria-pressed');
        button.click();
        const smooth = path();
        document.querySelector('[data-chart=curves] input').click();
        const rough = path();
        const sets = [...document.querySelectorAll('.sets button')].map((b) => { b.click(); return lines(); });
        return [all, less, pressed, smooth !== rough, ...sets];""",
    )
    assert counts == [5, 4, "false", True, 10, 5, 0]


def test_sorting_puts_missing_values_last():
    record = comparison()
    record["methods"][0]["file_bytes"] = None
    orders = asked(
        report.render(record),
        """const head = document.querySelector('.methods th:nth-child(6)'), result = [];
        const names = () => [...document.querySelectorAll('.methods tbody th')].map((th) => th.dataset.v);
        for (let i = 0; i < 2; i += 1) {
          head.querySelector('button').click();
          result.push([head.getAttribute('aria-sort'), names()]);
        }
        return result;""",
    )
    known = sorted(record["methods"][1:10], key=lambda m: m["file_bytes"])
    (first, down), (second, up) = orders
    assert (first, second) == ("descending", "ascending")
    assert down[-1] == up[-1] == "LoRA"
    size = {m["label"]: m["file_bytes"] for m in known}
    assert [size[n] for n in up[:-1]] == [m["file_bytes"] for m in known]
    assert [size[n] for n in down[:-1]] == [m["file_bytes"] for m in reversed(known)]


def test_zero_parameters_fit_a_logarithmic_axis():
    record = comparison()
    record["methods"][9]["trained_parameters"] = 0
    drawn = asked(
        report.render(record),
        """document.querySelectorAll('.switch button')[2].click();
        const places = [...document.querySelectorAll('.point')].map((p) => p.getAttribute('transform'));
        return [document.querySelector('[data-chart=scatter] input').checked, ...places];""",
    )
    assert drawn[0] is True
    assert len(drawn) == 11
    assert not any("NaN" in str(place) for place in drawn)


def test_shares_that_are_all_zero_have_no_negative_ticks():
    record = comparison()
    for method in record["methods"][:10]:
        method.update(mean=0.0, interval=[0.0, 0.0], scores=[0.0] * len(method["scores"]))
    texts = asked(
        report.render(record),
        """return [...document.querySelectorAll('[data-chart=scatter] svg text')].map((t) => t.textContent);""",
    )
    numbers = [text for text in texts if re.fullmatch(r"[−-]?[0-9.]+ ?%?", text)]
    assert numbers
    assert not any(text.startswith(("−", "-")) for text in numbers), numbers


@pytest.mark.parametrize("case", ["one", "none", "lower", "losses", "same"])
def test_odd_records_draw_without_an_error(case):
    record = comparison()
    if case == "one":
        record["methods"] = record["methods"][:1]
    elif case == "none":
        record["methods"] = record["methods"][10:]
    elif case == "lower":
        record["metric"] = {"name": "loss", "higher_is_better": False}
    elif case == "losses":
        record["methods"][0]["curves"][0]["loss"] = [None] * 40
        record["methods"][1]["curves"] = [{"seed": 0, "step": [1], "loss": [0.5]}]
        record["methods"][2]["curves"] = []
    else:
        for method in record["methods"][:10]:
            method.update(
                mean=0.5, interval=[0.5, 0.5], measured_peak_bytes=100, seconds_per_step=0, trials=[{"lr": 0, "score": 1}] * 2
            )
    bad = asked(
        report.render(record),
        """document.querySelectorAll('.switch button, .controls input').forEach((b) => b.click());
        return document.body.innerHTML.match(/="[^"]*(NaN|Infinity|undefined)[^"]*"/g);""",
    )
    assert bad is None


def test_the_search_is_drawn_and_walked_with_keys():
    record = judged(19)
    candidates = {(v["method"], v["lr"], v["size"]) for v in record["search"]["visits"]}
    ends = {(v["method"], v["lr"], v["size"]) for v in record["search"]["visits"] if v["rung"] == 4}
    paths, on, first, second, text = asked(
        report.render(record),
        """const host = document.querySelector('[data-chart=tree]'), svg = host.querySelector('svg[role=slider]');
        const press = (key) => {
          svg.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
          return host.querySelector('.tip b').textContent;
        };
        const count = (selector) => host.querySelectorAll(selector).length;
        const seen = [press('ArrowDown'), press('ArrowDown')];
        return [count('.path'), count('.path.on'), ...seen, svg.getAttribute('aria-valuetext')];""",
    )
    assert (paths, on) == (len(candidates), len(ends))
    assert first == "LoRA, size 4, lr 1e-3"
    assert second.startswith("LoRA, size")
    assert "not in the better half" in text


def test_a_line_of_the_search_is_as_long_as_its_candidate_stayed():
    record = judged(6)
    reach = {}
    for visit in record["search"]["visits"]:
        key = (visit["method"], visit["lr"], visit["size"])
        reach[key] = max(reach.get(key, 0), visit["rung"])
    ends = asked(
        report.render(record),
        "return [...document.querySelectorAll('.path > line:first-child')].map((line) => Number(line.getAttribute('x2')))",
    )
    places = sorted(set(ends))
    assert sorted(places.index(end) for end in ends) == sorted(sorted(set(reach.values())).index(r) for r in reach.values())


def test_the_noise_band_holds_the_scores_that_may_be_best():
    record = judged(19)
    may = {m["label"] for m in record["methods"] if m.get("may_be_best")}
    inside = asked(
        report.render(record),
        """const band = document.querySelector('.noise').getBBox();
        return [...document.querySelectorAll('.point')].filter((p) => {
          const y = Number(p.getAttribute('transform').match(/[\\d.]+/g)[1]);
          return y >= band.y - 0.11 && y <= band.y + band.height + 0.11;
        }).map((p) => p.getAttribute('aria-label').split(':')[0]);""",
    )
    assert set(inside) == may


def test_every_cost_is_in_view_on_a_phone():
    outside = asked(
        report.render(judged(19)),
        """return [...document.querySelectorAll('.methods tbody td')].filter((cell) => {
          const box = cell.getBoundingClientRect();
          return box.left < 0 || box.right > innerWidth;
        }).length;""",
        390,
    )
    assert outside == 0


def test_the_first_screen_uses_the_width():
    right = asked(report.render(judged(6)), "return document.querySelector('.pick').getBoundingClientRect().right", 1280)
    assert right > 1180
