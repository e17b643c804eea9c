"""`lowdim plan`."""

import json

import pytest


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


FIT = ["plan", "--fit", "--model", "stories260k", "--batch-size", "8", "--length", "64"]


@pytest.mark.slow
def test_fit_writes_recipes_that_run_and_keep_the_texts_of_a_step(call, tmp_path):
    from lowdim.train.recipes import load_recipe

    out, budget = tmp_path / "recipes", 8 * 2**20
    arguments = [*FIT, "--budget", "8MiB", "--methods", "full,lora", "--rank", "4", "--json"]
    code, text, _ = call(*arguments, "--write-recipes", out, "--data", "lowdim:shakespeare")
    assert code == 0
    found = {row["method"]: row for row in json.loads(text)}
    assert all(row["fits"] and row["forecast"]["total"] <= budget for row in found.values())
    assert found["full"]["changes"]["batch_size"] < 8
    assert sorted(path.name for path in out.iterdir()) == ["full.yaml", "lora.yaml"]
    for name in ("full", "lora"):
        recipe = load_recipe(out / f"{name}.yaml")
        assert recipe.batch_size * recipe.gradient_accumulation == 8
        assert recipe.gradient_checkpointing == found[name]["forecast"]["gradient_checkpointing"]
        assert (recipe.method, recipe.max_length, recipe.data) == (name, 64, ["lowdim:shakespeare"])
    assert load_recipe(out / "lora.yaml").options == {"rank": 4}
    code, _, _ = call("run", out / "full.yaml", "--steps", "2", "--out", tmp_path / "run")
    assert code == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["method"] == "full"


def test_fit_prints_a_line_for_each_method(call):
    code, out, _ = call(*FIT, "--budget", "8MiB", "--methods", "full,lora")
    assert code == 0
    assert "8 x 64 tokens a step in 8.00 MiB" in out
    (line,) = (line for line in out.split("\n") if line.startswith("Full fine-tuning"))
    assert "--batch-size" in line
    assert "--accumulate" in line


@pytest.mark.slow
def test_fit_with_a_budget_that_nothing_fits(call, tmp_path):
    code, _, err = call(*FIT, "--budget", "1MiB", "--methods", "lora", "--write-recipes", tmp_path / "r")
    assert code == 2
    assert "nothing fits 1.00 MiB: the smallest need is " in err
    assert " are missing; " in err
    assert not (tmp_path / "r").exists()


