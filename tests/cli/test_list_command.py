"""`lowdim list`: the table, filters, and the options of one system."""

import json
import subprocess
import sys

import pytest


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
    for name in ("lora-sb, lora-xs", "block-dense", "block-shuffle", "self-guided"):
        assert name in out, "what to type is never cut"


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
    assert "(pst, compress, works)" in call("list", "pst")[1]


def test_a_reader_that_has_enough_is_no_error():
    code = "from lowdim.cli import main\nmain(['list', '--json'])\n"
    reader = subprocess.Popen([sys.executable, "-uc", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reader.stdout.close()
    reader.wait(timeout=60)
    assert reader.stderr.read() == b""
