"""`lowdim plan`."""

import json


def test_plan(call, refused, bert_folder):
    common = ["plan", "--model", bert_folder, "--task", "classify", "--length", "16"]
    code, out, err = call(*common, "--methods", "lora,full", "--json")
    assert (code, err) == (0, "")
    lora, full = json.loads(out)
    assert lora["total"] < full["total"]
    code, out, _ = call(*common, "--methods", "lora", "--layers")
    assert code == 0
    assert "bert.encoder.layer.0.attention.self.query" in out
    assert "nearest: lora" in refused(*common, "--methods", "loraa")
    assert "--dtype must be one of" in refused(*common, "--dtype", "float64")
    assert "--task must be one of" in refused(*common[:3], "--task", "translate")
    assert "--length must be an int >= 1" in refused(*common[:5], "--length", "0")
    assert "such as 8GiB" in refused(*common, "--budget", "much")


def test_plan_with_a_budget_that_is_too_small(call, bert_folder):
    common = ["plan", "--model", bert_folder, "--task", "classify", "--length", "16", "--methods", "lora"]
    code, _, err = call(*common, "--budget", "1KiB")
    assert code == 2
    assert "nothing fits" in err
    assert err.count("\n") == 1


def test_plan_for_pretraining(call):
    base = [
        "plan",
        "--task",
        "pretrain",
        "--model",
        "llama-tiny",
        "--methods",
        "galore,q-galore,lora",
        "--length",
        "32",
        "--json",
    ]
    code, out, err = call(*base, "--rank", "16", "--layerwise")
    assert code == 0, err
    rows = {row["method"]: row for row in json.loads(out)}
    assert set(rows) == {"galore", "q-galore"}  # an adapter needs a trained model
    code, out, _ = call(*base, "--rank", "64", "--layerwise")
    wider = {row["method"]: row for row in json.loads(out)}
    assert wider["galore"]["optimizer_state"] > rows["galore"]["optimizer_state"]
