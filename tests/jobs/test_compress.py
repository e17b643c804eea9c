"""`lowdim.jobs.compress` from Python: settings in, what it did out, nothing printed."""

import json

import pytest

from lowdim.jobs import CompressSettings, DiagnoseSettings, compress, diagnose

SMALL = {"model": "stories260k", "data": ("lowdim:shakespeare",), "max_length": 32, "samples": 64}


def test_compress_gives_what_it_writes(tmp_path, capsys):
    said = []
    outcome = compress(CompressSettings(**SMALL, out=tmp_path / "small", options={"rank_ratio": 0.5}), say=said.append)
    assert outcome.options["rank_ratio"] == 0.5
    assert outcome.options["param_ratio"] is None
    assert outcome.parameters[1] == outcome.parameters[0] - outcome.report.before + outcome.report.after
    assert outcome.perplexity[0] < outcome.perplexity[1]
    assert json.loads((tmp_path / "small" / "compression.json").read_text()) == json.loads(json.dumps(outcome.to_dict()))
    assert len(said) == 1
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"data": ()}, "--data must name at least one file"),
        ({"max_length": 3}, "--max-length must be an int >= 4"),
        ({"samples": 0}, "--samples must be an int >= 1"),
        ({"lr": 0.1}, "--lr is only used for tuning"),
        ({"tune_steps": 0}, "--tune-steps must be an int >= 1"),
    ],
)
def test_settings_are_checked_at_once(changes, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        CompressSettings(**{**SMALL, "out": tmp_path, **changes})


def test_diagnose_says_which_inputs_it_accepts():
    with pytest.raises(ValueError, match="intruders measures --base and --tuned; missing: --base and --tuned"):
        diagnose(DiagnoseSettings(diagnostic="intruders"))
    with pytest.raises(ValueError, match="intruders does not take MODEL; it measures --base and --tuned"):
        diagnose(DiagnoseSettings(diagnostic="intruders", inputs={"model": "stories260k"}))
