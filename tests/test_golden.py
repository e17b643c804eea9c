"""Files that an earlier lowdim wrote are read, and give the numbers that they gave then (`golden/make.py` wrote them)."""

import shutil
from functools import cache

import pytest
import torch

from golden import adapters, curves, exports, functions, layers, optimizers, runs
from lowdim import report
from lowdim.cli import main
from lowdim.files import read_json, read_tensors

#: Largest error relative to the largest wanted entry, by the dtype of what was stored; whole numbers must be equal. Draws and
#: decompositions that are made again may differ by a rounding on another processor; a changed formula differs by far more.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-5}


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert (got[name].dtype, got[name].shape) == (expected.dtype, expected.shape), name
        if expected.dtype not in TOLERANCES:
            assert torch.equal(got[name], expected), name
            continue
        error = float((got[name] - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
        assert error <= TOLERANCES[expected.dtype], f"{name}: relative error {error:.3g}"


@pytest.mark.parametrize("name", adapters.CASES)
def test_a_stored_adapter_answers_and_continues_as_before(name):
    adapted, batch, want = adapters.load(name)
    assert_close(adapters.answers(adapted, batch, adapters.CASES[name].merges), want)


@pytest.mark.parametrize("name", adapters.CASES)
def test_a_stored_adapter_is_saved_as_it_was(name, tmp_path, monkeypatch):
    monkeypatch.chdir(adapters.FOLDER / name)  # the names of aTLAS's task vector files are relative
    folder = adapters.load(name)[0].save(tmp_path)
    (tensors, about), (stored, wanted) = (
        read_tensors(place / "adapter.safetensors") for place in (folder, adapters.FOLDER / name)
    )
    assert tensors.keys() == stored.keys()
    assert all(tensors[key].dtype == stored[key].dtype and torch.equal(tensors[key], stored[key]) for key in stored)
    assert about.keys() == wanted.keys()
    description, before = (read_json(place / "adapter.json") for place in (folder, adapters.FOLDER / name))
    new = {key: description[key] for key in ("lowdim", "version", "digest")}  # version 2 has a digest of the description, too
    assert description == {**before, **new}
    assert (before["version"], description["version"]) == (1, 2)


#: The adapters of the first stored files, by slug and by method. A newer adapter need not be here: an earlier lowdim had none.
FIRST_STORED = {
    "allora",
    "atlas",
    "block-lora",
    "corda",
    "diffora",
    "flora",
    "increlora",
    "lamda",
    "lamda++",
    "loldu",
    "lora",
    "lora-sb",
    "lora-xs",
    "loram",
    "nola",
    "randlora",
    "s2ft",
    "said",
    "sara",
    "sora",
    "svfit",
}


def test_no_stored_adapter_is_lost():
    assert {path.name for path in adapters.FOLDER.iterdir()} >= FIRST_STORED


def test_every_stored_adapter_is_read():
    """An adapter that is newer than the stored files has none: an earlier lowdim could not write it."""
    assert {path.name for path in adapters.FOLDER.iterdir()} == set(adapters.CASES)


@pytest.mark.parametrize("name", optimizers.CASES)
def test_a_stored_optimizer_continues_as_before(name):
    assert_close(*optimizers.load(name))


@pytest.mark.parametrize("name", layers.CASES)
def test_a_stored_layer_answers_as_it_did(name):
    assert_close(*layers.load(name))


def assert_same_numbers(got, want, tolerance, name=""):
    """Two JSON values of the same shape, whose numbers differ by `tolerance` times the wanted one at most."""
    if isinstance(want, dict):
        assert got.keys() == want.keys(), name
        for key, value in want.items():
            assert_same_numbers(got[key], value, tolerance, f"{name}.{key}")
    elif isinstance(want, list):
        assert len(got) == len(want), name
        for index, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same_numbers(a, b, tolerance, f"{name}[{index}]")
    elif isinstance(want, float):
        assert got == pytest.approx(want, rel=tolerance, abs=1e-2 * tolerance), name
    else:
        assert got == want, name


@cache
def has_the_stored_kernels():
    """Whether an untrained model has the stored score to the bit: virtual processors of one name may have other kernels."""
    return curves.curve("lora")["before"] == read_json(curves.place("lora"))["before"]


def assert_same_run(got, want, elsewhere=1e-5):
    """To the bit where it was stored on this processor with these versions, to a relative error `elsewhere`."""
    here = got.pop("environment") == want.pop("environment") and has_the_stored_kernels()
    assert_same_numbers(got, want, 0.0 if here else elsewhere)


@pytest.mark.parametrize("name", sorted(path.stem for path in curves.FOLDER.glob("*.json")))
def test_a_short_run_gives_the_stored_numbers(name):
    # A classifier's head is first fitted by an iteration that stops within its own tolerance.
    assert_same_run(curves.curve(name), read_json(curves.place(name)), 1e-3 if name == "linear-probe" else 1e-5)


@pytest.mark.parametrize("name", runs.RESUMED)
def test_an_interrupted_run_continues_as_before(name):
    assert_same_run(*runs.resume(name))


def test_a_finished_run_is_drawn_and_exported():
    with curves.workplace() as place:
        shutil.copytree(runs.FOLDER / "lora", place / "run")
        for arguments in (["report", "run"], ["export", "run", "peft"]):
            with pytest.raises(SystemExit) as end:
                main(arguments)
            assert not end.value.code, arguments
        page = (place / "run" / "report.html").read_text(encoding="utf-8")
        record = read_json(place / "run" / "run.json")
        tensors, _ = read_tensors(place / "peft" / "adapter_model.safetensors")
        about = read_json(place / "peft" / "adapter_config.json")
    assert "LoRA" in page
    assert all(f"{loss:.5g}" in page for loss in record["losses"])
    stored, _ = read_tensors(runs.FOLDER / "lora" / "adapter" / "adapter.safetensors")
    assert len(tensors) == len(stored)
    for layer in {name.partition(".update.")[0] for name in stored}:
        before, now = f"{layer}.update.", f"base_model.model.{layer}.lora_"
        want = record["config"]["alpha"] / record["config"]["rank"] * stored[f"{before}B"] @ stored[f"{before}A"]
        got = about["lora_alpha"] / about["r"] * tensors[f"{now}B.weight"] @ tensors[f"{now}A.weight"]
        assert torch.allclose(got, want, rtol=1e-6, atol=0), layer


def test_a_comparison_is_read_and_not_mixed_with_another_search():
    stored = read_json(runs.COMPARISON / "comparison.json")
    page = report.render(stored)
    assert all(method["label"] in page for method in stored["methods"])
    with curves.workplace() as place:
        shutil.copytree(runs.COMPARISON, place / "out")
        with pytest.raises(ValueError, match="was begun by an earlier lowdim, which searched in another way"):
            runs.compare(resume=True)
        assert read_json(place / "out" / "comparison.json") == stored


@pytest.mark.parametrize("name", exports.PEFT)
def test_an_adapter_is_written_for_peft_as_it_was(name, tmp_path):
    result, place = exports.export(name, tmp_path), exports.FOLDER / "peft" / name
    assert_close(read_tensors(tmp_path / "adapter_model.safetensors")[0], read_tensors(place / "adapter_model.safetensors")[0])
    assert read_json(tmp_path / "adapter_config.json") == read_json(place / "adapter_config.json")
    assert_same_numbers(dict(result.errors), read_json(place / "errors.json"), 1e-6)


def test_stored_adapters_answer_together_as_they_did():
    assert_close(exports.together(), read_tensors(exports.FOLDER / "together.safetensors")[0])


@pytest.mark.parametrize("method", ["lord", "welore"])
def test_a_compressed_model_answers_as_it_did(method):
    assert_close(*exports.read_compressed(method))
    folder = exports.FOLDER / "compressed" / method
    (dense, _), (factors, _) = (read_tensors(folder / f"{name}.safetensors") for name in ("model", "factors"))
    assert read_json(folder / "compression.json")["method"] == method
    for name in {key[:-2] for key in factors}:
        product = factors[f"{name}.B"] @ factors[f"{name}.A"]
        assert torch.allclose(dense[f"{name}.weight"], product, rtol=0, atol=1e-6), name


def test_a_diagnosis_is_what_it_was():
    assert_same_numbers(exports.intruders(), read_json(exports.FOLDER / "intruders.json"), 1e-6)


def test_functions_give_what_they_gave():
    assert_close(functions.answers(), read_tensors(functions.FILE)[0])
