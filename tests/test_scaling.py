"""docs/scaling.md: its commands run, in two processes, and leave what they say."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snippets import ROOT, blocks

PAGE = ROOT / "docs" / "scaling.md"
LINES = [line for block in blocks(PAGE, "bash") for line in block.body.splitlines()]
#: Where the launchers are, whatever the path says.
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}


def run(line, folder):
    pytest.importorskip("transformers")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for path in (ROOT / "docs" / "examples").glob("scaling_*.py"):
        shutil.copy(path, folder)
    name, *words = shlex.split(line)
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    around = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", LAUNCHERS[name], *words]
    done = subprocess.run(command, cwd=folder, env=around, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def the_line(*words):
    (line,) = [line for line in LINES if all(word in line for word in words)]
    return line


def test_the_page_shows_both_launchers_for_both_needs():
    assert {line.split()[0] for line in LINES} == set(LAUNCHERS)
    assert all("2" in line.split() for line in LINES), "two processes"
    assert {path.name for path in (ROOT / "docs" / "examples").glob("scaling_*.py")} == {
        word for line in LINES for word in line.split() if word.startswith("scaling_")
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_recipe_runs_in_two_processes(launcher, tmp_path):
    line = the_line(launcher, "lowdim run")
    run(line, tmp_path)
    folder = tmp_path / line.split()[-1]
    assert len(json.loads((folder / "run.json").read_text(encoding="utf-8"))["losses"]) == 4
    assert (folder / "adapter" / "adapter.safetensors").is_file()


def fell(text):
    """The first and the last loss of the line that a script prints."""
    first, last = text[text.index("loss") :].split()[1::2][:2]
    return float(last) < float(first)


@pytest.mark.slow
def test_an_adapter_on_a_spread_model(tmp_path):
    import torch

    import lowdim
    from lowdim import models

    told = run(the_line("scaling_torchrun.py"), tmp_path)
    assert "2 processes" in told
    assert fell(told)
    model = models.load_model("stories260k", "causal-lm")
    adapted = lowdim.load_adapter(model, tmp_path / "torchrun-adapter")
    assert all(torch.any(layer.update.B != 0) for layer in adapted.layers.values())


@pytest.mark.slow
def test_one_process_gives_the_same_adapter(tmp_path):
    """The gradients of the halves of a batch, averaged, are those of the batch."""
    from safetensors.torch import load_file

    line, found = the_line("scaling_torchrun.py"), []
    for count in ("1", "2"):
        folder = tmp_path / count
        folder.mkdir()
        run(line.replace("2", count, 1), folder)
        found.append(load_file(folder / "torchrun-adapter" / "adapter.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert (value - found[1][name]).abs().max() <= 1e-3 * value.abs().max() + 1e-6, name


@pytest.mark.slow
def test_an_optimizer_over_a_spread_model(tmp_path):
    import torch

    from lowdim import models

    told = run(the_line("scaling_accelerate.py"), tmp_path)
    assert "2 processes" in told
    assert fell(told)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    model = models.load_model("stories260k", "causal-lm")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    moved = [name for name, value in weights.items() if not torch.equal(value.cpu(), start[name])]
    assert len(moved) > 30


@pytest.mark.slow
def test_the_trainer_takes_a_spread_model(tmp_path):
    told = run(the_line("scaling_trainer.py"), tmp_path)
    said = re.findall(r"process \d(?=: loss \d)", told)  # in the middle of a line if both write at once
    assert sorted(said) == ["process 0", "process 1"]
    assert (tmp_path / "trainer-adapter" / "adapter.safetensors").is_file()
    assert not list(Path(tmp_path / "trainer-out").glob("checkpoint-*"))
