"""Everything that the README shows is run: each Python block by itself, the command lines in their order."""

import json
import re
import shutil

import pytest

from snippets import ROOT, blocks, commands, exit_code, run_python

README = ROOT / "README.md"
#: What makes a command of the README cheap; a later option wins.
CHEAP = {
    "plan": ["--methods", "linear-probe,lora", "--batch-size", "2", "--length", "16"],
    "compare": ["--methods", "linear-probe,lora", "--seeds", "1", "--rates", "1", "--steps", "3"],
    "run": ["--steps", "2"],
}


@pytest.mark.parametrize("block", blocks(README, "python"), ids=str)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(block)


def test_the_table_of_commands_is_the_help():
    from typer.main import get_command

    from lowdim.cli import app

    told = set(re.findall(r"^\| `lowdim ([\w-]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE))
    assert told == set(get_command(app).commands)


def test_every_command_is_shown_with_an_example():
    """But those about embeddings, which have pages of their own."""
    assert {arguments[0] for _, arguments in commands(README)} == {
        "plan", "compare", "report", "run", "export", "diagnose", "compress", "reproduce", "list",
    }  # fmt: skip


def test_the_two_commands_are_those_of_the_makefile():
    first = blocks(README, "bash")[0].body
    words = re.findall(r"^make ([\w-]+)", first, re.MULTILINE)
    assert words == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{word}:", makefile, re.MULTILINE) for word in words)


@pytest.mark.slow  # about a minute, most of it in one comparison
def test_the_command_lines_run_in_their_order(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", "recipes")
    _write_model("my-model")
    _write_reviews("reviews.csv")
    for where, arguments in commands(README):
        cheap = CHEAP.get(arguments[0], [])
        if "pretrain" in arguments:  # no adapter, and every comparison needs a folder of its own
            cheap = ["full,galore" if word == "linear-probe,lora" else word for word in cheap]
            cheap += ["--out", str(tmp_path / "from-random-weights")] if arguments[0] == "compare" else []
        assert exit_code([*arguments, *cheap]) == 0, f"{where}: lowdim {' '.join(arguments)}"
    assert json.loads((tmp_path / "my-comparison" / "comparison.json").read_text())["winner"]
    assert (tmp_path / "my-comparison" / "report.html").is_file()
    assert (tmp_path / "shakespeare-adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "shakespeare-model" / "config.json").is_file()
    assert (tmp_path / "smaller" / "compression.json").is_file()


def _write_model(folder):
    """A folder with a random tiny encoder and the shipped tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from lowdim import models

    tokenizer = models.load_tokenizer("stories260k")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id, **size)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _write_reviews(path):
    good, bad = ("warm", "witty", "moving", "clever"), ("dull", "clumsy", "stale", "noisy")
    rows = [
        f"a {word} film number {i},{label}"
        for label, words in (("good", good), ("bad", bad))
        for word in words
        for i in range(10)
    ]
    with open(path, "w", encoding="utf-8") as file:
        file.write("\n".join(["review,label", *rows]) + "\n")
