"""`lowdim compress --steps` and `lowdim compare --compress`."""

import pytest

RECIPE = """model: stories260k
data: lowdim:shakespeare
max_length: 16
samples: 4
held_out: 2
steps:
- step: decompose
  method: pela
  options: {compression_ratio: 2, target_modules: [up_proj]}
- {step: export, format: dense}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return path


def test_a_recipe(call, refused, file, tmp_path):
    code, out, err = call("compress", "--steps", file, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "1. decompose: PELA" in out
    assert "2. export: written model: transformers loads it" in out
    assert (tmp_path / "out" / "model" / "factors.safetensors").is_file()
    assert "already holds a pipeline" in refused("compress", "--steps", file, "--out", tmp_path / "out")
    code, out, err = call("compress", "--steps", file, "--out", tmp_path / "out", "--resume")
    assert (code, err) == (0, "")
    assert "all 2 steps are finished" in out


def test_only_checked(call, refused, file, tmp_path):
    code, out, err = call("compress", "--steps", file, "--check")
    assert (code, err) == (0, "")
    assert "lr: 5.0e-05" not in out
    assert "out: lowdim-pipeline" in out
    assert "compression_ratio: 2" in out
    file.write_text(RECIPE.replace("up_proj", "up_proj, 3"), encoding="utf-8")
    file.write_text(RECIPE.replace("format: dense", "format: gguf"), encoding="utf-8")
    assert "recipe.yaml:10: step 2.format: Input should be 'compressed' or 'dense'" in refused("compress", "--steps", file)


def test_what_does_not_go_together(refused, file, tmp_path):
    assert "--model, --budget: the recipe of --steps says this" in refused(
        "compress", "--steps", file, "--model", "stories260k", "--budget", "0.5x"
    )
    assert "--resume is for a recipe of several steps" in refused("compress", "--model", "stories260k", "--resume")
    assert "--data, --out missing; or --steps FILE" in refused("compress", "--model", "stories260k")


def test_compare_compress(call, refused, tmp_path):
    common = ["compare", "--compress", "--max-length", "16", "--out", tmp_path / "out"]
    assert "--workers cannot be used with --compress" in refused(*common, "--workers", "2")
    assert "--compress needs both --model and --data" in refused(*common, "--model", "stories260k")
    assert "--budget must be a share such as 0.5x" in refused(*common, "--budget", "0.5x,half")
