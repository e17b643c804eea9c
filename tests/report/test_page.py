"""The page as text: it is well-formed, complete, safe whatever the record holds, and asks for nothing outside itself."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from fake import comparison, run
from judged import before_and_after, judged

from lowdim import report
from lowdim.records import ComparisonRecord, RunRecord

_VOID = {"meta", "link", "br", "hr", "img", "input", "rect", "circle", "line", "use", "path"}
_HOSTILE = "<script>alert(1)</script>\"'&{{data}}</style><img src=x onerror=alert(1)>\x1b[31m\u202e\ud800\u2028"


class _Page(HTMLParser):
    """Checks that every element is closed where it should be, and keeps what the tests ask about."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"an attribute of <{tag}> is given twice: {attrs}"
        if tag not in _VOID:
            self.open.append(tag)
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not (self.open and self.open[-1] == "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def data(self):
        return json.loads(self.scripts[0])


def _spoilt(value, text) -> Any:
    """A copy of a record with `text` for every string in it."""
    if isinstance(value, dict):
        return {key: _spoilt(item, text) for key, item in value.items()}
    if isinstance(value, list):
        return [_spoilt(item, text) for item in value]
    return text if isinstance(value, str) else value


def test_page_holds_every_method_number_and_reason():
    record = comparison()
    page = _Page(report.render(record))
    for method in record["methods"]:
        assert method["label"] in page.text
        if method["status"] == "ok":
            assert f"{method['mean']:.3f}" in page.text
            assert f"[{method['interval'][0]:.3f}, {method['interval'][1]:.3f}]" in page.text
        else:
            assert method["reason"] in page.text
    assert "PeftModel.from_pretrained(base" in page.text
    assert record["notes"][0] in page.text
    assert record["environment"]["cpu"] in page.text
    assert record["command"] in page.text
    assert "11 empty rows were left out" in page.text


def test_page_embeds_the_records_numbers():
    record = comparison()
    data = _Page(report.render(record)).data()
    methods = {m["name"]: m for m in data["methods"]}
    assert set(methods) == {m["name"] for m in record["methods"] if m["status"] == "ok"}
    for method in record["methods"][:10]:
        drawn = methods[method["name"]]
        assert drawn["mean"] == pytest.approx(method["mean"])
        assert drawn["interval"] == pytest.approx(method["interval"])
        assert drawn["costs"] == {
            "memory": method["measured_peak_bytes"],
            "time": method["seconds_per_step"],
            "parameters": method["trained_parameters"],
            "file": method["file_bytes"],
        }
        assert len(drawn["curves"]) == 3
        assert drawn["curves"][1]["loss"] == pytest.approx(method["curves"][1]["loss"], rel=1e-4)
        assert drawn["curves"][1]["step"] == method["curves"][1]["step"]
    assert methods["lamda"]["chosen"]
    assert methods["nola"]["edge"]
    assert not methods["lora"]["edge"]


def test_page_is_one_file_that_asks_for_nothing():
    text = report.render(comparison())
    page = _Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("#"), (tag, name, value)
    assert page.count("link") == page.count("iframe") == page.count("img") == 0
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style
    for call in ("fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "import(", "innerHTML", "eval("):
        assert call not in page.scripts[1]
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_page_is_small():
    assert len(report.render({"methods": []}).encode()) < 80_000
    assert len(report.render(comparison()).encode()) < 160_000
    assert len(report.render(judged(19)).encode()) < 220_000


def test_a_long_comparison_is_thinned_and_stays_below_three_megabytes():
    record = comparison(seeds=5, steps=3000)
    record["methods"] = [dict(copy.deepcopy(m), name=f"{m['name']}-{i}") for i in range(5) for m in record["methods"][:10]]
    text = report.render(record)
    assert len(text.encode()) < 3_000_000
    line = _Page(text).data()["methods"][0]["curves"][0]
    assert len(line["step"]) == len(line["loss"]) < 3000
    assert line["step"][-1] == 3000


@pytest.mark.parametrize(
    "text",
    ["<script>", "</script>", "</script x", "<!-- <script ", _HOSTILE, "<!--", "]]>", "{{body}}", "' onmouseover='alert(1)"],
)
@pytest.mark.parametrize(
    "make", [comparison, lambda: judged(19), lambda: judged(6, task="instruct")], ids=["old", "search", "samples"]
)
def test_hostile_text_stays_text(text, make):
    record = _spoilt(make(), text)
    for method, original in zip(record["methods"], make()["methods"]):
        method["status"] = original["status"]
    for sample in record.get("samples", ()):
        sample["answers"] = {text: text}
    clean, page = _Page(report.render(make())), _Page(report.render(record))
    assert page.count("script") == clean.count("script") == 2
    assert page.count("img") == 0
    assert page.scripts[1] == clean.scripts[1]
    assert "<" not in page.scripts[0]
    allowed = {name for _, attributes in clean.tags for name in attributes}
    assert {name for _, attributes in page.tags for name in attributes} <= allowed
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    shown = re.sub("[\x1b\u202e\u2028]", "", text).replace("\ud800", "?")
    assert page.data()["methods"][0]["label"] == shown
    assert shown in page.text


def test_hostile_keys_stay_text():
    record = comparison()
    record["settings"] = {"<b onclick=x>": {"</dd><script>": ["<i>", None, 1]}}
    page = _Page(report.render(record))
    assert page.count("script") == 2
    assert "<b onclick=x>" in page.text


def _without(record, path):
    record = copy.deepcopy(record)
    holder = record
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return record


def _paths(record):
    yield from ([key] for key in record)
    for key in ("metric", "model", "data", "winner", "environment"):
        yield from ([key, inner] for inner in record[key])
    yield from (["methods", 0, key] for key in record["methods"][0])
    for key in ("judgement", "search"):
        yield from ([key, inner] for inner in record.get(key, {}))
    if "search" in record:
        yield from (["search", "visits", 0, key] for key in record["search"]["visits"][0])
    if record.get("samples"):
        yield from (["samples", 0, key] for key in record["samples"][0])


@pytest.mark.parametrize(
    "odd", ["absent", None, "text", -1, float("nan"), [], {}, [None, {}, "x"], True, 10**400], ids=lambda v: str(v)[:12]
)
@pytest.mark.parametrize("kind", ["old", "judged"])
def test_odd_values_are_left_out(odd, kind):
    record = comparison(steps=5) if kind == "old" else judged(6, task="instruct")
    record["methods"] = record["methods"][:2] + record["methods"][10 if kind == "old" else -1 :]
    for path in _paths(record):
        changed = _without(record, path)
        if odd != "absent":
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            holder[path[-1]] = odd
        page = _Page(report.render(changed))
        assert "NaN" not in page.scripts[0]
        page.data()
        report.table(changed, width=100)
        report.summary(changed, width=100)
        report.fragment(changed)


@pytest.mark.parametrize("record", [{}, None, [], {"methods": [None, 3, {}]}, {"methods": [{"name": "a", "mean": 0.5}]}])
def test_nearly_nothing_gives_a_page(record):
    assert _Page(report.render(record)).count("h1") == 1


def test_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "report.html"
    assert report.write(comparison(), path) == path
    assert report.write({"title": "second"}, path) == path
    assert "<h1>second</h1>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_run_page():
    page = _Page(report.render_run(run()))
    assert "Accuracy 0.8361." in page.text
    assert "target modules" in page.text
    assert "AMD EPYC 7763" in page.text
    data = page.data()
    assert len(data["methods"][0]["curves"][0]["loss"]) == 200


@pytest.mark.parametrize(
    "losses", [[0.9, 0.5], [{"step": 10, "loss": 0.9}, {"step": 20, "loss": 0.5}], {"step": [10, 20], "loss": [0.9, 0.5]}]
)
def test_run_page_reads_losses_in_any_shape(losses):
    data = _Page(report.render_run({"method": "lora", "losses": losses})).data()
    line = data["methods"][0]["curves"][0]
    assert line["loss"] == [0.9, 0.5]
    assert line["step"] == ([1, 2] if losses == [0.9, 0.5] else [10, 20])


def test_run_page_of_a_run_inside_a_comparison():
    record = {"method": "lora", "label": "LoRA r=8", "seed": 1, "metric": "accuracy", "validation": 0.81, "test": 0.79,
              "losses": [0.7, 0.5], "loss_steps": [5, 10], "failure": None, "hits": "0101", "fingerprint": "f00"}  # fmt: skip
    page = _Page(report.render_run(record))
    assert "Test accuracy 0.79." in page.text
    assert "test accuracy 0.79, validation accuracy 0.81" in page.text
    assert page.data()["methods"][0]["curves"][0]["step"] == [5, 10]
    assert "0101" not in page.text
    failed = _Page(report.render_run(record | {"failure": "loss became nan at step 3"})).text
    assert "LoRA r=8, seed 1 failed." in failed
    assert "The run failed: loss became nan at step 3" in failed


@pytest.mark.parametrize(
    "record", [{}, None, _spoilt(run(), _HOSTILE), {"losses": "no"}, {"losses": [float("nan")] * 3, "notes": 3}]
)
def test_run_page_tolerates_anything(record):
    page = _Page(report.render_run(record))
    assert page.count("script") == 2
    page.data()


def test_a_run_shows_what_was_watched():
    from lowdim.report import render_run

    rows = [
        {"step": s, "true_grad_norm": 2.0, "projected_norm": 1.5, "captured": 0.5625, "overlap": 0.25} for s in range(1, 101)
    ]
    run = {
        "method": "galore",
        "losses": [3.0, 2.0],
        "subspaces": rows,
        "evaluations": [[50, 2.25], [100, 1.75]],
        "spikes": [7, 9],
    }
    page = render_run(run)
    assert "Overlap with the last subspaces" in page
    assert page.count("0.5625") == 12  # of a hundred steps
    assert '<th scope="row">100</th>' in page
    assert "2.2500" in page
    assert "The training loss jumped at step 7, 9." in page
    plain = render_run({"method": "lora", "losses": [3.0, 2.0], "subspaces": "x", "evaluations": [[1]], "spikes": [None]})
    assert "Subspaces" not in plain
    assert "jumped" not in plain


def test_made_up_records_are_records():
    for record in (judged(6), judged(19), judged(6, task="instruct")):
        read = ComparisonRecord.from_dict(record, "judged").to_dict()
        assert (read["judgement"], read["search"], read.get("samples", [])) == (
            record["judgement"],
            record["search"],
            record.get("samples", []),
        )
    assert RunRecord.from_dict(before_and_after(), "run").before_test == 0.493


def test_the_verdict_stands_first_and_its_reasons_below():
    record = judged(19)
    text = _Page(report.render(record)).text
    found = record["judgement"]
    said = [found["headline"], *found["reasons"], found["needed"], "All methods"]
    places = [text.replace("\u00a0", " ").index(sentence) for sentence in said]
    assert places == sorted(places)


def test_rows_say_how_far_they_are_behind_and_whether_they_may_be_best():
    record = judged(19)
    page = _Page(report.render(record))
    rows = [method for method in record["methods"] if method["mean"] is not None]
    assert sum(a.get("class") == "tag may" for _, a in page.tags) == len(record["judgement"]["may_be_best"])
    for row in rows:
        assert f"{row['mean']:.3f}" in page.text
        assert ("best mean" if not row["difference"] else f"{-100 * row['difference']:.1f}") in page.text
    assert page.text.count("± 2.1") == len(rows) - 1
    assert page.count("tr") > len(rows)


def test_an_interval_is_drawn_where_its_numbers_are():
    """Column of 100 %: 3 % margins; the scale begins 12 % left of zero and ends 4 % right of the last interval."""
    record = judged(6)
    last = max(-m["difference"] for m in record["methods"] if not m.get("trivial"))
    high = last + 0.021  # points are a hundred times as many, at the same places
    text = report.render(record)
    middle = next(m for m in record["methods"] if m["name"] == "galore")

    def place(value):
        return 3 + 94 * (value + 0.12 * high) / (1.16 * high)

    row = text[text.index('data-v="GaLore"') : text.index("</tr>", text.index('data-v="GaLore"'))]
    (x,) = re.findall(r'class="mean[^"]*" cx="([\d.]+)%"', row)
    (ends,) = re.findall(r'class="bar" x1="([\d.]+)%" x2="([\d.]+)%"', row)
    behind = -middle["difference"]
    assert float(x) == pytest.approx(place(behind), abs=0.02)
    assert [float(e) for e in ends] == pytest.approx([max(3, place(behind - 0.021)), place(behind + 0.021)], abs=0.02)


def test_forecasts_that_agree_are_one_sentence():
    record = judged(6)
    agreeing = _Page(report.render(record)).text
    assert "every forecast is within" in agreeing
    assert "of the peak" not in agreeing
    row = record["methods"][2]
    row["forecast_peak_bytes"] = int(1.3 * row["measured_peak_bytes"])
    off = _Page(report.render(record)).text
    assert "every forecast is within" not in off
    assert "+30 %" in off
    assert "off by up to 30% (Full fine-tuning)" in off


def test_methods_that_left_in_the_search_are_folded_away_with_the_reason():
    record = judged(19)
    left = [m for m in record["methods"] if m["status"] == "left"]
    page = _Page(report.render(record))
    assert f"{len(left)} methods left in the search" in page.text
    assert page.text.count(left[0]["reason"]) == len(left)
    for method in left:
        method["status"] = "ok"  # a record that does not say it: no score, and visits of the search
    assert f"{len(left)} methods left in the search" in _Page(report.render(record)).text


def test_the_search_is_also_a_table():
    record = judged(19)
    page = _Page(report.render(record))
    assert "All 114 candidates" in page.text
    drawn = page.data()["search"]
    assert drawn["rungs"][0]["count"] == 114
    reached = {}
    for visit in record["search"]["visits"]:
        reached[visit["steps"]] = reached.get(visit["steps"], 0) + 1
    assert {rung["steps"]: rung["count"] for rung in drawn["rungs"]} == reached
    lora = next(lane for lane in drawn["lanes"] if lane["name"] == "lora")
    assert sum(path["chosen"] for path in lora["paths"]) == 1
    assert len(lora["paths"]) == 6


def test_noise_is_a_band_in_the_unit_of_the_score():
    lower = judged(6, task="instruct")
    best = min(m["mean"] for m in lower["methods"])
    assert _Page(report.render(lower)).data()["band"] == pytest.approx([best, best * math.exp(0.021)])
    higher = judged(6)
    assert _Page(report.render(higher)).data()["band"] == pytest.approx([0.78 - 0.021, 0.78])
    higher["judgement"]["half_width"] = None
    assert _Page(report.render(higher)).data()["band"] is None


def test_samples_show_the_untouched_model_and_each_finalist():
    record = judged(6, task="instruct")
    text = _Page(report.render(record)).text
    assert text.count("Untouched model") >= len(record["samples"])
    assert all(sample["prompt"] in text for sample in record["samples"])
    assert "Together 48 + 24 = 72. #### 72" in text
    assert "+0." in text[text.index("Kept") :]


def test_classes_stand_next_to_the_baselines():
    text = _Page(report.render(judged(6))).text
    assert "LoRA, class by class, against Majority class" in text
    assert "F1 of Majority class" in text


def test_losses_that_do_not_differ_are_folded_away():
    record = judged(6)
    assert "folded away" not in report.render(record)
    for row in record["methods"]:
        row["curves"] = record["methods"][1]["curves"] if row.get("curves") else []
    assert "folded away" in report.render(record)


def test_the_data_section_names_columns_and_an_example():
    text = _Page(report.render(judged(6))).text
    assert "reviews.csv: text text, label label. Not used: id, date, stars." in text
    assert "slack and uninspired" in text


def test_a_run_shows_both_parts_before_and_after():
    record = before_and_after()
    text = _Page(report.render_run(record)).text
    assert "Test accuracy 0.743, 0.493 before training." in text
    for sentence in ("0.4930", "0.5070", "0.7710", "+0.25", "Always answering the majority class", "0.5000"):
        assert sentence in text
    for shown in ("there was a cat", "the the the", "Loss on the kept text", "+0.13", "Precision", "Not used: id, date."):
        assert shown in text


@pytest.mark.parametrize("huge", [1.7e308, -1.7e308, 5e-324])
def test_the_ends_of_what_a_number_can_be_are_drawn(huge):
    for keys in (("mean",), ("difference",), ("half_width",), ("mean", "difference", "half_width")):
        record = judged(6, task="instruct")
        record["methods"][0].update(dict.fromkeys(keys, huge))
        record["judgement"]["half_width"] = abs(huge)
        page = _Page(report.render(record))
        page.data()
        assert "nan%" not in "".join(f"{a}" for _, a in page.tags)
        report.summary(record, width=100)


def test_a_run_with_odd_values_is_drawn():
    record = before_and_after()
    for key in record:
        for odd in (None, "text", -1, float("nan"), [], {}, [None, {}, "x"], True, 10**400):
            _Page(report.render_run(record | {key: odd})).data()


def test_rates_are_compared_after_the_same_steps():
    record = judged(6)
    page = _Page(report.render(record))
    lora = next(m for m in page.data()["methods"] if m["name"] == "lora")
    first = [v for v in record["search"]["visits"] if v["method"] == "lora" and v["rung"] == 0]
    assert sorted(map(tuple, lora["trials"])) == sorted((v["lr"], v["score"], v["size"]) for v in first)
    assert "of each rate after 5 steps, the first rung" in page.text


def test_the_band_lies_around_an_untouched_model_that_is_best():
    record = judged(6, task="instruct")
    untouched = next(m for m in record["methods"] if m["name"] == "untouched")
    untouched |= {"mean": 12.0, "difference": 0.0, "may_be_best": True}
    for method in record["methods"]:
        if method is not untouched:
            method["difference"] = math.log(12.0 / method["mean"])
    assert _Page(report.render(record)).data()["band"] == pytest.approx([12.0, 12.0 * math.exp(0.021)])
