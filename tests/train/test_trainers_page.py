"""The page on training loops: its example with TRL runs where TRL is installed."""

import pytest

from snippets import ROOT, blocks, run_python

PAGE = ROOT / "docs" / "trainers.md"


@pytest.mark.slow
def test_the_example_with_trl_runs(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    (block,) = blocks(PAGE, "py")
    monkeypatch.chdir(tmp_path)
    run_python(block)
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
