import ast
import builtins
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import AdapterSet, LoRA
from lowdim.diagnose import Reduction
from lowdim.errors import MissingExtraError
from lowdim.export import ExportResult
from lowdim.plan import forecast
from lowdim.results import Result, html_table, json_value
from lowdim.testing.result_case import ResultCase
from lowdim.train import FitResult


@dataclass(frozen=True)
class Inner(Result):
    left_out = ("heavy",)
    name: str
    heavy: torch.Tensor


@dataclass(frozen=True)
class Plain:
    values: tuple[int, ...]


@dataclass(frozen=True)
class Outer(Result):
    score: float
    label: str
    absent: None
    tensor: torch.Tensor
    array: np.ndarray
    count: np.int64
    inner: dict[str, Inner]
    plain: list[Plain]
    place: Path


@dataclass(frozen=True)
class Layers(Result):
    errors: dict[str, float]

    def rows(self):
        return [{"layer": name, "error": error} for name, error in self.errors.items()]


def outer():
    return Outer(
        math.nan,
        "<b>",
        None,
        torch.tensor([[1.0, math.inf], [-math.inf, 0.5]]).bfloat16().requires_grad_(),
        np.array([1, 2], dtype=np.int32),
        np.int64(3),
        {"0": Inner("x", torch.ones(2))},
        [Plain((1, 2))],
        Path("a") / "b",
    )


def test_to_dict_is_strict_json():
    record = outer().to_dict()
    assert record == {
        "score": None,
        "label": "<b>",
        "absent": None,
        "tensor": [[1.0, None], [None, 0.5]],
        "array": [1, 2],
        "count": 3,
        "inner": {"0": {"name": "x"}},
        "plain": [{"values": [1, 2]}],
        "place": str(Path("a") / "b"),
    }
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert all(type(value) is int for value in (*record["array"], record["count"]))


def test_what_json_has_no_form_for_is_refused_by_name():
    with pytest.raises(TypeError, match=r"Layers\.errors\['a'\]\[1\] is a set"):
        Layers({"a": [1, {2}]}).to_dict()  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"a key of Layers\.errors is a tuple.*\(1, 2\)"):
        Layers({(1, 2): 0.0}).to_dict()  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="value is a type"):
        json_value(Plain)


def test_without_a_table_of_its_own_the_plain_fields_are_one_row():
    (row,) = outer().rows()
    assert row == {"score": None, "label": "<b>", "absent": None, "count": 3, "place": str(Path("a") / "b")}
    assert list(outer().to_dataframe().columns) == list(row)
    assert str(outer()) == f"Outer: label <b>, count 3, place {Path('a') / 'b'}"


def test_a_table_is_shown_aligned_and_cut():
    result = Layers({f"layer{i}": i / 3 for i in range(25)})
    lines = str(result).splitlines()
    assert lines[:3] == ["Layers", "layer     error", "layer0        0"]
    assert lines[3] == "layer1   0.3333"
    assert lines[-1] == "and 5 more"
    assert len(lines) == 1 + 1 + 20 + 1
    frame = result.to_dataframe()
    assert frame.shape == (25, 2)
    assert frame["error"].tolist() == [i / 3 for i in range(25)]
    shown = result._repr_html_()
    assert shown.count("<tr>") == 22
    assert "and 5 more" in shown


def test_html_is_escaped():
    shown = html_table("a < b", [{"<i>": "x & y"}])
    assert "a &lt; b" in shown
    assert "<th>&lt;i&gt;</th>" in shown
    assert "<td>x &amp; y</td>" in shown
    assert "&lt;b&gt;" in outer()._repr_html_()


def test_a_result_without_a_picture_says_so():
    with pytest.raises(TypeError, match="Layers has no plot"):
        Layers({}).plot()


@pytest.mark.parametrize(("package", "call"), [("pandas", lambda r: r.to_dataframe()), ("matplotlib", lambda r: r._axes())])
def test_a_missing_extra_is_named(monkeypatch, package, call):
    real = builtins.__import__

    def without(name, *args, **kw):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf"Layers\..*{package}.*lowdim\[plot\]"):
        call(Layers({}))


def test_a_reduction_reads_like_a_dict():
    found = Reduction({"a": 0.5, "b": 0.0}, {"a": 0.1})
    assert found == {"a": 0.5, "b": 0.0}
    assert dict(found) == {"a": 0.5, "b": 0.0}
    assert not isinstance(found, dict)
    assert found.to_dict() == {"changes": {"a": 0.5, "b": 0.0}, "truncation": {"a": 0.1}}
    assert found.rows()[1] == {"layer": "b", "change": 0.0, "truncation": None}
    assert "1 of 2 layers" in str(found)


def test_an_adapted_model_shows_method_share_and_layers():
    adapted = lowdim.adapt(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)), LoRA(rank=1))
    trained, total = 1 * (6 + 4) + 1 * (4 + 2), (6 * 4 + 4) + (4 * 2 + 2) + 16
    shown = adapted._repr_html_()
    assert f"{trained} parameters trained ({trained / total:.2%}), 2 adapted layers" in shown
    assert "LoRA(rank=1" in shown
    assert "<td>0</td><td>4 x 6</td><td>10</td>" in shown


def test_a_forecast_shows_its_parts():
    found = forecast(nn.Sequential(nn.Linear(30, 20)), "lora", batch=lambda: torch.ones(2, 30), loss_fn=lambda m, b: m(b).sum())
    shown = found._repr_html_()
    assert str(found) in shown
    assert "<td>optimizer state</td>" in shown
    assert found.to_dict()["fits"] is None


