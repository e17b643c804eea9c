"""A sample of the kill sweep (`make kill-sweep`): killed anywhere and resumed, a command gives the bits of one in peace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowdim.files import read_json


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies of one process need fork")
def test_every_bit_after_a_kill(tmp_path):
    """In a process of its own, which is forked for each command before it has any threads."""
    script = Path(__file__).with_name("kill_sweep.py")
    command = [sys.executable, str(script), "--every", "9", "--random", "2", "--out", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "found.json").exists(), done.stderr[-2000:]
    found = read_json(tmp_path / "found.json")
    assert [row["wrong"] for row in found["scenarios"]] == [[], [], [], []]
    assert all(row["at_writes"] >= 4 and row["at_random"] == 2 for row in found["scenarios"])
    assert found["equal"] == found["kills"]
    assert done.returncode == 0
