"""`lowdim run`."""

import json

import pytest


def test_run_writes_a_folder_and_says_so(finished, call, tmp_path):
    assert {p.name for p in finished.iterdir()} >= {"adapter", "recipe.yaml", "report.html", "run.json"}
    code, out, err = call("run", finished / "recipe.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    assert err == ""
    assert "LoRA: validation perplexity" in out
    assert f"written {tmp_path / 'again' / 'adapter'}" in out


def test_run_check_prints_the_recipe_filled_in(call, recipe, tmp_path):
    code, out, _ = call("run", recipe(options={"rank": 2}), "--check", "--steps", "7")
    assert code == 0
    assert "steps: 7\n" in out
    assert "warmup: 0.1\n" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"stepz": 3}, "no recipe has a key 'stepz'; nearest: steps"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1 (got 0)"),
        ({"method": "loraa"}, "nearest: lora"),
        ({"options": {"rnk": 3}}, "method lora has no option 'rnk'; nearest: rank"),
        ({"options": {"rank": 0}}, "rank must be an int >= 1; got 0"),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_run_refuses_a_recipe_at_once(changes, part, check, refused, recipe, tmp_path):
    assert part in refused("run", recipe(**changes), *(["--check"] if check else []))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"options": {"target_modules": ["q_prj"]}}, "'q_prj' matches no module"),
        ({"metric": "f1"}, "metric for causal-lm must be one of perplexity, loss"),
        ({"model": "nowhere"}, "'nowhere' is not a folder"),
        ({"data": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"max_length": 512}, "blocks of 512 tokens"),
    ],
)
def test_run_refuses_what_does_not_fit(changes, part, refused, recipe, tmp_path):
    if "max_length" in changes:
        (tmp_path / "short.txt").write_text("Once upon a time. " * 20)
        changes = {**changes, "data": str(tmp_path / "short.txt")}
    assert part in refused("run", recipe(**changes))
    assert not (tmp_path / "out").exists()


def test_run_watches_its_layers(call, recipe, tmp_path):
    code, out, err = call("run", recipe(), "--watch", "2")
    assert code == 0, err
    assert "every 2 steps 35 layers are measured" in out
    watch = json.loads((tmp_path / "out" / "run.json").read_text())["watch"]
    assert [row["step"] for row in watch["rows"]] == [0, 2, 3]
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg viewBox") >= 3
    assert "Layers during training" in page


def test_run_names_a_method_without_layers_to_watch(refused, tmp_path):
    where = ("--task", "classify", "--model", "stories260k", "--method", "linear-probe", "--steps", "2")
    message = refused("run", *where, "--watch", "2", "--out", tmp_path / "out")
    assert "watch 2: method linear-probe has no layer to watch: no linear layer besides the prediction head" in message
    assert not (tmp_path / "out").exists()


def test_run_refuses_an_interval_below_zero(refused, recipe):
    assert "watch: Input should be greater than or equal to 0 (got -1)" in refused("run", recipe(), "--watch", "-1")


def test_run_that_diverges(refused, recipe, tmp_path):
    message = refused("run", recipe(lr=1e30, warmup=0, schedule="constant", max_grad_norm=0, method="full", steps=5))
    assert "the loss became nan at step" in message
    assert "try a smaller learning rate than 1e+30" in message
    assert not (tmp_path / "out" / "model").exists()


def test_run_of_a_model_whose_weights_are_no_numbers(refused, recipe, broken_model, tmp_path):
    message = refused("run", recipe(model=str(broken_model)))
    assert "model.layers.0.self_attn.q_proj.weight has NaN or infinite entries; use another copy of the model" in message
    assert not (tmp_path / "out" / "adapter").exists()


def test_run_does_not_write_over_a_run(refused, finished):
    before = (finished / "run.json").read_bytes()
    assert "already holds a run; continue it with --resume" in refused("run", finished / "recipe.yaml", "--out", finished)
    message = refused("run", finished / "recipe.yaml", "--out", finished, "--resume", "--steps", "5")
    assert "was made with a different recipe: steps was 3 and is 5" in message
    assert (finished / "run.json").read_bytes() == before


def test_run_with_ranks_by_layer(call, refused, recipe, tmp_path):
    """The record says which layer got which rank; so does the adapter."""
    code, out, err = call("run", recipe(method="lora", save_steps=2), "--ranks", "farms")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    layers = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())["layers"]
    assert record["ranks"] == {name: layer["meta"]["rank"] for name, layer in layers.items()}
    assert len(set(record["ranks"].values())) > 1
    assert record["recipe"]["ranks"] == "farms"
    assert (record["method"], record["label"]) == ("lora+farms", "LoRA + FARMS")
    assert any(note.startswith("ranks by layer from FARMS: ") for note in record["notes"])
    assert f"{record['trained_parameters']:,} trained parameters" in " ".join(out.split())
    before = (tmp_path / "out" / "run.json").read_bytes()
    code, out, err = call("run", recipe(method="lora", save_steps=2, ranks="farms"), "--resume")
    assert code == 0, err
    assert (tmp_path / "out" / "run.json").read_bytes() == before, "the recipe's key is the option"
    other = recipe(method="full", out=str(tmp_path / "other"))
    assert "full has no rank by layer; leave out --ranks farms" in refused("run", other, "--ranks", "farms")
    assert "farms" in refused("run", other, "--ranks", "farm")
    assert not (tmp_path / "other").exists()
