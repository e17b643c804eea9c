"""What a comparison survives: failures of the machine, damage, another base model, and files of other people."""

import errno
import io
import json
import random
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from lowdim import models
from lowdim.comparison import CompareSettings, compare, runs
from lowdim.errors import CheckpointError, LowdimError, is_machine_failure
from lowdim.outputs import own_files
from lowdim.train.tasks import Task

NO_MEMORY = "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 268435 bytes."


def settings(**changes):
    keys = {
        "model": "stories260k", "data": ("lowdim:shakespeare",), "task": "causal-lm", "methods": ("lora", "full"), "seeds": 1,
        "rates": 1, "sizes": 1, "steps": 3, "batch_size": 2, "max_length": 16, "limit": 8,
    }  # fmt: skip
    return CompareSettings(**{**keys, **changes})


def run(out, resume=False, **changes):
    return compare(settings(**changes), out, resume=resume, console=Console(file=io.StringIO()))


def rows(result):
    return {row["name"]: (row["status"], row["scores"], row["lr"]) for row in result["methods"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Finished comparisons, made once each."""
    made = {}

    def get(**changes):
        key = tuple(sorted(changes.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            made[key] = out, run(out, **changes)
        return made[key]

    return get


@pytest.fixture
def copy(whole, tmp_path):
    """A finished comparison to change."""
    return shutil.copytree(whole()[0], tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (RuntimeError(NO_MEMORY), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.06 GB)"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("NCCL error in: ../ProcessGroupNCCL.cpp"), True),
        (RuntimeError("DataLoader worker (pid 31) is killed by signal: Killed."), True),
        (RuntimeError("[enforce fail at inline_container.cc:595] . PytorchStreamWriter failed writing file data/3"), True),
        (MemoryError(), True),
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge"), False),
        (ValueError("rank must be in [1, 8]; got 16: out of memory"), False),
        (FloatingPointError("the loss became nan at step 3"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_the_machines_fault(error, machine):
    assert is_machine_failure(error) is machine
    with pytest.raises(LowdimError) as wrapped:
        raise LowdimError("could not") from error
    assert is_machine_failure(wrapped.value) is machine


@pytest.mark.parametrize(
    "where", ["seed", *(pytest.param(name, marks=pytest.mark.slow) for name in ("trial", "evaluation", "saving"))]
)
def test_a_lack_of_memory_is_no_verdict(where, whole, tmp_path, monkeypatch):
    _, want = whole()
    with monkeypatch.context() as patch:
        fail(patch, where)
        first = run(tmp_path / "out")
    assert rows(first)["full"][0] == "failed"
    assert "can't allocate memory" in (reason := {row["name"]: row["reason"] for row in first["methods"]}["full"])
    assert reason.endswith("--resume tries it again")
    assert rows(first)["lora"] == rows(want)["lora"], "and the others go on"
    assert rows(run(tmp_path / "out", resume=True)) == rows(want)


def fail(patch, where):
    """Full fine-tuning lacks memory there."""
    real, score, save = runs.fit, Task.score, runs._save
    phase = []

    def fit(applied, task, settings, *args, **keywords):
        phase.append((applied.variant.name, "seed" if settings.pause_at is None else "trial"))
        if phase[-1] == ("full", where):
            raise RuntimeError(NO_MEMORY)
        return real(applied, task, settings, *args, **keywords)

    def evaluate(*args):
        if where == "evaluation" and phase and phase[-1][0] == "full":
            raise MemoryError(NO_MEMORY)
        return score(*args)

    def _save(applied, *args):
        if where == "saving" and applied.variant.name == "full":
            raise RuntimeError(NO_MEMORY)
        return save(applied, *args)

    patch.setattr(runs, "fit", fit)
    patch.setattr(Task, "score", evaluate)
    patch.setattr(runs, "_save", _save)


@pytest.mark.slow
def test_the_winner_is_that_of_the_first_seed_also_where_it_lacked_memory_at_first(whole, tmp_path, monkeypatch):
    """Whole models are kept once: of the first seed, whenever that has finished."""
    keys = {"methods": ("full",), "seeds": 2}
    folder, want = whole(**keys)
    real, calls = runs.fit, []

    def fit(applied, task, settings, *args, **keywords):
        calls.append("seed" if settings.pause_at is None else "trial")
        if calls.count("seed") == 1 and calls[-1] == "seed":
            raise RuntimeError(NO_MEMORY)
        return real(applied, task, settings, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "fit", fit)
        assert run(tmp_path / "out", **keys)["winner"]["exported"] == "seed 2"
    result = run(tmp_path / "out", resume=True, **keys)
    assert (result["winner"]["exported"], rows(result)) == ("seed 1", rows(want))
    for file in (folder / "winner").iterdir():
        assert (tmp_path / "out" / "winner" / file.name).read_bytes() == file.read_bytes()


def test_a_full_disk_ends_the_comparison_and_nothing_is_recorded(whole, tmp_path, monkeypatch):
    def full(*args, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_tensors", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "out")
    assert not (tmp_path / "out" / "runs" / "full" / "seed-0" / "run.json").exists()
    assert rows(run(tmp_path / "out", resume=True)) == rows(whole()[1])


def test_divergence_is_kept(tmp_path, monkeypatch):
    calls, real = [], runs.fit

    def fit(applied, *args, **keywords):
        calls.append(applied.variant.name)
        if applied.variant.name == "full":
            raise ValueError("the loss became nan at step 2")
        return real(applied, *args, **keywords)

    monkeypatch.setattr(runs, "fit", fit)
    run(tmp_path / "out")
    calls.clear()
    assert rows(run(tmp_path / "out", resume=True))["full"][0] == "failed"
    assert calls == []


@pytest.mark.parametrize("part", ["weights", "configuration", "data"])
def test_what_a_comparison_builds_on_may_not_change(part, tmp_path):
    model = shutil.copytree(models.assets() / "stories260k", tmp_path / "model")
    data = tmp_path / "data.txt"
    data.write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:6000])
    keys = {"model": str(model), "data": (str(data),), "methods": ("full",)}
    old = rows(run(tmp_path / "out", **keys))
    if part == "weights":
        tensors = load_file(model / "model.safetensors")
        halved = {k: v * 0.5 if "layers.0" in k else v for k, v in tensors.items()}
        save_file(halved, model / "model.safetensors", {"format": "pt"})
    elif part == "configuration":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    else:
        data.write_text(data.read_text().replace("the", "teh"))
    with pytest.raises(CheckpointError, match=rf"--resume: .*begun with other content of .*\b{part}.*restore that, or start"):
        run(tmp_path / "out", resume=True, seeds=2, **keys)
    assert rows(json.loads((tmp_path / "out" / "comparison.json").read_text())) == old


@pytest.mark.parametrize(
    "name",
    [
        "settings.json", "comparison.json", "runs/lora/lr-0.001-size-8/rung-3/run.json", "runs/winner.json",
        "runs/{best}/seed-0/run.json", "runs/lora/seed-0/adapter/adapter.json", "runs/full/seed-0/weights.safetensors",
    ],
)  # fmt: skip
def test_a_flipped_bit_is_refused_with_the_files_name(name, whole, copy, tmp_path):
    best = whole()[1]["winner"]["method"]
    if ("full/seed" in name and best != "full") or ("lora/seed" in name and best != "lora"):
        pytest.skip("only the winner's tensors are read back")
    file = copy / name.format(best=best)
    data = bytearray(file.read_bytes())
    data[random.Random(3).randrange(len(data) // 4, len(data) - 3)] ^= 2
    file.write_bytes(data)
    with pytest.raises((CheckpointError, FileExistsError), match=str(file)):
        run(copy, resume=True)


def test_a_finished_comparison_stays_as_it_is(whole, copy):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != "settings.json"}
    assert run(copy, resume=True) == whole()[1]
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != "settings.json"} == before


@pytest.mark.slow
def test_files_of_other_people_in_the_winner_are_kept(copy):
    winner = copy / "winner"
    (winner / "my-notes.txt").write_text("mine")
    (winner / "eval").mkdir()
    (winner / "eval" / "scores.json").write_text("{}")
    run(copy, resume=True, seeds=2)
    assert (winner / "my-notes.txt").read_text() == "mine"
    assert (winner / "eval" / "scores.json").read_text() == "{}"
    (winner / "README.md").write_text("my own page")
    with pytest.raises(FileExistsError, match=r"winner/README\.md was not written by lowdim, or was changed since; move it"):
        run(copy, resume=True, seeds=3)
    assert (winner / "README.md").read_text() == "my own page"


def test_a_winner_of_an_earlier_version_is_replaced(copy):
    (copy / "runs" / "winner.json").unlink()
    (copy / "winner" / "my-notes.txt").write_text("mine")
    weights = next((copy / "winner").glob("*.safetensors"))
    weights.write_bytes(b"other")
    run(copy, resume=True, seeds=2)
    assert weights.stat().st_size > 1000
    assert (copy / "winner" / "my-notes.txt").read_text() == "mine"


def test_a_page_that_someone_has_changed_is_kept(copy):
    page = copy / "report.html"
    page.write_text(page.read_text() + "<p>my remarks</p>")
    with pytest.raises(FileExistsError, match=r"report\.html was not written by lowdim, or was changed since"):
        run(copy, resume=True, seeds=2)
    assert page.read_text().endswith("<p>my remarks</p>")


def test_own_files_replace_own_files_only(tmp_path):
    def write(**files):
        with own_files(tmp_path / "w", tmp_path / "w.json") as draft:
            for name, content in files.items():
                path = draft / name.replace("__", "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(content)

    def there():
        return {p.relative_to(tmp_path / "w").as_posix(): p.read_text() for p in (tmp_path / "w").rglob("*") if p.is_file()}

    write(a="1", b="2", in__c="3")
    (tmp_path / "w" / "mine").write_text("m")
    write(a="1", d="4")
    assert there() == {"a": "1", "d": "4", "mine": "m"}
    assert not (tmp_path / "w" / "in").exists()
    with pytest.raises(FileExistsError, match="mine was not written"):
        write(mine="5")
    assert there() == {"a": "1", "d": "4", "mine": "m"}
    (tmp_path / "w" / "d").write_text("edited")
    write(a="6")
    assert there() == {"a": "6", "d": "edited", "mine": "m"}, "what was edited is the editor's"
    with pytest.raises(ValueError, match="stop"), own_files(tmp_path / "w", tmp_path / "w.json"):
        raise ValueError("stop")
    assert there() == {"a": "6", "d": "edited", "mine": "m"}