def test_options_of_fit_that_make_no_sense(refused, tmp_path):
    assert "--fit needs --budget" in refused(*FIT)
    assert "forecasts nothing; leave out --fit" in refused(*FIT, "--budget", "1GiB", "--layers")
    assert "forecasts nothing; leave out --fit, --budget" in refused("plan", "--model", "stories260k", "--layers", "--json")
    assert "for --fit" in refused("plan", "--model", "stories260k", "--write-recipes", tmp_path / "r")
    assert "name their folder" in refused(*FIT, "--budget", "1GiB", "--data", "a.jsonl")
    assert "float16" in refused(*FIT, "--budget", "1GiB", "--dtype", "float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty" in refused(*FIT, "--budget", "1GiB", "--write-recipes", tmp_path / "full")


def test_a_configuration_alone_is_a_model(call, refused, bert_folder, tmp_path):
    common = ["--task", "classify", "--length", "16", "--methods", "lora", "--json"]
    whole = json.loads(call("plan", "--model", bert_folder, *common)[1])
    content = (bert_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(content)
    (tmp_path / "shape.json").write_text(content)
    for name in (tmp_path, tmp_path / "config.json", tmp_path / "shape.json"):
        (row,) = json.loads(call("plan", "--model", name, *common)[1])
        assert row["total"] == whole[0]["total"]
    (tmp_path / "shape.json").write_text(json.dumps({**json.loads(content), "model_type": "berd"}))
    message = refused("plan", "--model", tmp_path / "shape.json", *common)
    assert "architecture 'berd', which transformers" in message
    assert "nearest: bert" in message


def test_rates_from_curvature_stand_beside_the_memory(call):
    common = [
        "plan",
        "--model",
        "stories260k",
        "--data",
        "lowdim:shakespeare",
        "--methods",
        "lora,galore,q-galore",
        "--length",
        "16",
    ]
    common += ["--batch-size", "2", "--accumulate", "2", "--rates", "curvature"]
    code, out, err = call(*common, "--json")
    assert code == 0, err
    lora, galore, q_galore = (row["measured_rate"] for row in json.loads(out))
    assert lora["lr"] == pytest.approx(19 / lora["eigenvalue"])
    assert galore["lr"] == pytest.approx(galore["limit"] / 2)
    assert "lr" not in q_galore
    assert f"LoRA: rate {lora['lr']:.3g} from curvature, half of the limit" in err
    assert "Q-GaLore: no rate from curvature: " in err
    code, out, err = call(*common)
    assert code == 0, err
    (row,) = (line for line in out.splitlines() if line.startswith("LoRA "))
    assert row.split()[-1] == f"{lora['lr']:.2g}"
    assert f"(largest eigenvalue {lora['eigenvalue']:.4g} ± " in out


def test_rates_of_plan_that_cannot_be_measured(refused):
    common = ["plan", "--model", "stories260k", "--methods", "lora", "--length", "16"]
    data = ["--data", "lowdim:shakespeare"]
    curvature = [*data, "--rates", "curvature"]
    message = refused(*common, "--rates", "curvature")
    assert "--rates curvature needs --data" in message
    assert "lowdim compare --rates curvature" in message
    assert "--rates must be one of curvature; got 'foo'" in refused(*common, *data, "--rates", "foo")
    assert "leave out --dtype, --devices" in refused(*common, *curvature, "--dtype", "bfloat16", "--devices", "2")
    assert "leave out one of the two" in refused(*common, *curvature, "--fit", "--budget", "1GiB")
    assert "forecasts nothing" in refused(*common, *curvature, "--layers")
    assert "is a shape without a tokenizer" in refused("plan", "--model", "llama-7b", *curvature)


def test_plan_with_ranks_by_layer(call, refused, bert_folder, tmp_path):
    """The forecast is that of the training: as many trained numbers as a rank in each layer gives."""
    common = ["plan", "--model", bert_folder, "--task", "classify", "--length", "16"]
    code, out, err = call(*common, "--methods", "lora,full", "--ranks", "farms", "--json")
    assert code == 0
    assert err == "--ranks does not change Full fine-tuning: they have no rank by layer\n"
    twin, full = json.loads(out)
    assert (twin["method"], full["method"]) == ("lora+farms", "full")
    code, out, _ = call(*common, "--methods", "lora", "--json")
    uniform = json.loads(out)[0]["trained_parameters"]
    assert abs(twin["trained_parameters"] - uniform) <= 0.05 * uniform
    code, out, _ = call(*common, "--methods", "lora+farms", "--json")
    assert json.loads(out)[0]["trained_parameters"] == twin["trained_parameters"]
    assert "needs a method with a rank in each layer, such as lora; got full" in refused(
        *common, "--methods", "full", "--ranks", "farms"
    )
    assert "--ranks must be one of uniform, farms" in refused(*common, "--ranks", "farm")
    (tmp_path / "config.json").write_text((bert_folder / "config.json").read_text())
    message = refused("plan", "--model", tmp_path, *common[3:], "--methods", "lora", "--ranks", "farms")
    assert "--ranks farms measures weights, and a configuration alone has none" in message
    assert "a configuration alone has none" in refused("plan", "--model", "llama-tiny", "--methods", "lora", "--ranks", "farms")
    assert "here they are random" in refused("run", "--model", "llama-tiny", "--task", "pretrain", "--ranks", "farms")
