"""The page of a pipeline: numbers of its record, and no record that breaks it."""

import json
import re

import pytest
from browser import asked

from lowdim.files import write_json
from lowdim.jobs import report
from lowdim.report import render_pipeline

STEPS = [
    {"step": "dense", "what": "the model as it is", "score": 20.0, "interval": [18.0, 22.0], "change": [1.0, 1.0, 1.0],
     "disk_bytes": 2**20, "memory_bytes": 2**20, "cache_bytes": 1280, "tokens_per_second": {"1": 50.0, "8": 200.0},
     "block_errors": {"layers.0": 0.0}},
    {"step": "decompose", "what": "LoRD: 2 layers", "seconds": 3.0, "score": 25.0, "interval": [23.0, 27.0],
     "change": [1.25, 1.2, 1.3], "disk_bytes": 2**19, "memory_bytes": 2**19, "cache_bytes": 1280,
     "tokens_per_second": {"1": 60.0, "8": 250.0}, "block_errors": {"layers.0": 0.125},
     "layers": [{"name": "layers.0.<b>", "what": "rank 3", "relative_error": 0.25, "replaced": True}],
     "options": {"rank_ratio": 0.5}, "notes": ["k_proj is narrow"]},
]  # fmt: skip
RECORD = {"title": "Small", "metric": "perplexity", "higher_is_better": False, "finished": False, "steps": STEPS,
          "recipe": {"model": "small", "steps": [{}, {}, {}]}, "model": {"label": "small", "parameters": 260_000}}  # fmt: skip


def text(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.split("<main")[1].split("</main>")[0]))


def test_what_the_page_says():
    found = text(render_pipeline(RECORD)).replace("\u00a0", " ")
    assert "1.00 MiB became 512 KiB: 0.50 of the dense model." in found
    assert "Perplexity 20 before, 25 after, 25 % more." in found
    assert "1.25 [1.2, 1.3]" in found
    assert "1 of 3 steps are finished" in found
    assert "k_proj is narrow" in found
    assert "0.125" in found
    assert "layers.0.&lt;b&gt;" in found, "text of a record is no markup"


@pytest.mark.parametrize(
    "broken", [{}, {"steps": None}, {"steps": [None, 3, {"score": "x"}]}, {"steps": [{"interval": [1]}]}, None]
)
def test_no_record_breaks_it(broken):
    assert "<main" in render_pipeline(broken)


@pytest.mark.slow
def test_the_chart_has_a_point_for_each_step():
    points = asked(
        render_pipeline(RECORD), "return [...document.querySelectorAll('.point')].map((p) => p.getAttribute('aria-label'))"
    )
    assert len(points) == 2
    assert any("25" in point for point in points)


def test_lowdim_report_draws_it_again(tmp_path):
    write_json(tmp_path / "pipeline.json", RECORD, sealed=True)
    page = report(tmp_path).read_text(encoding="utf-8")
    assert page.startswith(render_pipeline(json.loads(json.dumps(RECORD)))[:2000])
