"""`lowdim diagnose`."""

import json

from lowdim import models


def test_diagnose(call, refused, finished, tmp_path):
    assert call("export", finished, tmp_path / "merged", "--format", "merged")[0] == 0
    base = models.resolve("stories260k").path
    common = ["diagnose", "intruders", "--base", base, "--tuned"]
    code, out, err = call(*common, tmp_path / "merged", "--k", "2", "--out", tmp_path / "r.json")
    assert (code, err) == (0, "")
    assert "intruder dimensions among the first 2" in out
    assert json.loads((tmp_path / "r.json").read_text())
    (tmp_path / "mine.json").write_text('{"mine": 1}')
    assert "was not written by lowdim" in refused(*common, tmp_path / "merged", "--out", tmp_path / "mine.json")
    assert call(*common, tmp_path / "merged", "--k", "2", "--out", tmp_path / "r.json")[0] == 0
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
