"""Diagnostics that read a model and data: curvature, dynamics of a readout, intrinsic dimension of a recipe."""

import math

import pytest

from lowdim.errors import DataError
from lowdim.jobs.curvature import batch_lr, generalization_dynamics, intrinsic_dimension
from lowdim.testing.agreement import refuses

TEXT = ("lowdim:shakespeare",)
SHORT = {"samples": 8, "max_length": 16, "steps": 3, "batches": 1, "probes": 1}


def test_batch_lr_of_a_language_model():
    found = batch_lr("stories260k", TEXT, batch_size=4, **SHORT)
    assert (found.n_data, found.batch_size) == (8, 4)
    assert found.n_params > 200_000
    assert found.largest > 0
    assert "largest stable rate of sgd" in found.summary


def test_batch_lr_of_a_classifier(bert_folder, two_classes):
    found = batch_lr(str(bert_folder), (str(two_classes),), batch_size=4, task="classify", optimizer="adam", **SHORT)
    assert found.optimizer == "adam"
    assert math.isfinite(found.max_lr)


def test_the_readout_of_a_classifier(bert_folder, two_classes):
    found = generalization_dynamics(str(bert_folder), (str(two_classes),), samples=40, max_length=16)
    assert found.samples == 30
    assert found.test_error is not None
    other = generalization_dynamics(str(bert_folder), (str(two_classes),), samples=40, max_length=16, layer="bert.embeddings")
    assert other.features == found.features
    assert other.rank != found.rank or float(other.train_error[-1]) != float(found.train_error[-1])


def test_bad_input(bert_folder, two_classes):
    model, data = str(bert_folder), (str(two_classes),)
    refuses(
        [
            (ValueError, "must be an int in [1, 8]; got 9", lambda: batch_lr("stories260k", TEXT, batch_size=9, **SHORT)),
            (ValueError, "steps", lambda: batch_lr(model, data, batch_size=1, steps=0)),
            (ValueError, "samples", lambda: batch_lr(model, data, batch_size=1, samples=1)),
            (ValueError, "max_length", lambda: batch_lr(model, data, batch_size=1, max_length=1)),
            (ValueError, "task must be one of causal-lm, classify", lambda: batch_lr(model, data, batch_size=1, task="image")),
            (ValueError, "--data must name", lambda: batch_lr(model, (), batch_size=1)),
            (DataError, "nowhere.txt", lambda: batch_lr(model, ("nowhere.txt",), batch_size=1)),
            (ValueError, "layer: 'bert.encodr' is not a", lambda: generalization_dynamics(model, data, layer="bert.encodr")),
            (ValueError, "held_out", lambda: generalization_dynamics(model, data, held_out=1.0)),
            (ValueError, "seeds", lambda: intrinsic_dimension("recipe.yaml", dims=[3], seeds=0)),
        ]
    )  # fmt: skip


def recipe(tmp_path, model, data, **changes):
    import yaml

    path = tmp_path / "recipe.yaml"
    made = {"model": str(model), "task": "classify", "method": "full", "data": [str(data)], "out": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**made, "steps": 6, "batch_size": 8, "max_length": 16, "limit": 40, **changes}))
    return str(path)


def test_the_intrinsic_dimension_of_a_recipe(bert_folder, two_classes, tmp_path):
    said = []
    made = recipe(tmp_path, bert_folder, two_classes)
    found = intrinsic_dimension(made, dims=[4, 16, 64], search="bisect", say=said.append)
    assert found.measured <= 2
    assert found.full_dimension > 1000
    assert said[0].startswith("baseline, seed ")
    assert "1 trainings done, at most 2 left" in said[0]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="perplexity is better when it is lower"):
        intrinsic_dimension(recipe(tmp_path, "stories260k", TEXT[0], task="causal-lm"), dims=[4])
