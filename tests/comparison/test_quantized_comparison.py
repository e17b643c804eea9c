"""`lowdim compare` over a quantized base: who takes part, what is recorded, what is handed over, and resuming."""

import pytest

from comparing import by_name, run
from lowdim.comparison import CompareSettings

pytest.importorskip("torchao")

METHODS = ("lora", "full", "lamda", "galore", "linear-probe")


@pytest.fixture(scope="module")
def quantized(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized") / "out"
    settings = make(methods=METHODS, quantize="int8", optimizer="adamw8bit", rates=1)
    return settings, folder, *run(settings, folder)


def test_methods_that_train_the_base_are_left_out_with_the_reason(quantized):
    _, _, result, said = quantized
    rows = by_name(result)
    for name in ("full", "galore"):
        assert rows[name]["status"] == "skipped"
        assert "trains the base's own weights" in rows[name]["reason"]
    assert "Full fine-tuning trains the base's own weights" in " ".join(said.split())
    assert {name for name, row in rows.items() if row["scores"]} >= {"lora", "lamda"}
    assert result["settings"]["quantize"] == "int8"
    assert result["settings"]["optimizer"] == "adamw8bit"


def test_what_is_handed_over_gives_the_measured_score(quantized):
    _, folder, result, _ = quantized
    assert result["winner"] is not None
    assert (folder / "winner").is_dir()


def test_finished_runs_are_kept_and_other_bits_refused(quantized, make):
    settings, folder, result, _ = quantized
    again, _ = run(settings, folder, resume=True)
    assert [row["scores"] for row in again["methods"]] == [row["scores"] for row in result["methods"]]
    with pytest.raises(ValueError, match=r"different settings: --quantize was 'int8'"):
        run(make(methods=METHODS, quantize="int4", optimizer="adamw8bit", rates=1), folder, resume=True)
    with pytest.raises(ValueError, match=r"--optimizer was 'adamw8bit'"):
        run(make(methods=METHODS, quantize="int8", rates=1), folder, resume=True)


def test_nothing_but_methods_that_need_the_weights(make, tmp_path):
    with pytest.raises(ValueError, match=r"--methods full: Full fine-tuning trains the base's own weights"):
        run(make(methods=("full",), quantize="int8"), tmp_path)


def test_settings_are_checked():
    how = {"model": "minilm", "data": ("a.csv",)}
    with pytest.raises(ValueError, match=r"--quantize must be one of int8, int4, nf4; got 'fp4'"):
        CompareSettings(**how, quantize="fp4")
    with pytest.raises(ValueError, match=r"--optimizer must be one of adamw, adamw8bit; got 'sgd'"):
        CompareSettings(**how, optimizer="sgd")
    with pytest.raises(ValueError, match="--quantize int8 is for a pre-trained base"):
        CompareSettings(**how, task="pretrain", quantize="int8")


def test_settings_of_before_are_the_same():
    settings = CompareSettings(model="minilm", data=("a.csv",))
    old = {key: value for key, value in settings.to_dict().items() if key not in ("quantize", "optimizer")}
    assert not settings.differs_from(old)
