"""Running `lowdim` in this process, and a finished run."""

import json
import shutil

import pytest

from lowdim.cli.main import main


@pytest.fixture
def call(capfd):
    """Runs a command in this process: exit code, standard output and standard error."""

    def run(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def refused(call):
    """Runs a command that must end with exit code 2 and one line on standard error, which is returned."""

    def run(*arguments):
        code, _, err = call(*arguments)
        assert code == 2, err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1, f"one line is clearer than:\n{err}"
        assert "Traceback" not in err
        return err

    return run


@pytest.fixture
def recipe(tmp_path):
    def write(**changes):
        keys = {
            "model": "stories260k", "task": "causal-lm", "data": "lowdim:shakespeare", "steps": 3, "limit": 8, "batch_size": 2,
            "max_length": 64, "out": str(tmp_path / "out"), **changes,
        }  # fmt: skip
        path = tmp_path / "recipe.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
        return path

    return write


@pytest.fixture
def broken_model(tmp_path):
    """The shipped language model with a weight that is NaN."""
    from safetensors.torch import load_file, save_file

    from lowdim.models import resolve

    folder = tmp_path / "model"
    shutil.copytree(resolve("stories260k").path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of `lowdim run`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(
        "model: stories260k\ntask: causal-lm\ndata: lowdim:shakespeare\nsteps: 3\nlimit: 8\nbatch_size: 2\nmax_length: 64\n"
    )
    with pytest.raises(SystemExit) as end:
        main(["run", str(folder / "recipe.yaml"), "--out", str(folder / "out")])
    assert not end.value.code
    return folder / "out"
