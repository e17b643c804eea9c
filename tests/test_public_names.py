"""What users import stays importable: the names of the first public version, wherever their code has moved since."""

import importlib
import json
from pathlib import Path

import pytest

NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text(encoding="utf-8"))

#: Inner names that others are known to import.
INNER = {
    "adapters.diffora_search": ["DiffoRAAdapted"],
    "catalogue": ["variant"],
    "cli": ["main"],
    "compare": ["CompareSettings", "compare", "runner", "runs"],
    "comparison": ["CompareSettings", "compare", "runner", "runs"],
    "errors": ["LowdimError"],
    "export": ["export"],
    "files": ["read_json"],
    "layers": ["densify"],
    "layers.maestro_model": ["maestro_layers"],
    "plan": ["forecast", "table"],
    "train": ["AdaptedCallback"],
    "train.data": ["read_examples", "read_texts"],
    "train.loop": ["FitSettings", "fit"],
    "train.metrics": ["metric_for"],
    "train.packing": ["pretraining"],
    "train.recipes": ["Recipe", "load_recipe"],
    "train.run": ["run_recipe"],
    "train.tasks": ["classification", "language_modelling"],
    "train.tokenizers": ["byte_tokenizer"],
}


@pytest.mark.parametrize("module", NAMES)
def test_public_names_stay(module):
    there = importlib.import_module(module)
    assert not [name for name in NAMES[module] if not hasattr(there, name)]


def test_the_comparison_under_its_former_names():
    import lowdim.compare.runs as runs

    import lowdim
    from lowdim.comparison import CompareSettings
    from lowdim.comparison import runs as home

    assert runs is home, "what is replaced in one is replaced in the other"
    assert CompareSettings(model="m", data=("d",), trials=2) == CompareSettings(model="m", data=("d",), rates=2)
    with pytest.raises(ValueError, match="--sizes must be"):
        lowdim.compare(model="stories260k", task="causal-lm", sizes=9)


def test_a_package_under_its_former_name():
    from lowdim import methods, strategies

    assert strategies is methods


@pytest.mark.parametrize("module", INNER)
def test_inner_names_that_others_import_stay(module):
    for name in INNER[module]:
        code: dict = {}
        exec(f"from lowdim.{module} import {name}", code)
        assert code[name] is not None
