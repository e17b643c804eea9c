"""A pipeline from its first step to the exported folder: what is measured, and going on after an interruption."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from lowdim.compress import LowRankLinear, MatryoshkaProjection, WINALinear
from lowdim.errors import BudgetError, CheckpointError, LowdimError
from lowdim.modules import PackedLinear
from lowdim.pipeline import PipelineRecipe, run_pipeline
from lowdim.pipeline import run as running
from lowdim.pipeline.measuring import change, interval
from lowdim.pipeline.subject import load_subject
from lowdim.train.metrics import METRICS

pytest.importorskip("torchao")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")

STEPS = [
    {"step": "decompose", "method": "pela", "budget": "0.9x", "options": {"target_modules": ["gate_proj", "up_proj"]}},
    {"step": "tune", "steps": 2, "lr": 1e-3, "batch_size": 4},
    {"step": "cache", "options": {"key_ranks": 4, "value_ranks": 6}},
    {"step": "sparsify", "options": {"sparsity": 0.25, "target_modules": ["down_proj"]}},
    {"step": "quantize", "scheme": "int8"},
    {"step": "export"},
]


def recipe(out, **changes):
    common = {"model": "stories260k", "data": "lowdim:shakespeare", "max_length": 16, "samples": 8, "held_out": 6}
    return PipelineRecipe(**{**common, "steps": STEPS, "out": str(out), **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("pipeline") / "out"
    said = []
    return out, run_pipeline(recipe(out), command="lowdim compress --steps x.yaml", say=said.append), said


def losses(model, rows):
    """Mean loss of the tokens of each row that are predicted."""
    found = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        with torch.no_grad():
            chances = model(ids).logits[0, :-1].double().log_softmax(-1)
        found.append(-float(chances.gather(1, ids[0, 1:, None]).mean()))
    return found


def test_every_step_is_recorded(done):
    out, record, said = done
    assert [step.step for step in record.steps] == ["dense", *(step["step"] for step in STEPS)]
    assert record.finished
    assert record.export == "model"
    assert sorted(path.name for path in out.iterdir()) == ["model", "pipeline.json", "report.html"]
    assert json.loads((out / "pipeline.json").read_text())["steps"][1]["layers"][0]["rank"] > 0
    assert any(line.startswith("3. cache: MatryoshkaKV") for line in said)


def test_the_folder_is_what_was_measured(done):
    """The exported model, read by transformers, has the last score; the test computes both from its own losses."""
    out, record, _ = done
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    kinds = {type(module) for module in model.modules()}
    assert kinds >= {LowRankLinear, MatryoshkaProjection, WINALinear, PackedLinear}
    subject = load_subject(recipe(out))
    rows = [subject.task.test[i] for i in range(6)]
    now, before = losses(model, rows), losses(subject.dense(), rows)
    first, last = record.steps[0], record.steps[-1]
    assert first.score == pytest.approx(math.exp(sum(before) / 6), rel=1e-4)
    assert last.score == pytest.approx(math.exp(sum(now) / 6), rel=1e-4)
    gap = torch.tensor(now) - torch.tensor(before)
    half = 2.5706 * float(gap.std()) / math.sqrt(6)  # Student's t with 5 degrees of freedom
    assert last.change == pytest.approx([math.exp(gap.mean() + part) for part in (0, -half, half)], rel=1e-3)
    assert last.disk_bytes == (out / "model" / "model.safetensors").stat().st_size
    assert record.steps[5].disk_bytes == last.disk_bytes


def test_each_step_makes_small_what_it_is_for(done):
    dense, factored, tuned, cached, _, packed, _ = done[1].steps
    assert dense.cache_bytes == tuned.cache_bytes == 5 * 2 * 4 * 8 * 4  # layers, sides, heads, numbers of a head, bytes
    assert cached.cache_bytes == 5 * 4 * (4 + 6) * 4
    assert factored.disk_bytes < 0.92 * dense.disk_bytes
    assert packed.disk_bytes < 0.8 * factored.disk_bytes
    assert packed.memory_bytes < cached.memory_bytes < dense.memory_bytes
    assert all(step.tokens_per_second.keys() == {"1", "8"} for step in done[1].steps)


def test_errors_by_block_are_those_of_its_outputs(done):
    out, record, _ = done
    subject = load_subject(recipe(out))
    model = transformers.AutoModelForCausalLM.from_pretrained(out / "model").eval()
    ids = subject.batches(model)[0]["input_ids"][:4]
    with torch.no_grad():
        states = [m(ids, output_hidden_states=True, use_cache=False).hidden_states[2] for m in (model, subject.dense())]
    error = float((states[0] - states[1]).norm() / states[1].norm())
    assert record.steps[-1].block_errors["model.layers.1"] == pytest.approx(error, rel=1e-3)
    assert set(record.steps[0].block_errors.values()) == {0.0}


@pytest.mark.parametrize("after", [pytest.param("step", marks=pytest.mark.slow), "checkpoint"])
def test_going_on_gives_the_same_bits(done, tmp_path, monkeypatch, after):
    """The run is killed within the third step, or after its checkpoint and before its record."""
    taken = []
    keep, take = running._Run._keep, running.take

    def killed(*args):
        taken.append(args[0].step if after == "step" else args[2])
        if taken[-1] in ("cache", 3):
            raise KeyboardInterrupt
        return take(*args) if after == "step" else keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*((running, "take") if after == "step" else (running._Run, "_keep")), killed)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(recipe(tmp_path / "out"))
    half = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert len(half["steps"]) == 3
    assert not half["finished"]
    with pytest.raises(FileExistsError, match="--resume"):
        run_pipeline(recipe(tmp_path / "out"))
    begun = []
    monkeypatch.setattr(running, "take", lambda *args: begun.append(args[0].step) or take(*args))
    record = run_pipeline(recipe(tmp_path / "out"), resume=True)
    assert begun == ["cache", "sparsify", "quantize"]
    assert [step.seconds for step in record.steps[:3]] == [step["seconds"] for step in half["steps"]]
    assert [step.checksum for step in record.steps[:-1]] == [step.checksum for step in done[1].steps[:-1]]
    ours, theirs = (load_file(place / "model" / "model.safetensors") for place in (tmp_path / "out", done[0]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_finished_pipeline_is_left_alone(done, monkeypatch):
    out, record, _ = done
    monkeypatch.setattr(running, "take", lambda *args: pytest.fail("a finished step is repeated"))
    assert run_pipeline(recipe(out), resume=True) == record


def test_another_recipe_is_refused(done):
    out = done[0]
    steps = copy.deepcopy(STEPS)
    steps[1]["lr"] = 1e-2
    for changes, part in (({"steps": steps}, "differs in step 2"), ({"seed": 1, "samples": 9}, "differs in samples, seed")):
        with pytest.raises(CheckpointError, match=part):
            run_pipeline(recipe(out, **changes), resume=True)


def test_a_step_that_cannot_be_done_names_itself(tmp_path):
    bad = [{"step": "decompose", "method": "pela", "budget": "1KiB"}]
    with pytest.raises(BudgetError, match=r"step 1 \(decompose\): budget 1KiB is .* pela reaches"):
        run_pipeline(recipe(tmp_path / "a", steps=bad))
    assert (tmp_path / "a" / "checkpoints" / "00-dense").is_dir(), "what is done is kept"
    with pytest.raises(ValueError, match=r"step 1 \(tune\): LlamaForCausalLM has no replaced layer"):
        run_pipeline(recipe(tmp_path / "b", steps=[{"step": "tune"}]))
    with pytest.raises(LowdimError, match=r"gives 0 blocks of 500 tokens"):
        run_pipeline(recipe(tmp_path / "c", max_length=500, data=str(_short(tmp_path))))


@pytest.mark.parametrize("damage", ["flipped", "gone"])
def test_a_damaged_checkpoint_is_refused(tmp_path, damage):
    steps = [{"step": "quantize"}]
    run_pipeline(recipe(tmp_path / "a", steps=steps, samples=2, held_out=2))
    file = tmp_path / "a" / "checkpoints" / "01-quantize" / "model.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    more = recipe(tmp_path / "a", steps=[*steps, {"step": "export"}], samples=2, held_out=2)
    with pytest.raises(CheckpointError, match="01-quantize, which holds the model after step 1, is missing or damaged"):
        run_pipeline(more, resume=True)


def _short(folder):
    path = folder / "short.txt"
    path.write_text("Once upon a time there was a little text.\n", encoding="utf-8")
    return path


def test_intervals():
    perplexity, rank = METRICS["perplexity"], METRICS["spearman"]
    half = 4.3027 * 1.0 / math.sqrt(3)  # t with 2 degrees of freedom, deviation 1
    assert interval(7.0, [-3.0, -2.0, -1.0], perplexity) == pytest.approx((7 * math.exp(-half), 7 * math.exp(half)), rel=1e-4)
    assert interval(0.5, [1.0, 2.0, 3.0], rank) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-4)
    assert change([1.0, 3.0], [0.0, 2.0], rank) == (1.0, 1.0, 1.0)
    assert all(map(math.isnan, interval(1.0, [1.0], rank)))
    assert all(map(math.isnan, change([], [1.0], rank)))
