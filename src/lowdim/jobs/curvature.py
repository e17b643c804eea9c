"""Diagnostics that need a model and data: curvature by batch size, dynamics of a readout, intrinsic dimension of a recipe."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowdim.errors import LowdimError, check_float, check_int

__all__ = ["batch_lr", "generalization_dynamics", "intrinsic_dimension"]


def batch_lr(
    model: str,
    data: Sequence[str],
    *,
    batch_size: int,
    optimizer: str = "sgd",
    steps: int = 30,
    batches: int = 4,
    probes: int = 2,
    seed: int = 0,
    samples: int = 64,
    max_length: int = 64,
    task: str | None = None,
    text: str | None = None,
    label: str | None = None,
) -> Any:
    """Curvature of a model's loss over all samples and over batches, and the rates that it allows.

    Args:
        model: a folder (of an adapter too), a hub id, or a built-in name.
        data: files of texts.
        batch_size: rows of a batch in training, >= 1.
        optimizer: sgd or adam.
        steps: Lanczos steps, >= 1; they are kept, each as large as the model.
        batches: batches that are measured, >= 1.
        probes: random vectors for the noise, >= 1.
        seed: of batches and vectors, >= 0.
        samples: rows of the data that are taken, >= 2.
        max_length: tokens of a row, >= 4.
        task: causal-lm or classify; null: by the model's class.
        text: column of the text; null detects it.
        label: column of the label; null detects it.

    Returns:
        A `lowdim.diagnose.BatchSpectrum`.

    Raises:
        ValueError: an option out of range, a batch larger than the data; as `batch_spectrum`.
        DataError: the data cannot be read.
    """
    from lowdim.diagnose import batch_spectrum

    check_int("batch_size", batch_size, 1)
    check_int("steps", steps, 1)
    check_int("batches", batches, 1)
    check_int("probes", probes, 1)
    check_int("seed", seed, 0)
    _check_data(samples, max_length)
    loaded, work, rows = _read(model, data, task, samples, max_length, text, label)
    how: dict[str, Any] = {"optimizer": optimizer, "steps": steps, "batches": batches, "probes": probes, "seed": seed}
    return batch_spectrum(loaded, work.loss_fn, work.collate(rows), batch_size=batch_size, **how)


def generalization_dynamics(
    model: str,
    data: Sequence[str],
    *,
    layer: str | None = None,
    held_out: float = 0.25,
    seed: int = 0,
    samples: int = 400,
    max_length: int = 64,
    text: str | None = None,
    label: str | None = None,
) -> Any:
    """A linear readout on a layer's features, trained by exact gradient flow: does training for longer make it worse?

    Args:
        model: a folder (of an adapter too), a hub id, or a built-in name.
        data: files of texts with labels.
        layer: name of the module whose output is read; null: the one before the head.
        held_out: share of the samples that is not trained on, in (0, 1).
        seed: which samples that is, >= 0.
        samples: rows of the data that are taken, >= 4.
        max_length: tokens of a row, >= 4.
        text: column of the text; null detects it.
        label: column of the label; null detects it.

    Returns:
        A `lowdim.diagnose.FeatureDynamics`.

    Raises:
        ValueError: a layer that is not there, an option out of range. DataError: the data cannot be read.
    """
    import torch

    from lowdim.diagnose import feature_dynamics

    check_float("held_out", held_out, 0.0, 1.0, low_open=True, high_open=True)
    check_int("seed", seed, 0)
    _check_data(samples, max_length, 4)
    loaded, work, rows = _read(model, data, "classify", samples, max_length, text, label)
    batches = [work.collate(rows[start : start + 32]) for start in range(0, len(rows), 32)]
    chosen = _before_head(loaded, batches[0]) if layer is None else layer
    times = torch.cat([torch.zeros(1), torch.logspace(-4, 6, 41, dtype=torch.float64)])
    return feature_dynamics(loaded, chosen, batches, times=times, held_out=held_out, seed=seed)


def intrinsic_dimension(
    recipe: str,
    *,
    dims: Sequence[int],
    search: str = "grid",
    seeds: int = 1,
    threshold: float = 0.9,
    projection: str = "fastfood",
    lr: float = 3e-2,
    full_lr: float | None = None,
    say: Any = lambda line: None,
) -> Any:
    """The fewest dimensions in which a recipe's model learns its task: each training is a run of that recipe.

    Args:
        recipe: a recipe of `lowdim run`; the baseline is its full fine-tuning.
        dims: dimensions to test, such as [40, 80, 160].
        search: grid (all dimensions) or bisect.
        seeds: trainings of each dimension, >= 1.
        threshold: share of the baseline that is enough, in (0, 1].
        projection: fastfood, dense or sparse.
        lr: rate in the subspace, > 0.
        full_lr: rate of the baseline, > 0; null: the recipe's, if its method is full, else 5e-5.
        say: called with a line after each training.

    Returns:
        A `lowdim.diagnose.IntrinsicDimensionResult`.

    Raises:
        ValueError: an option out of range, a training that fails, a metric of which less is better.
        DataError: the data cannot be read.
    """
    from lowdim import models
    from lowdim.catalogue import variant
    from lowdim.diagnose import intrinsic_dimension as search_dimension
    from lowdim.train.loading import load_base, load_task, recipe_processor
    from lowdim.train.recipes import load_recipe

    check_int("seeds", seeds, 1)
    check_float("lr", lr, 0.0, low_open=True)
    if full_lr is not None:
        check_float("full_lr", full_lr, 0.0, low_open=True)
    check_float("threshold", threshold, 0.0, 1.0, low_open=True)
    made = load_recipe(recipe)
    processor = recipe_processor(made)
    work = load_task(made, processor)
    metric = work.metric(made.metric)
    if not metric.higher_is_better:
        raise ValueError(
            f"{metric.name} is better when it is lower, so a share of it says nothing; the recipe needs a metric like accuracy"
        )
    own = made.lr if made.method == "full" else None
    direct = full_lr or own or variant("full").rates[0]
    full = sum(p.numel() for p in load_base(made, work.num_labels, processor, work.problem).parameters())

    def measure(dimension: int | None, seed: int) -> float:
        model = load_base(made.model_copy(update={"seed": seed}), work.num_labels, processor, work.problem)
        models.name_classes(model, work.classes)
        return _trained(model, work, metric, made, dimension, seed, projection, direct if dimension is None else lr)

    done = [0]

    def tell(dimension: int | None, seed: int, score: float) -> None:
        done[0] += 1
        name = "baseline" if dimension is None else f"d = {dimension}"
        most = seeds * (1 + (len(dims).bit_length() if search == "bisect" else len(dims)))
        say(f"{name}, seed {seed}: {score:.4f} ({done[0]} trainings done, at most {most - done[0]} left)")

    how: dict[str, Any] = {"threshold": threshold, "search": search, "seeds": range(made.seed, made.seed + seeds)}
    return search_dimension(measure, dims, full_dimension=full, callback=tell, **how)


def _trained(
    model: Any, task: Any, metric: Any, recipe: Any, dimension: int | None, seed: int, projection: str, lr: float
) -> float:
    """The score of one training, in a subspace or of everything."""
    from lowdim.adapters import intrinsic_subspace
    from lowdim.catalogue import variant
    from lowdim.methods import Applied, Setup
    from lowdim.methods.strategy import adamw
    from lowdim.train.loop import fit
    from lowdim.train.run import fit_settings

    model.requires_grad_(True)
    if dimension is not None:
        model = intrinsic_subspace(model, dimension, projection=projection, seed=seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    setup = Setup(lr=lr, steps=recipe.steps, seed=seed)
    applied = Applied(model, variant("full"), lambda rate: adamw(parameters, rate, setup))
    settings = dataclasses.replace(fit_settings(recipe, lr), seed=seed, save_steps=0, eval_steps=0, report_to="none")
    with tempfile.TemporaryDirectory() as folder:
        result = fit(applied, task, settings, Path(folder))
    if result.failure:
        raise LowdimError(result.failure)
    return float(task.evaluate(model, task.test, metric))


def _check_data(samples: int, max_length: int, least: int = 2) -> None:
    check_int("samples", samples, least)
    check_int("max_length", max_length, 4)


def _read(
    name: str, data: Sequence[str], task: str | None, samples: int, max_length: int, text: str | None, label: str | None
) -> tuple[Any, Any, list[Any]]:
    """The model, its task, and training rows."""
    from lowdim import models
    from lowdim.errors import check_choice
    from lowdim.jobs.adapted import holds_adapter, load_adapted
    from lowdim.models.configurations import load_config
    from lowdim.train.tasks import classification, language_modelling

    files = [data] if isinstance(data, str) else list(data)
    if not files:
        raise ValueError("--data must name at least one file")
    path = Path(name)
    folder = next((place for place in (path, path / "adapter") if place.is_dir() and holds_adapter(place)), None)
    base, adapted = (name, None) if folder is None else load_adapted(folder, task=task)
    if task is None:
        written = str((getattr(load_config(base), "architectures", None) or [""])[0])
        task = "classify" if "SequenceClassification" in written else "causal-lm"
    check_choice("task", task, ("causal-lm", "classify"))
    tokenizer = models.load_tokenizer(base)
    reading: dict[str, Any] = {"text": text, "max_length": max_length, "most": models.longest_text(base), "limit": samples}
    if task == "classify":
        work: Any = classification(tokenizer, files, label=label, **reading)
        load = {"num_labels": work.num_labels, "problem": work.problem, "pad_token_id": tokenizer.pad_token_id}
    else:
        work = language_modelling(tokenizer, files, **reading)
        load = {"pad_token_id": tokenizer.pad_token_id}
    model = models.load_model(base, task, **load) if adapted is None else adapted.merge()
    model.requires_grad_(True)
    return model, work, [work.train[i] for i in range(min(samples, len(work.train)))]


def _before_head(model: Any, batch: Any) -> str:
    """The module that ran last before the model's last linear layer, dropout aside."""
    import torch
    from torch import nn

    from lowdim.calibrate import call_model, evaluating

    ran: list[str] = []
    leaves = {name: module for name, module in model.named_modules() if not list(module.children())}
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in leaves.items()
        if not isinstance(module, (nn.Dropout, nn.Identity))
    ]
    try:
        with evaluating(model), torch.no_grad():
            call_model(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    heads = [i for i, name in enumerate(ran) if isinstance(leaves[name], nn.Linear)]
    if not heads or heads[-1] == 0:
        raise ValueError(f"{type(model).__name__} has no linear head with a module before it; give layer")
    return ran[heads[-1] - 1]
