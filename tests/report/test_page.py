"""The page as text: it is well-formed, complete, safe whatever the record holds, and asks for nothing outside itself."""

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from fake import comparison, run

from lowdim import report

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
    assert len(report.render({"methods": []}).encode()) < 70_000
    assert len(report.render(comparison()).encode()) < 150_000


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
def test_hostile_text_stays_text(text):
    record = _spoilt(comparison(), text)
    for method, original in zip(record["methods"], comparison()["methods"]):
        method["status"] = original["status"]
    clean, page = _Page(report.render(comparison())), _Page(report.render(record))
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


@pytest.mark.parametrize(
    "odd", ["absent", None, "text", -1, float("nan"), [], {}, [None, {}, "x"], True, 10**400], ids=lambda v: str(v)[:12]
)
def test_odd_values_are_left_out(odd):
    record = comparison(steps=5)
    record["methods"] = record["methods"][:2] + record["methods"][10:]
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
    assert "Accuracy 0.8361" in page.text
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
    assert "Test accuracy 0.79, validation accuracy 0.81" in page.text
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
    assert "<td>100</td>" in page
    assert "2.2500" in page
    assert "The training loss jumped at step 7, 9." in page
    plain = render_run({"method": "lora", "losses": [3.0, 2.0], "subspaces": "x", "evaluations": [[1]], "spikes": [None]})
    assert "Subspaces" not in plain
    assert "jumped" not in plain
