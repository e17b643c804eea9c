"""The command line: its frozen options, and one clear message with exit code 2 for whatever is wrong."""

import errno
import json
import os
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

import lowdim
import tiny
from lowdim import models
from lowdim.cli import app
from lowdim.cli.main import main

COMMANDS = {
    "list": {"name", "--available", "--can", "--json"},
    "plan": {
        "--model", "--budget", "--methods", "--task", "--batch-size", "--length", "--dtype", "--gradient-checkpointing",
        "--rank", "--layerwise", "--layers", "--json",
    },
    "compare": {
        "--model", "--data", "--eval", "--task", "--tokenizer", "--text", "--label", "--methods", "--budget", "--metric",
        "--seeds",
        "--trials", "--steps", "--batch-size", "--max-length", "--time-limit", "--seed", "--out", "--resume",
    },
    "run": {"recipe", "--out", "--resume", "--steps", "--check"},
    "export": {"adapter", "out", "--model", "--format", "--rank", "--task", "--for", "--max-error"},
    "compress": {
        "--model", "--out", "--data", "--method", "--option", "--param-ratio", "--target", "--threshold", "--tune-steps",
        "--lr", "--samples", "--max-length", "--dense",
    },
    "diagnose": {"diagnostic", "--base", "--tuned", "--option", "--k", "--threshold", "--out"},
    "report": {"source", "--out"},
    "reproduce": {"slug", "--data", "--quick", "--out"},
}  # fmt: skip


