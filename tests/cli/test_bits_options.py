"""`--quantize` and `--optimizer` on the command line."""

import json

import pytest

pytest.importorskip("torchao")

PLAN = ("plan", "--model", "stories260k", "--length", "32")


def test_plan(call):
    code, out, err = call(*PLAN, "--methods", "lora,full,galore", "--quantize", "int8", "--optimizer", "adamw8bit", "--json")
    assert code == 0
    assert [(row["method"], row["quantize"], row["optimizer"]) for row in json.loads(out)] == [("lora", "int8", "adamw8bit")]
    assert "Full fine-tuning: Full fine-tuning trains the base's own weights" in err
    assert "--optimizer does not change GaLore" in err


def test_plan_with_nothing_left(call):
    code, _, err = call(*PLAN, "--methods", "full", "--quantize", "int8")
    assert code == 2
    assert "no method can train this model; the reasons are above" in err


def test_run_is_refused_with_one_line(refused, recipe, tmp_path):
    err = refused("run", recipe(method="full"), "--quantize", "nf4")
    assert "Full fine-tuning trains the base's own weights" in err
    assert "leave out --quantize nf4" in err
    assert "quantize: Input should be 'int8', 'int4' or 'nf4'" in refused("run", recipe(), "--quantize", "int2")
    assert "has its own optimizer" in refused("run", recipe(method="galore"), "--optimizer", "adamw8bit")
    assert not (tmp_path / "out").exists()


def test_run(call, recipe, tmp_path):
    code, _, err = call("run", recipe(method="lora"), "--quantize", "int4", "--optimizer", "adamw8bit")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (record["recipe"]["quantize"], record["recipe"]["optimizer"]) == ("int4", "adamw8bit")
    code, _, err = call("export", tmp_path / "out", tmp_path / "merged", "--format", "merged")
    assert code == 0, err


def test_compare_is_refused_with_one_line(refused, tmp_path):
    how = ("compare", "--model", "stories260k", "--task", "causal-lm", "--out", tmp_path / "out")
    assert "--quantize must be one of int8, int4, nf4" in refused(*how, "--quantize", "int2")
    assert "trains the base's own weights" in refused(*how, "--methods", "full", "--quantize", "int8")
