"""`--rates curvature`: one measured rate beside the usual ones, kept over a kill, and what the record says of it."""

import dataclasses
import json
import math
import shutil
import statistics

import pytest
import torch
from scipy.stats import t
from torch import nn
from torch.autograd.function import once_differentiable

from comparing import names, numbers, own, quadrants, rebuilt, records, run
from lowdim import catalogue, report
from lowdim.comparison import CompareSettings, measured_rates
from lowdim.comparison.clock import Clock
from lowdim.comparison.helped import sentence_over
from lowdim.comparison.hunt import first_candidates
from lowdim.comparison.ladder import sized
from lowdim.comparison.live import LiveTable
from lowdim.comparison.measured_rates import measure
from lowdim.comparison.runs import Run, prepared
from lowdim.errors import CheckpointError
from lowdim.records import ComparisonRecord, MeasuredRate, RatesRecord

NAMES = ("lora", "q-galore")


@pytest.fixture(scope="module")
def measured(make, tmp_path_factory):
    """A comparison with measured rates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("measured") / "out"
    return (folder, *run(make(methods=NAMES, rates="curvature", seeds=1), folder))


def candidates(result, origin):
    """The candidates of the first rung with this origin, and their scores."""
    return {
        (v["method"], v["lr"], v["size"]): v["score"]
        for v in result["search"]["visits"]
        if v["rung"] == 0 and v.get("origin", "") == origin
    }


def test_a_measured_rate_stands_beside_the_usual_search(measured, make, tmp_path):
    _, result, _ = measured
    plain, _ = run(make(methods=NAMES, rates=3, seeds=1), tmp_path / "out")
    assert candidates(result, "") == candidates(plain, ""), "the same rates, further ones too, to the same scores"
    found = {rate["method"]: rate for rate in result["rates"]["rates"]}
    assert tuple(found) == NAMES
    assert {(m, r["lr"], r.get("size")) for m, r in found.items() if "lr" in r} == set(candidates(result, "curvature"))
    assert set(found) - {method for method, _, _ in candidates(result, "curvature")} == {"q-galore"}
    assert "Q-GaLore keeps weights in few bits" in found["q-galore"]["reason"]
    for rate in found.values():
        if "lr" in rate:
            assert rate["lr"] == pytest.approx(0.5 * 38 / rate["eigenvalue"])
            assert 0 <= rate["error"] < rate["eigenvalue"]
            assert isinstance(rate["survived"], bool)
    assert "rates" not in plain
    assert not (tmp_path / "out" / "rates.json").exists()


def test_the_difference_is_that_to_the_best_usual_rate_at_the_last_rung_of_both(measured):
    folder, result, _ = measured
    known = records(folder, "rung-*")
    for rate in (rate for rate in result["rates"]["rates"] if "lr" in rate):
        peers = [r for r in known.values() if (r["method"], r.get("size")) == (rate["method"], rate.get("size"))]
        mine = {r["rung"]: r for r in peers if r.get("origin") == "curvature"}
        usual = [r for r in peers if "origin" not in r]
        assert {r["lr"] for r in mine.values()} == {rate["lr"]}
        last = max(set(mine) & {r["rung"] for r in usual})
        assert rate["steps"] == last
        there = {r["lr"]: r for r in usual if r["rung"] == last}
        best = there[rate["usual"]]
        assert best["validation"] == max(r["validation"] for r in there.values())
        gaps = [a - b for a, b in zip(mine[last]["validation_values"], best["validation_values"], strict=True)]
        assert rate["difference"] == pytest.approx(statistics.fmean(gaps), abs=1e-12)
        half = t.ppf(0.975, len(gaps) - 1) * statistics.stdev(gaps) / math.sqrt(len(gaps))
        assert rate["half_width"] == pytest.approx(half, abs=1e-12)
        ends = [v for v in result["search"]["visits"] if v.get("origin") and v["method"] == rate["method"]]
        assert rate["survived"] is ends[-1]["goes_on"]


def test_page_terminal_and_record_say_it(measured):
    folder, result, said = measured
    sentence = result["rates"]["sentence"]
    assert sentence.startswith("The measured rate was best for ")
    assert "No rate was measured for Q-GaLore." in sentence
    page = (folder / "report.html").read_text()
    flat = " ".join(said.split())
    assert sentence in page
    assert sentence in flat
    assert "Measured learning rates" in page
    for rate in result["rates"]["rates"]:
        if "lr" in rate:
            assert f"lr {rate['lr']:g} (curvature)" in said, "a line for its run"
            assert f"{rate['label']}: rate {rate['lr']:.3g} from curvature" in flat
            assert f"{rate['eigenvalue']:.4g} ± " in page
    assert "not measured: the limit holds for Adam" in page
    assert '"origin":"curvature"' in page.replace(" ", ""), "the tree knows it"
    read = ComparisonRecord.read(folder)
    assert read.to_dict() == json.loads(json.dumps(result))
    assert report.render({"methods": [{"name": "lora"}], "rates": {"rates": [{"method": "lora"}, 3, {"lr": "x"}]}})


@pytest.mark.parametrize("ticks", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_killed_and_resumed_gives_the_same_tree(ticks, measured, make, tmp_path, monkeypatch):
    folder, result, _ = measured
    settings = make(methods=NAMES, rates="curvature", seeds=1)
    left = [ticks]

    def tick(self):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LiveTable, "tick", tick)
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "out")
    assert (tmp_path / "out" / "rates.json").read_bytes() == (folder / "rates.json").read_bytes()
    monkeypatch.setattr(measured_rates, "measure", lambda *args, **how: pytest.fail("it is measured once"))
    again, _ = run(settings, tmp_path / "out", resume=True)
    assert numbers(again) == numbers(result)
    assert names(tmp_path / "out") == names(folder)


@pytest.mark.slow
def test_killed_while_measuring(measured, make, tmp_path, monkeypatch):
    _, result, _ = measured
    settings, original, seen = make(methods=NAMES, rates="curvature", seeds=1), measured_rates.measure, []

    def killed(bench, chosen, *rest):
        seen.append(chosen.name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return original(bench, chosen, *rest)

    monkeypatch.setattr(measured_rates, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "out")
    again, _ = run(settings, tmp_path / "out", resume=True)
    assert seen == ["lora", "q-galore", "q-galore"], "what was measured is kept"
    assert numbers(again) == numbers(result)


def test_other_rates_are_refused_on_resume(measured, make):
    folder, _, _ = measured
    with pytest.raises(ValueError, match=r"made with different settings: --rates was 'curvature'"):
        run(make(methods=NAMES, rates=3, seeds=1), folder, resume=True)


def test_damaged_rates_are_refused(measured, make, tmp_path):
    folder = shutil.copytree(measured[0], tmp_path / "out")
    text = (folder / "rates.json").read_text()
    (folder / "rates.json").write_text(text.replace('"clipped": false', '"clipped": true', 1))
    with pytest.raises(CheckpointError, match=r"rates\.json"):
        run(make(methods=NAMES, rates="curvature", seeds=1), folder, resume=True)


def test_bad_rates():
    for rates, said in (("foo", "'foo'"), ("", "''")):
        with pytest.raises(ValueError, match=rf'--rates must be an int in \[1, 5\], or "curvature"; got {said}'):
            CompareSettings(model="minilm", data=("a.csv",), rates=rates)
    with pytest.raises(ValueError, match=r"--rates must be an int in \[1, 5\]; got 6"):
        CompareSettings(model="minilm", data=("a.csv",), rates=6)
    assert CompareSettings(model="minilm", data=("a.csv",), rates="curvature").usual_rates == 3


# --- one measurement --------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(make, tmp_path):
    return rebuilt(make(), tmp_path)


def test_lora_is_measured_after_a_warm_up(bench):
    """With B = 0 only B has a gradient: the curvature that A has together with B is unknown to Adam."""
    chosen = sized(catalogue.variant("lora"), 4)
    start, later = (measure(bench, chosen, 4, 0, warm=warm) for warm in (0, None))
    model = prepared(bench, Run(chosen, "trial", 0, 1e-3, 0, 5, 4))[1].model
    of_a = sum(p.numel() for name, p in model.named_parameters() if name.endswith(".A"))
    assert start.idle >= of_a > 0
    assert later.idle < of_a
    assert later.limit < start.limit, "A and B together are sharper than B alone"
    assert measure(bench, chosen, 4, 0) == later, "seeded"


def test_galore_is_measured_in_its_subspace(bench):
    """At full rank the subspace is everything, and a scale of 1/4 allows four times the rate of plain Adam."""
    chosen = catalogue.variant("galore")
    narrow, wide = (measure(bench, sized(chosen, rank), rank, 0) for rank in (2, 8))
    assert narrow.reason == wide.reason == ""
    for found in (narrow, wide):
        assert found.limit == pytest.approx(38 / found.eigenvalue)
    assert narrow.limit > wide.limit, "fewer directions, and the sharpest are not all among them"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fira", "the limit holds for Adam's steps; Fira also moves weights outside of its subspace"),
        ("q-galore", "the limit holds for Adam's steps in floating point; Q-GaLore keeps weights in few bits"),
    ],
)
def test_an_optimizer_whose_steps_are_not_adams_says_why(name, reason, bench):
    rate = measure(bench, sized(catalogue.variant(name), 4), 4, 0)
    assert (rate.lr, rate.reason) == (None, reason)


def test_the_kink_of_maestros_penalty_does_not_limit_its_rate(bench):
    """Without it `lasso / ‖tail‖` of the last component of each layer decides, and the rate is far too low."""
    chosen = catalogue.variant("maestro")
    rate = measure(bench, chosen, None, 0, warm=1)
    none = measure(bench, dataclasses.replace(chosen, options={**chosen.options, "lasso": 0.0}), None, 0, warm=1)
    assert rate.limit > 0.5 * none.limit


def test_a_method_that_grows_while_it_trains_is_measured(bench):
    """IncreLoRA adds groups to its optimizer during the warm-up."""
    rate = measure(bench, catalogue.variant("increlora"), None, 0)
    assert rate.reason == ""
    assert rate.lr > 0


def test_measuring_leaves_model_and_random_stream_alone(bench):
    before = {name: p.clone() for name, p in bench.model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    measure(bench, catalogue.variant("full"), None, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in bench.model.state_dict().items())


@pytest.mark.parametrize(("safety", "end"), [(1e12, 100 * 2e-4), (1e-12, 1e-5 / 100)])
def test_a_rate_far_from_the_usual_ones_is_clipped(safety, end, bench, monkeypatch):
    chosen = catalogue.variant("full")
    assert (max(chosen.rates), min(chosen.rates)) == (2e-4, 1e-5)
    free = measure(bench, chosen, None, 0)
    assert not free.clipped
    monkeypatch.setattr(measured_rates, "SAFETY", safety)
    clipped = measure(bench, chosen, None, 0)
    assert clipped.clipped
    assert clipped.lr == pytest.approx(end)
    assert clipped.limit == free.limit, "and the limit is reported as it is"
    assert "clipped to 100 times the range" in measured_rates.rate_sentence(clipped)


class _Once(torch.autograd.Function):
    """A layer of which the second derivative is unknown."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class _OnceLayer(nn.Module):
    def forward(self, x):
        return _Once.apply(x)


