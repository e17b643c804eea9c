"""`--ranks farms`: a second row for each adapter with ranks by layer, judged against the first."""

import numpy as np
import pytest
from torch import nn

from comparing import by_name, interrupted_after, names, network, numbers, own, quadrants, records, run
from lowdim.catalogue import variant
from lowdim.comparison.by_layer import ranks_record
from lowdim.comparison.judge import judge
from lowdim.comparison.setting_up import Field
from lowdim.diagnose import farms_ranks
from lowdim.files import read_json
from lowdim.methods.exponents import layer_exponents
from lowdim.records import ComparisonRecord, MethodRecord, RankPair
from lowdim.surgery import matrix_shape

METHODS = ("lora", "full")


@pytest.fixture(scope="module")
def wanted(make):
    return make(ranks="farms", methods=METHODS, rates=1)


@pytest.fixture(scope="module")
def ranked(wanted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranked") / "out"
    return (folder, *run(wanted, folder))


def test_adapters_enter_twice_at_the_same_cost(ranked):
    folder, result, said = ranked
    rows = by_name(result)
    assert list(rows) == ["lora", "lora+farms", "full"]
    assert all(row["status"] == "ok" for row in rows.values()), "both rows of a pair reach the final"
    one, twin = rows["lora"], rows["lora+farms"]
    assert abs(twin["trained_parameters"] - one["trained_parameters"]) <= 0.05 * one["trained_parameters"]
    assert {trial["size"] for trial in twin["trials"]} == {trial["size"] for trial in one["trials"]} == {8}
    assert twin["label"] == "LoRA + FARMS"
    assert any("one row each: Full fine-tuning" in note for note in result["notes"])
    assert (folder / "runs" / "lora+farms" / "seed-0" / "adapter" / "adapter.json").is_file()
    assert "Ranks from FARMS: better for" in " ".join(said.split())


def test_ranks_follow_the_exponents_of_the_base(ranked, wanted):
    from lowdim.comparison.workbench import workbench

    folder, result, _ = ranked
    model = workbench(wanted).load()
    found = result["ranks"]
    assert found["exponents"] == read_json(folder / "settings.json")["exponents"]
    assert found["exponents"] == layer_exponents(model, ("classifier",)).alphas
    rank = by_name(result)["lora+farms"]["size"]
    layers = list(found["layers"]["lora+farms"])
    shapes = [matrix_shape(model.get_submodule(name)) for name in layers]
    want = farms_ranks([found["exponents"][name] for name in layers], shapes, rank)
    assert found["layers"]["lora+farms"] == dict(zip(layers, want, strict=True))
    saved = read_json(folder / "runs" / "lora+farms" / "seed-0" / "adapter" / "adapter.json")["layers"]
    assert {name: entry["meta"]["rank"] for name, entry in saved.items()} == found["layers"]["lora+farms"]


def test_the_verdict_of_a_pair_is_the_judges(ranked):
    folder, result, _ = ranked
    rows = by_name(result)
    values = {name: [record["values"] for path, record in sorted(records(folder).items())
                     if path.startswith(f"{name}/seed-")] for name in rows}  # fmt: skip
    trivial = [row for row in result["methods"] if row.get("trivial")]
    assert trivial, "the judge's table has the constant answer, too"
    for pair in result["ranks"]["pairs"]:
        one, twin = (np.mean(values[name]) for name in (pair["method"], f"{pair['method']}+farms"))
        assert pair["difference"] == pytest.approx(twin - one, abs=1e-12)
        assert pair["half_width"] >= 0
        shown = abs(pair["difference"]) > pair["half_width"]
        assert pair["verdict"] == ("not distinguishable" if not shown else "better" if twin > one else "worse")
    assert result["ranks"]["sentence"] in result["judgement"]["reasons"]


def test_the_record_and_the_page_have_it(ranked):
    folder, result, _ = ranked
    assert ComparisonRecord.read(folder).to_dict() == result
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert result["ranks"]["sentence"][:40] in page
    assert "LoRA + FARMS" in page


@pytest.mark.parametrize("ticks", [pytest.param(8, marks=pytest.mark.slow), 25])
def test_killed_and_resumed_gives_the_same_numbers(ticks, ranked, wanted, tmp_path, monkeypatch):
    interrupted_after(ticks, wanted, tmp_path / "out", monkeypatch)
    monkeypatch.setattr("lowdim.comparison.by_layer.layer_exponents", None)  # what was measured is read again
    result, _ = run(wanted, tmp_path / "out", resume=True)
    assert numbers(result) == numbers(ranked[1])
    assert names(tmp_path / "out") == names(ranked[0])


def test_another_choice_of_ranks_is_refused(ranked, make):
    with pytest.raises(ValueError, match="--ranks was 'farms'"):
        run(make(methods=METHODS, rates=1), ranked[0], resume=True)


def test_a_row_can_be_named_alone(make, tmp_path):
    result, _ = run(make(methods=("lora+farms",), seeds=1, rates=1), tmp_path / "out")
    assert list(by_name(result)) == ["lora+farms"]
    assert result["ranks"]["pairs"] == []
    assert result["ranks"]["layers"]["lora+farms"]


def record_of(scores, sizes=(8, 8)):
    """Of LoRA with and without ranks by layer, with these scores `(2, seeds, rows)`."""
    chosen = [variant("lora"), variant("lora").by_farms({"a": 2.0, "b": 3.0})]
    rows = [MethodRecord(name=v.name, label=v.label, size=size) for v, size in zip(chosen, sizes, strict=True)]
    entered = Field(chosen, exponents={"a": 2.0, "b": 3.0})
    found = None if scores is None else judge([v.name for v in chosen], np.array(scores))
    return ranks_record(entered, rows, {}, found, "accuracy")


def test_sentences():
    draw = np.random.default_rng(0)
    base = draw.normal(0.5, 0.1, (1, 3, 200))
    noise = draw.normal(0, 0.01, (3, 200))
    better = record_of(np.concatenate([base, base + 0.2 + noise]))
    assert better.sentence.startswith("Ranks from FARMS: better for 1 of 1 method (LoRA +20.")
    worse = record_of(np.concatenate([base, base - 0.2 + noise]), sizes=(8, 2))
    assert worse.sentence.startswith("Ranks from FARMS: better for 0 of 1 method, worse for 1 (LoRA -2")
    assert worse.sentence.endswith("points of accuracy, at rank 2 against 8; above 0 is better).")
    same = record_of(np.concatenate([base, base + noise]))
    assert "better for 0 of 1 method, not distinguishable for 1 (LoRA " in same.sentence
    single = record_of(np.concatenate([base, base + 0.2])[:, :1])
    assert "better for 0 of 1" in single.sentence
    assert "one seed shows no difference" in single.sentence
    assert record_of(None).pairs == [RankPair(method="lora", label="LoRA", sizes=[8, 8])]
    assert record_of(None).sentence == "Ranks from FARMS were not judged: LoRA did not reach the end in both forms."


def three():
    return nn.Sequential(nn.Linear(2, 40), nn.Linear(40, 40), nn.Linear(40, 4))


@pytest.mark.parametrize(
    ("model", "part"),
    [
        (network, "need at least two layers: no layer can be measured; layer 0: its smaller side is 2, too small for a window"),
        (three, "need at least two layers: only layer 1 can be measured; layer 0: its smaller side is 2"),
    ],
)
def test_models_with_too_few_layers_are_refused_and_named(model, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        own(tmp_path / "out", quadrants(), model=model, methods="lora", ranks="farms", pretrained=True)
    assert not (tmp_path / "out" / "settings.json").exists()


def test_random_weights_have_no_ranks_by_layer(tmp_path, make):
    with pytest.raises(ValueError, match="--ranks farms follows from trained weights; here they are random"):
        own(tmp_path / "out", quadrants(), methods="lora", ranks="farms")
    with pytest.raises(ValueError, match="follows from trained weights"):
        make(ranks="farms", task="pretrain")
