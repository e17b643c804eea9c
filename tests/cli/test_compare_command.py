"""`lowdim compare`: what it refuses, with nothing left behind."""

import dataclasses

import pytest

import tiny


@pytest.fixture
def compare(refused, bert_folder, two_classes, tmp_path):
    """`lowdim compare` that must be refused and leave nothing behind, with some options changed."""

    def run(**changes):
        options = {"model": bert_folder, "data": two_classes, "out": tmp_path / "out", "methods": "lora", "steps": 3, **changes}
        message = refused(
            "compare", *(part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value))
        )
        assert not (tmp_path / "out").exists(), "nothing half-written"
        assert not list(tmp_path.glob(".*")), "and no temporary file"
        return message

    return run


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"methods": "lora,lamdaa"}, ["method must be one of", "got 'lamdaa'", "nearest: lamda"]),
        ({"methods": "lord"}, ["LoRD is not a way to train"]),
        ({"methods": ","}, ["--methods (nothing that trains a model)"]),
        ({"methods": "solve"}, ["--methods (nothing that trains a model)"]),
        ({"model": "./nowhere"}, ["--model ./nowhere: no such folder"]),
        ({"model": "minilmm"}, ["'minilmm' is not a folder", "nearest: minilm"]),
        ({"task": "clasify"}, ["--task must be one of classify, regress", "nearest: classify"]),
        ({"metric": "acuracy"}, ["metric for classify must be one of accuracy, f1", "nearest: accuracy"]),
        ({"label": "lable"}, ["no column 'lable'; nearest: label", "columns: text, label"]),
        ({"text": "txt"}, ["no column 'txt'; nearest: text"]),
        ({"budget": "8 parsecs"}, ["a size must be a number and a unit, such as 8GiB", "'8 parsecs'"]),
        ({"budget": "1KiB"}, ["nothing fits 1.00 KiB: the smallest need is ", " (LoRA)", "try a smaller batch"]),
        ({"time_limit": "soon"}, ["--time-limit must be a positive number with unit s, m or h", "'soon'"]),
        ({"time_limit": "0m"}, ["--time-limit must be a positive number"]),
        ({"seeds": 0}, ["--seeds must be an int >= 1; got 0"]),
        ({"rates": 6}, ["--rates must be an int in [1, 5]; got 6"]),
        ({"rates": "foo"}, ["--rates must be an int in [1, 5], or \"curvature\"; got 'foo'"]),
        ({"sizes": 0}, ["--sizes must be an int in [1, 4]; got 0"]),
        ({"equal": "params"}, ["--equal must be one of parameters, flops, memory, none", "'params'"]),
        ({"search": "halfing"}, ["--search must be one of halving, grid", "nearest: halving"]),
        ({"prefer": "scores"}, ["--prefer must be one of memory, time, size, score", "nearest: score"]),
        ({"ranks": "farm"}, ["--ranks must be one of uniform, farms; got 'farm'", "nearest: farms"]),
        (
            {"ranks": "farms", "methods": "full,galore"},
            ["--ranks farms needs a method with a rank in each layer", "full, galore"],
        ),
        ({"methods": "full+farms"}, ["full has no rank by layer", "such as lora"]),
        ({"methods": "lora+farm"}, ["what follows lora+ must be one of", "got 'farm'", "nearest: farms"]),
        ({"steps": 2}, ["--steps must be an int >= 3; got 2"]),
        ({"batch_size": 0}, ["--batch-size must be an int >= 1; got 0"]),
        ({"max_length": 1}, ["--max-length must be an int >= 4; got 1"]),
        ({"data": "nowhere.csv"}, ["nowhere.csv: no such file"]),
        ({"data": "lowdim:sentence-polarty"}, ["nearest: lowdim:sentence-polarity"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_compare_refuses(changes, parts, compare):
    message = compare(**changes)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is empty"),
        (b"text,label\n", "has a header and no rows"),
        (b"text,label\ngood,a\nbad,a\n", "only one class ('a')"),
        ("text,label\ncaf\u00e9,a\n".encode("latin-1"), "is not UTF-8: byte 14 (0xe9, line 2); it reads as cp1252"),
        (b"text,label\n" + b"good,a\nbad,b\n" * 9, "class 'a' has 1 examples; at least 3 are needed"),
        (b"one,two,three\na,b,c\n", "which column holds the label? name it with --label"),
        (b"\x7fELF\x02\x01\x01\x00", "is not text"),
    ],
)
def test_compare_refuses_data(content, part, compare, tmp_path):
    (tmp_path / "data.csv").write_bytes(content)
    assert part in compare(data=tmp_path / "data.csv")


def test_compare_refuses_options_that_contradict(compare):
    text = {"model": "stories260k", "task": "causal-lm", "data": "lowdim:shakespeare"}
    assert "--label is for --task classify, regress, image, embed, tokens; got 'x' for causal-lm" in compare(**text, label="x")
    assert "--methods linear-probe: a language model has no new head to probe" in compare(**text, methods="linear-probe")
    assert "tensors of a model for causal-lm are missing from its weights" in compare(
        task="causal-lm", data="lowdim:shakespeare"
    )


def test_compare_refuses_a_method_that_does_not_fit_the_model(compare, monkeypatch):
    from lowdim import catalogue

    for options, part in (({"target_modules": ["qery"]}, "'qery' matches no module"),):  # a rank that is too large is capped
        baselines = tuple(
            dataclasses.replace(b, options={**b.options, **options}) if b.name == "lora" else b for b in catalogue.BASELINES
        )
        monkeypatch.setattr("lowdim.catalogue.lookup.BASELINES", baselines)
        message = compare()
        assert "no method can be run: lora: " in message
        assert part in message


def test_compare_of_a_model_whose_weights_are_no_numbers(refused, broken_model, tmp_path):
    common = (
        "--model",
        broken_model,
        "--task",
        "causal-lm",
        "--data",
        "lowdim:shakespeare",
        "--methods",
        "lora",
        "--steps",
        "4",
    )
    message = refused("compare", *common, "--out", tmp_path / "out")
    assert "model.layers.0.self_attn.q_proj.weight has NaN or infinite entries; use another copy of the model" in message
    assert not (tmp_path / "out").exists()


def test_compare_does_not_write_over_another_folder(refused, bert_folder, two_classes, tmp_path):
    common = ["compare", "--model", bert_folder, "--data", two_classes, "--methods", "lora", "--out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is not empty and holds no comparison" in refused(*common, tmp_path / "mine")
    assert "is a file; name a folder" in refused(*common, tmp_path / "mine" / "thesis.txt")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text("{}")
    assert "already holds a comparison; continue it with --resume" in refused(*common, tmp_path / "old")


def test_brackets_in_a_path_are_no_markup(refused, bert_folder, tmp_path):
    folder = tmp_path / "[red]a[" / "nothing]"  # reads as an opening and a closing tag
    folder.mkdir(parents=True)
    file = tiny.write_jsonl(folder / "b.jsonl", [*tiny.sentences(30), ("", "positive")])
    common = ["compare", "--model", bert_folder, "--methods", "lora", "--out", folder / "out", "--budget", "1KiB", "--data"]
    assert "nothing fits" in refused(*common, file)
    assert str(folder / "nowhere.csv") in refused(*common, folder / "nowhere.csv")