def test_a_method_that_cannot_be_measured_keeps_its_usual_rates(tmp_path):
    def once():
        return nn.Sequential(nn.Linear(2, 16), _OnceLayer(), nn.Linear(16, 4))

    found = own(tmp_path / "out", quadrants(), model=once, rates="curvature", methods="full")
    (rate,) = found.record.rates.rates
    assert rate.lr is None
    assert "cannot be differentiated twice" in rate.reason
    assert "@once_differentiable" in rate.reason
    visits = [v for v in found.record.search.visits if v.rung == 0]
    usual = first_candidates({"full": catalogue.variant("full")}, {"full": (None,)}, 3, scratch=True)
    assert {v.lr for v in visits} >= {c.lr for c in usual}
    assert not any(v.origin for v in visits)
    assert "not measured: the loss cannot be differentiated twice" in found.page.read_text()
    assert found.record.rates.sentence == "No rate was measured for Full fine-tuning."


def test_a_time_limit_goes_to_the_search_first(bench):
    able, sizes = {"full": catalogue.variant("full")}, {"full": (None,)}
    clock = Clock(limit=1e-9)
    (rate,) = measured_rates.measured_rates(bench, able, sizes, 0, clock)
    assert "the time limit of" in rate.reason
    assert not (bench.folder / "rates.json").exists(), "a longer limit measures it"


def test_the_sentence():
    def rate(label, difference=None, half=0.1, **how):
        return MeasuredRate(method=label, label=label, lr=0.1, survived=False, difference=difference, half_width=half, **how)

    rates = [rate("a", 0.2), rate("b", 0.05), rate("c", -0.3), rate("d", -0.01), rate("e", None, None)]
    assert sentence_over(rates) == (
        "The measured rate was best for 2 of 5 methods (a, b), beyond the interval for 1. A usual rate was better beyond the "
        "interval for 1. At the measured rate there was no score for e."
    )
    assert sentence_over([]) == ""
    assert RatesRecord("curvature", "loss", rates).to_dict()["rates"][0]["difference"] == 0.2
