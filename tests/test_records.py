"""What is written of a run is read by the type that wrote it."""

import dataclasses
import json

import pytest

from golden import runs
from lowdim.errors import CheckpointError
from lowdim.records import RUN, RunRecord, claim


def test_a_record_is_read_as_it_was_written(tmp_path):
    record = RunRecord.read(runs.FOLDER / "lora")
    record.write(tmp_path)
    assert json.loads((tmp_path / RUN).read_text()) == json.loads((runs.FOLDER / "lora" / RUN).read_text())
    assert RunRecord.read(tmp_path) == record


def test_what_a_method_has_not_is_left_out(tmp_path):
    record = RunRecord.read(runs.FOLDER / "lora")
    assert "ranks" not in record.to_dict()
    assert "penalties" not in record.to_dict()
    full = dataclasses.replace(record, ranks={"layer": 3}, penalties=[0.5])
    full.write(tmp_path)
    assert RunRecord.read(tmp_path) == full


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": {}}', "{"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / RUN).write_text(content)
    with pytest.raises(CheckpointError):
        RunRecord.read(tmp_path)


def test_a_folder_is_claimed_once(tmp_path):
    folder = tmp_path / "out"
    assert claim(folder, "recipe.yaml", "run", False) is None
    folder.mkdir()
    assert claim(folder, "recipe.yaml", "run", True) is None
    (folder / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError, match="out is not empty and holds no run; name another folder"):
        claim(folder, "recipe.yaml", "run", True)
    with pytest.raises(FileExistsError, match=r"thesis\.txt is a file"):
        claim(folder / "thesis.txt", "recipe.yaml", "run", True)
    (folder / "recipe.yaml").write_text("")
    with pytest.raises(FileExistsError, match="already holds a run; continue it with --resume"):
        claim(folder, "recipe.yaml", "run", False)
    assert claim(folder, "recipe.yaml", "run", True) == folder / "recipe.yaml"