# --- results of adapters: the same duties as those of diagnostics and solvers --------------------------------------------


def two_layers(rank=1, seed=0):
    torch.manual_seed(seed)
    adapted = lowdim.adapt(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).double(), LoRA(rank=rank, alpha=rank), seed=seed)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.normal_()
    return adapted


class TestMergeReport(ResultCase):
    def result(self):
        adapted = two_layers()
        adapted.merge()
        return adapted.merge_report

    def expected(self):
        layers = []
        for name, layer in two_layers().layers.items():
            change, weight = layer.update.B @ layer.update.A, layer.base.weight
            layers.append(
                {
                    "layer": name,
                    "relative_change": change.square().sum().sqrt() / weight.square().sum().sqrt(),
                    "largest_change": change.abs().max(),
                    "rounding_error": 0.0,
                    "sparsity_before": 0.0,
                    "sparsity_after": 0.0,
                    "dropped": 0.0,
                }
            )
        return {"layers": layers, "untied": (), "dequantized": {}}

    def refusals(self):
        return []


class TestCombination(ResultCase):
    def sets(self):
        adapters = AdapterSet(nn.Sequential(nn.Linear(6, 4)).double())
        for seed, name in enumerate(("one", "other")):
            adapters.add(name, LoRA(rank=1, alpha=1), seed=seed)
            torch.manual_seed(seed)
            nn.init.normal_(adapters.adapters[name].layers["0"].update.B)
        return adapters

    def result(self):
        return self.sets().combine("sum", {"one": 2.0, "other": -0.5}, rank=1)

    def expected(self):
        one, other = (self.sets().adapters[name].layers["0"].update for name in ("one", "other"))
        wanted = 2.0 * one.B @ one.A - 0.5 * other.B @ other.A
        s = np.linalg.svd(wanted.detach().numpy())[1]  # what is beyond rank 1 is lost
        return {"ranks": {"0": 1}, "errors": {"0": np.sqrt((s[1:] ** 2).sum() / (s**2).sum())}, "exact": False}

    def refusals(self):
        return [(ValueError, "rank", lambda: self.sets().combine("sum", {"one": 1.0}, rank=0))]


class TestPeftExport(ResultCase):
    unchecked = {"folder": "it lies where the test runs"}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.folder = tmp_path / "peft"

    def result(self):
        self.whole = two_layers(rank=2)
        return self.whole.export(self.folder, format="peft", rank=1)

    def expected(self):
        deltas = {name: layer.delta().double().numpy() for name, layer in self.whole.layers.items()}
        s = {name: np.linalg.svd(delta, compute_uv=False) for name, delta in deltas.items()}
        return {
            "ranks": {"0": 1, "1": 1},
            "whole_ranks": {"0": 2, "1": 2},
            "errors": {name: np.sqrt((v[1:] ** 2).sum() / (v**2).sum()) for name, v in s.items()},
            "suggested_rank": 2,
            "notes": (),
            "exact": False,
        }

    def refusals(self):
        def at(rank):
            return lambda: two_layers().export(self.folder, format="peft", rank=rank)

        return [(ValueError, "rank must be", at(0)), (ValueError, "rank=3 is above what is there", at(3))]


class TestFitResult(ResultCase):
    def result(self):
        found = FitResult()
        found.read([{"step": 1, "loss": 2.5, "grad_norm": 0.5}, {"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": math.inf}])
        return found

    def expected(self):
        empty = {"peak_bytes": None, "failure": None, "subspaces": [], "spikes": [], "penalties": []}
        seconds, scores = math.nan, [(2, math.inf)]
        return {
            "steps": [1, 2],
            "losses": [2.5, 1.5],
            "grad_norms": [0.5],
            "seconds_per_step": seconds,
            "evaluations": scores,
            **empty,
        }

    def refusals(self):
        return []


def test_an_exported_model_has_a_record_without_its_loader():
    found = ExportResult(Path("out"), "peft", "import peft", nn.Identity, {"a": 0.25}, {"a": 3})
    assert "reload" not in found.to_dict()
    assert found.rows() == [{"layer": "a", "rank": 3, "whole_rank": None, "error": 0.25}]
    assert str(found).splitlines()[0] == "peft in out: largest relative error 0.25"


#: Classes with a `to_dict` of their own that are not results of a function.
RECORDS = {
    "Result": "the base itself",
    "Outcome": "the record of a reproduction, filled in while it runs",
    "CompareSettings": "settings, not a result",
    "Roles": "what a record says of the columns",
    "Used": "what a record says of the columns",
    "PELALoss": "the terms of a batch's loss, which are differentiated",
    "Fitted": "settings that a search found, with the sizes that a record keeps",
    "MultigridSchedule": "a schedule, which is made before training",
    "Turn": "a message, as chat templates take it",
    "Replacement": "a report with the vectors that it is of, which a task finds",
}


def test_every_result_is_a_subclass_of_the_base():
    source = Path(lowdim.__file__).parent
    found = {
        node.name: [ast.unparse(base) for base in node.bases]
        for path in source.rglob("*.py")
        if path.parent.name != "records"  # what files hold
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(getattr(item, "name", "") == "to_dict" for item in node.body)
    }
    assert {name for name, bases in found.items() if "Result" not in bases} == set(RECORDS)