@pytest.fixture
def call(capfd):
    """Runs a command in this process: exit code, standard output and standard error."""

    def run(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(call):
    """Runs a command that must end with exit code 2 and one line on standard error, which is returned."""

    def run(*arguments):
        code, _, err = call(*arguments)
        assert code == 2, err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, f"one line is clearer than:\n{err}"
        assert "Traceback" not in err
        return err

    return run


def test_commands_and_options_are_frozen():
    """A new option is a promise: it is added here on purpose."""
    found = {
        name: {p.opts[0] if p.param_type_name == "option" else p.name for p in command.params} - {"--help"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert found == COMMANDS


def test_every_option_says_what_it_is():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        assert not [p.opts[0] for p in command.params if not getattr(p, "help", None)], name


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "list", "list adapters --available", "list --json", "compare --help", "lisst"],
)
def test_what_must_be_quick_imports_nothing_large(arguments):
    code = (
        "import sys\nfrom lowdim.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "large = {'torch', 'transformers', 'numpy', 'scipy', 'sklearn', 'pandas', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {large}' if large else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"lowdim {lowdim.__version__}\n")
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


def test_usage_errors_of_the_command_line_itself():
    for arguments in (["compare", "--stepz", "3"], ["compare", "--steps", "many"], ["nothing"], ["plan"], ["run"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, arguments


@pytest.mark.parametrize(("width", "claims"), [("80", False), ("100", False), ("160", True)])
def test_list_fits_the_terminal(call, monkeypatch, width, claims):
    monkeypatch.setenv("COLUMNS", width)
    code, out, _ = call("list")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= int(width)
    assert len([line for line in lines if "works" in line or "not yet" in line]) == 60
    assert ("what it claims" in out) == claims
    assert ("17.7x" in out) == claims
    assert "lora-sb, lora-xs" in out, "what to type is never cut"


def test_list_by_family_and_as_json(call, refused):
    _, out, _ = call("list", "solve", "--json")
    rows = json.loads(out)
    assert {row["family"] for row in rows} == {"solve"}
    _, out, _ = call("list", "--available", "--json")
    assert all(row["works"] for row in json.loads(out))
    assert "no family, system or method is called 'adapter'; nearest: adapters" in refused("list", "adapter")


def test_list_by_what_a_method_can_do(call, refused):
    found = json.loads(call("list", "--can", "merge,embedding", "--json")[1])
    assert [row["slug"] for row in found] == ["sora"]
    assert found[0]["can"] == ["merge", "conv", "embedding", "int8", "int4", "peft"]
    _, out, _ = call("list", "optim", "--can", "layerwise")
    assert "q-galore" in out
    assert "pretrain-bench" not in out
    assert "lora" in call("list", "--can", "embedding")[1].splitlines()[-1], "a baseline that can is named"
    assert "can     merge, int8, int4, peft" in call("list", "increlora")[1]
    assert "--can must be one of merge, conv" in refused("list", "--can", "merge,con")


def test_list_of_one_system_shows_its_options(call, refused):
    _, out, _ = call("list", "lord")
    assert "LORD: Low Rank Decomposition" in out
    assert "param_ratio = null   a number in (0, 1] or null" in out
    assert "the layer's share of parameters" in out
    _, out, _ = call("list", "intruders")
    assert "k = 10   a whole number >= 1" in out
    _, out, _ = call("list", "lamda")  # both of its methods, with the defaults of their rows
    assert "Options of lamda\n" in out
    assert "rank = 32   " in out
    assert "rank_choices = [24, 32, 40]" in out[out.index("Options of lamda++") :]
    _, out, _ = call("list", "low-rank-restart", "--json")
    record = json.loads(out)
    assert (record["slug"], record["name"]) == ("pretrain-bench", "Low-rank restart")
    assert record["options"]["low-rank-restart"]["interval"]["default"] == "100"
    assert "full has no options" in call("list", "full")[1]
    assert "not yet" in call("list", "pst")[1]


def test_a_reader_that_has_enough_is_no_error():
    code = "from lowdim.cli import main\nmain(['list', '--json'])\n"
    reader = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.close()
    reader.wait(timeout=60)
    assert reader.stderr.read() == b""


# --- compare ---------------------------------------------------------------------------------------------------------------


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
        ({"model": "minilmm"}, ["'minilmm' is no folder", "nearest: minilm"]),
        ({"task": "clasify"}, ["--task must be one of classify, causal-lm", "nearest: classify"]),
        ({"metric": "acuracy"}, ["metric for classify must be one of accuracy, f1, mcc", "nearest: accuracy"]),
        ({"label": "lable"}, ["no column 'lable'; nearest: label", "columns: text, label"]),
        ({"text": "txt"}, ["no column 'txt'; nearest: text"]),
        ({"budget": "8 parsecs"}, ["a size must be a number and a unit, such as 8GiB", "'8 parsecs'"]),
        ({"budget": "1KiB"}, ["--budget 1.00 KiB: nothing fits; lora needs least", "try a smaller --batch-size"]),
        ({"time_limit": "soon"}, ["--time-limit must be a positive number of s, m or h", "'soon'"]),
        ({"time_limit": "0m"}, ["--time-limit must be a positive number"]),
        ({"seeds": 0}, ["--seeds must be an int >= 1; got 0"]),
        ({"trials": 6}, ["--trials must be an int in [1, 5]; got 6"]),
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
        (b"text,label\ngood,a\nbad,a\n", "one class only ('a')"),
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
    assert "--label is for --task classify" in compare(**text, label="x")
    assert "--methods linear-probe is for --task classify" in compare(**text, methods="linear-probe")
    assert "tensors of a model for causal-lm are not in its weights" in compare(task="causal-lm", data="lowdim:shakespeare")


def test_compare_refuses_a_method_that_does_not_fit_the_model(compare, monkeypatch):
    from lowdim import catalogue

    for options, part in (
        ({"rank": 40}, "on layer bert.encoder.layer.0.attention.self.query"),
        ({"target_modules": ["qery"]}, "'qery' matches no module"),
    ):
        baselines = tuple(
            catalogue.Variant(b.name, b.label, b.target, {**b.options, **options}, b.rates) if b.name == "lora" else b
            for b in catalogue.BASELINES
        )
        monkeypatch.setattr("lowdim.catalogue.lookup.BASELINES", baselines)
        message = compare()
        assert "no method can be run: lora: " in message
        assert part in message


def test_compare_does_not_write_over_another_folder(refused, bert_folder, two_classes, tmp_path):
    common = ["compare", "--model", bert_folder, "--data", two_classes, "--methods", "lora", "--out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    assert "is not empty and holds no comparison" in refused(*common, tmp_path / "mine")
    assert "is a file; name a folder" in refused(*common, tmp_path / "mine" / "thesis.txt")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "settings.json").write_text("{}")
    assert "holds a comparison; go on with --resume" in refused(*common, tmp_path / "old")


def test_brackets_in_a_path_are_no_markup(refused, bert_folder, tmp_path):
    folder = tmp_path / "[red]a[" / "nothing]"  # reads as an opening and a closing tag
    folder.mkdir(parents=True)
    file = tiny.write_jsonl(folder / "b.jsonl", [*tiny.sentences(30), ("", "positive")])
    common = ["compare", "--model", bert_folder, "--methods", "lora", "--out", folder / "out", "--budget", "1KiB", "--data"]
    assert "nothing fits" in refused(*common, file)
    assert str(folder / "nowhere.csv") in refused(*common, folder / "nowhere.csv")


# --- run -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        keys = {
            "model": "stories260k", "task": "causal-lm", "data": "lowdim:shakespeare", "steps": 3, "limit": 8, "batch_size": 2,
            "max_length": 64, "out": str(tmp_path / "out"), **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
        return path

    return write


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of `lowdim run`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(
        "model: stories260k\ntask: causal-lm\ndata: lowdim:shakespeare\nsteps: 3\nlimit: 8\nbatch_size: 2\nmax_length: 64\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")])
    assert not end.value.code
    return folder / "out"


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
        ({"options": {"rank": 99}}, "LoRA on layer model.layers.0.self_attn.q_proj"),
        ({"options": {"target_modules": ["q_prj"]}}, "'q_prj' matches no module"),
        ({"metric": "f1"}, "metric for causal-lm must be one of perplexity, loss; got 'f1'"),
        ({"model": "nowhere"}, "'nowhere' is no folder"),
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


def test_run_that_diverges(refused, recipe, tmp_path):
    message = refused("run", recipe(lr=1e30, warmup=0, schedule="constant", max_grad_norm=0, method="full", steps=5))
    assert "the loss became nan at step" in message
    assert "try a smaller learning rate than 1e+30" in message
    assert not (tmp_path / "out" / "model").exists()


def test_run_does_not_write_over_a_run(refused, finished):
    before = (finished / "run.json").read_bytes()
    assert "holds a run; go on with --resume" in refused("run", finished / "recipe.yaml", "--out", finished)
    message = refused("run", finished / "recipe.yaml", "--out", finished, "--resume", "--steps", "5")
    assert "was made by another recipe: steps was 3 and is 5" in message
    assert (finished / "run.json").read_bytes() == before


# --- export, report, diagnose, compress, plan, reproduce ------------------------------------------------------------------


def damage(folder, kind):
    file = folder / "adapter.safetensors"
    raw = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(raw[: len(raw) // 2])
    elif kind == "flipped":
        file.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:])
    elif kind == "foreign":
        from safetensors.torch import load_file, save_file

        save_file(load_file(file), file)
    elif kind == "missing":
        file.unlink()
    elif kind == "peft":
        file.unlink()
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("truncated", "adapter.safetensors is damaged or not a safetensors file"),
        ("flipped", "is damaged: its tensors do not match its digest"),
        ("foreign", "was not written by lowdim"),
        ("missing", "adapter.safetensors does not exist"),
        ("peft", "already holds a PEFT adapter"),
    ],
)
def test_export_refuses_a_damaged_adapter(kind, part, refused, finished, tmp_path):
    import shutil

    folder = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    damage(folder, kind)
    assert part in refused("export", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_refuses_another_base_model(refused, finished, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(models.assets() / "stories260k")
    with models.quiet():
        LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    models.load_tokenizer("stories260k").save_pretrained(tmp_path / "other")
    message = refused("export", finished / "adapter", tmp_path / "out", "--model", tmp_path / "other")
    assert "was trained on another base model: the weight of layer model.layers.0.self_attn.q_proj differs" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["run", "adapter"])
@pytest.mark.parametrize("format", ["peft", "merged"])
def test_export_of_a_run_and_of_an_adapter(what, format, call, finished, tmp_path):
    source = finished if what == "run" else finished / "adapter"
    code, out, err = call("export", source, tmp_path / "out", "--format", format)
    assert (code, err) == (0, "")
    assert ("exact" in out) == (format == "peft")
    assert (tmp_path / "out" / ("adapter_config.json" if format == "peft" else "config.json")).is_file()


def test_export_of_a_classifier_finds_its_classes(call, refused, bert_folder, pooled_folder, tmp_path):
    from lowdim.adapters import LoRA

    for folder, labels in ((bert_folder, 3), (pooled_folder, 5)):
        adapted = lowdim.adapt(
            models.load_model(str(folder), "classify", num_labels=labels), LoRA(rank=2), modules_to_save=["classifier"]
        )
        place = tmp_path / folder.name
        adapted.save(place / "adapter")
        code, _, err = call("export", place, place / "out", "--format", "merged")  # a folder that holds `adapter`
        assert (code, err) == (0, "")
        again = models.load_model(str(place / "out"), "classify", num_labels=labels)
        assert models.head_modules(again, "classify") == ("classifier",)
        assert "a model for causal-lm" in refused("export", place, place / "lm", "--task", "causal-lm")


def test_export_refuses(refused, finished, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    assert "is not empty; name another folder" in refused("export", finished, tmp_path / "mine")
    assert "is a file; name a folder" in refused("export", finished, tmp_path / "mine" / "a.txt")
    assert "--format must be one of peft, merged" in refused("export", finished, tmp_path / "out", "--format", "pft")
    assert "is not a folder" in refused("export", tmp_path / "nowhere", tmp_path / "out")
    assert "rank must be an int >= 1; got 0" in refused("export", finished, tmp_path / "out", "--rank", "0")
    assert "adapter.safetensors does not exist" in refused("export", tmp_path / "mine", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "mine" / "a.txt").read_text() == "precious"


@pytest.fixture(scope="module")
def full_rank(tmp_path_factory):
    """A saved adapter whose update is not low-rank."""
    import torch

    from lowdim.adapters import RandLoRA

    adapted = lowdim.adapt(models.load_model("stories260k", "causal-lm"), RandLoRA(rank=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for i, parameter in enumerate(adapted.trainable().values()):
            parameter.normal_(generator=torch.Generator().manual_seed(i))
    return adapted.save(tmp_path_factory.mktemp("full-rank") / "adapter")


def test_export_says_what_truncating_costs_and_which_rank_would_do(call, refused, full_rank, tmp_path):
    code, out, err = call("export", full_rank, tmp_path / "four", "--rank", "4")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines() if line.startswith("model.layers.")]
    assert len(lines) == 10
    assert {rank for _, rank, _ in lines} == {"4"}
    assert all(0.1 < float(error) < 1 for _, _, error in lines)
    assert "--format merged loses nothing" in out
    (wanted,) = (line.split()[1] for line in out.splitlines() if line.startswith("--rank "))
    out = call("export", full_rank, tmp_path / "wanted", "--rank", wanted)[1]
    assert "--rank" not in out
    assert max(float(line.split()[2]) for line in out.splitlines() if line.startswith("model.layers.")) <= 0.01

    out = call("export", full_rank, tmp_path / "bound", "--max-error", "0.2", "--for", "vllm")[1]
    lines = [line.split() for line in out.splitlines() if line.startswith("model.layers.")]
    assert len({rank for _, rank, _ in lines}) == 1
    assert all(float(error) <= 0.2 for _, _, error in lines)
    assert "vllm serve" in out
    assert "--max-lora-rank 32 " in out
    assert "--lora-modules NAME=bound" in out

    assert "exact" in call("export", full_rank, tmp_path / "own")[1]
    assert "not both" in refused("export", full_rank, tmp_path / "out", "--rank", "4", "--max-error", "0.1")
    assert "max_error must be" in refused("export", full_rank, tmp_path / "out", "--max-error", "1.5")
    assert "--for must be one of vllm, llamacpp; got 'ollama'" in refused(
        "export", full_rank, tmp_path / "out", "--for", "ollama"
    )
    message = refused("export", full_rank, tmp_path / "out", "--for", "vllm", "--format", "merged")
    assert "is for --format peft" in message
    assert not (tmp_path / "out").exists()


def test_export_for_llama_cpp(call, finished, tmp_path):
    code, out, err = call("export", finished, tmp_path / "out", "--for", "llamacpp")
    assert (code, err) == (0, "")
    assert out.startswith("exact\n")
    assert f"python convert_lora_to_gguf.py out --base {models.resolve('stories260k').path} --outfile out.gguf" in out


def test_export_of_a_run_from_random_weights(call, refused, recipe, tmp_path):
    assert call("run", recipe(pretrained=False))[0] == 0
    assert "started from random weights" in refused("export", tmp_path / "out", tmp_path / "peft")
    assert call("export", tmp_path / "out", tmp_path / "merged", "--format", "merged")[0] == 0


def test_report(call, refused, finished, tmp_path):
    assert call("report", finished, "--out", tmp_path / "page.html")[0] == 0
    assert "Training loss" in (tmp_path / "page.html").read_text()
    assert "holds neither comparison.json nor run.json" in refused("report", tmp_path)
    assert "holds neither" in refused("report", tmp_path / "nowhere")
    for content in ("[1, 2]", '{"a": 1}', '"text"'):
        (tmp_path / "run.json").write_text(content)
        assert "is not a record of" in refused("report", tmp_path)
    (tmp_path / "run.json").write_text('{"losses": [')
    assert "run.json is damaged" in refused("report", tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_diagnose(call, refused, finished, tmp_path):
    assert call("export", finished, tmp_path / "merged", "--format", "merged")[0] == 0
    base = models.resolve("stories260k").path
    common = ["diagnose", "intruders", "--base", base, "--tuned"]
    code, out, err = call(*common, tmp_path / "merged", "--k", "2", "--out", tmp_path / "r.json")
    assert (code, err) == (0, "")
    assert "intruder dimensions among the first 2" in out
    assert json.loads((tmp_path / "r.json").read_text())
    assert (
        call(*common, tmp_path / "merged", "--option", "k=2", "--option", "threshold=5e-1", "--out", tmp_path / "s.json")[0]
        == 0
    )
    assert (tmp_path / "s.json").read_text() == (tmp_path / "r.json").read_text()
    assert "diagnostic must be one of intruders" in refused("diagnose", "intruder", "--base", base, "--tuned", base)
    assert "option k of intruders must be a whole number >= 1; got 0" in refused(*common, base, "--k", "0")
    assert "option threshold of intruders must be a number in (0, 1]; got 2" in refused(*common, base, "--threshold", "2")
    assert "intruders has no option 'treshold'; nearest: threshold (a number in (0, 1])" in refused(
        *common, base, "--option", "treshold=0.2"
    )
    assert "intruders measures --base and --tuned; missing: --tuned" in refused("diagnose", "intruders", "--base", base)
    assert "option k of intruders is given more than once" in refused(*common, base, "--k", "1", "--option", "k=2")
    assert "no such folder" in refused("diagnose", "intruders", "--base", "./nowhere", "--tuned", base)


def test_compress(call, refused, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--samples", "64", "--max-length", "32"]
    code, out, err = call(*common, "--out", tmp_path / "small", "--param-ratio", "0.8")
    assert (code, err) == (0, "")
    assert "perplexity on held-out blocks" in out
    files = {p.name for p in (tmp_path / "small").iterdir()}
    assert files >= {"config.json", "model.safetensors", "compression.json", "tokenizer.json"}
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert record["parameters"][1] < record["parameters"][0]
    assert models.load_model(str(tmp_path / "small"), "causal-lm")
    assert "is not empty" in refused(*common, "--out", tmp_path / "small")
    assert record["param_ratio"] == 0.8
    assert set(record["ranks"].values()) == {int(0.8 * i * o / (i + o)) for i, o in ((64, 32), (64, 64), (64, 172))}
    message = refused(*common, "--out", tmp_path / "x", "--param-ratio", "0")
    assert "option param_ratio of lord must be a number in (0, 1] or null; got 0" in message
    assert "--method must be one of lord, welore" in refused(*common, "--out", tmp_path / "x", "--method", "svd")
    assert "--samples must be" in refused(*common[:5], "--out", tmp_path / "x", "--samples", "0")
    assert not (tmp_path / "x").exists()


def test_compress_by_weights(call, tmp_path):
    from lowdim.compress import LowRankLinear

    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--method", "welore", "--max-length", "32"]
    code, out, err = call(*common, "--out", tmp_path / "small", "--target", "0.6")
    assert (code, err) == (0, "")
    assert "layers replaced" in out
    assert "; threshold 0." in out
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert (record["method"], record["target"]) == ("welore", 0.6)
    assert record["ranks"]
    assert 0 < record["threshold"] < 1
    assert len(record["perplexity"]) == 2
    small = models.load_model(str(tmp_path / "small"), "causal-lm")
    ranks = {name: m.rank for name, m in small.named_modules() if isinstance(m, LowRankLinear)}
    assert ranks == record["ranks"]
    assert sum(p.numel() for p in small.parameters()) == record["parameters"][1]
    code, out, err = call(*common, "--out", tmp_path / "again", "--threshold", record["threshold"])
    assert (code, err) == (0, "")
    again = json.loads((tmp_path / "again" / "compression.json").read_text())
    assert (again["ranks"], again["target"]) == (record["ranks"], None)


def test_compress_then_tune(call, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--method", "welore", "--max-length", "32"]
    tuning = ["--target", "0.6", "--tune-steps", "6", "--lr", "3e-3", "--samples", "64"]
    code, out, err = call(*common, *tuning, "--out", tmp_path / "small")
    assert (code, err) == (0, "")
    assert "(tuned)" in out
    record = json.loads((tmp_path / "small" / "compression.json").read_text())
    assert (record["tune_steps"], record["lr"], len(record["losses"])) == (6, 3e-3, 6)
    assert record["trained"] < record["parameters"][1]
    dense, compressed, tuned = record["perplexity"]
    assert dense < compressed
    assert tuned < compressed
    code, _, err = call(*common, "--tune-steps", "6", "--lr", "1e9", "--out", tmp_path / "x", "--target", "0.6")
    assert code != 0
    assert "try a smaller --lr than 1e+09" in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--target", "0.5"], "lord has no option 'target' (welore has); nearest: "),
        (["--option", "param_rato=0.5"], "lord has no option 'param_rato'; nearest: param_ratio (a number in (0, 1] or null)"),
        (["--method", "welore", "--param-ratio", "0.7"], "welore has no option 'param_ratio' (lord has); nearest: "),
        (["--option", "rank=8", "--option", "rank_ratio=0.5"], "exactly one of rank, rank_ratio and param_ratio must be given"),
        (["--option", "rank=8", "--option", "rank=9"], "option rank of lord is given more than once"),
        (["--option", "rank=eight"], "option rank of lord must be a whole number >= 1 or a mapping or null; got 'eight'"),
        (["--option", "centered=2"], "option centered of lord must be true or false; got 2"),
        (["--option", "rank"], "--option must be name=value; got 'rank'"),
        (["--option", "rank={"], "option rank of lord: '{' is not YAML"),
        (["--tune-steps", "5"], "--tune-steps: lord leaves nothing to tune by itself"),
        (["--method", "welore", "--target", "0.5", "--threshold", "0.2"], "exactly one of target and threshold must be given"),
        (["--method", "welore", "--target", "1"], "option target of welore must be a number in (0, 1) or null; got 1"),
        (["--method", "welore", "--threshold", "2"], "option threshold of welore must be a number in [0, 1] or null"),
        (["--method", "welore", "--samples", "5"], "--samples is only used for tuning, since welore needs no samples"),
        (["--method", "welore", "--lr", "0.1"], "--lr is only used for tuning; add --tune-steps"),
        (["--method", "welore", "--tune-steps", "0"], "--tune-steps must be an int >= 1"),
        (["--method", "welore", "--tune-steps", "5", "--lr", "0"], "--lr must be a finite number"),
    ],
)
def test_compress_refuses_what_it_would_not_use(options, part, refused, tmp_path):
    common = ["compress", "--model", "stories260k", "--data", "lowdim:shakespeare", "--out", tmp_path / "x"]
    assert part in refused(*common, *options)
    assert not (tmp_path / "x").exists()


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


def test_reproduce_refuses(refused):
    assert "nearest: galore" in refused("reproduce", "galor")
    assert "is not built yet" in refused("reproduce", "pst")


# --- what goes wrong outside -----------------------------------------------------------------------------------------------


def test_interrupted_and_bugs(call, monkeypatch):
    from lowdim import catalogue

    def raise_(error):
        def entries():
            raise error

        monkeypatch.setattr(catalogue, "entries", entries)

    raise_(KeyboardInterrupt())
    code, _, err = call("list")
    assert code == 130
    assert "interrupted" in err
    raise_(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])
    raise_(PermissionError(13, "Permission denied", "/root/x"))
    assert call("list")[0] == 2


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(call, monkeypatch):
    import warnings

    from lowdim import catalogue

    rows = catalogue.entries()

    def entries():
        warnings.warn("mind the step", stacklevel=2)
        return rows

    monkeypatch.setattr(catalogue, "entries", entries)
    assert call("list")[2] == "note: mind the step\n"


def test_debug_shows_the_whole(monkeypatch):
    monkeypatch.setenv("LOWDIM_DEBUG", "1")
    with pytest.raises(ValueError, match="no family, system or method is called"):
        main(["list", "nothing"])


def test_a_disk_that_is_full_when_a_file_is_put_in_place(refused, recipe, finished, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr(os, "replace", full)
    message = refused("report", finished, "--out", tmp_path / "page.html")
    assert "could not write" in message
    assert "No space left on device" in message
    assert (tmp_path / "page.html").read_text() == "old"
    assert "No space left" in refused("export", finished, tmp_path / "out")
    assert "No space left" in refused("run", recipe())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "page.html", "recipe.yaml"]
    assert list((tmp_path / "out").iterdir()) == []


@pytest.fixture
def little_disk(tmp_path):
    """A file system of so many KiB."""
    made = []

    def make(size):
        place = tmp_path / f"disk{len(made)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small file system")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_that_is_really_full(refused, recipe, finished, little_disk):
    disk = little_disk(128)
    message = refused("export", finished, disk / "merged", "--format", "merged")
    assert "could not write" in message
    assert "No space left on device" in message
    assert list(disk.iterdir()) == [], "nothing half-written"
    # An adapter of a run: the training is lost, and said so; the folder holds the recipe and no half of an adapter.
    message = refused("run", recipe(options={"rank": 32}), "--out", disk / "run")
    assert "could not write" in message
    assert not (disk / "run" / "adapter").exists()
    assert not list((disk / "run").glob(".*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.parametrize("size", [700, 2500])
def test_a_disk_that_fills_with_checkpoints(size, refused, call, recipe, little_disk):
    disk = little_disk(size)  # the first checkpoint does not fit, or the second does not
    path = recipe(save_steps=1, steps=4)
    message = refused("run", path, "--out", disk / "run")
    assert "could not write a checkpoint" in message
    assert "No space left on device" in message
    whole = sorted(p.name for p in (disk / "run" / "checkpoints").iterdir())
    assert whole == ([] if size < 1000 else ["checkpoint-1"])
    assert ("--resume" in message) == bool(whole)
    assert {p.name for p in (disk / "run").iterdir()} == {"recipe.yaml", "checkpoints"}
    if whole:
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert call("run", path, "--out", disk / "run", "--resume")[0] == 0
        assert json.loads((disk / "run" / "run.json").read_text())["loss_steps"] == [1, 2, 3, 4]
