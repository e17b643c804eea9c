"""Training through `transformers.Trainer`: data, tasks, recipes, callbacks, exact resume."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowdim.lazy import lazy_names

if TYPE_CHECKING:
    from lowdim.train.callbacks import AdaptedCallback, TempBalanceCallback
    from lowdim.train.curvature_callback import TuneSGDCallback
    from lowdim.train.layer_watch import LayerWatch
    from lowdim.train.loop import fit
    from lowdim.train.mixin import AdaptedTrainerMixin
    from lowdim.train.multigrid import MultigridSchedule
    from lowdim.train.multigrid_data import GridDataset, MultigridBatchSampler, ShortCycleBatchSampler, resample
    from lowdim.train.multigrid_norm import SubBatchNorm, convert_batch_norm, set_bn_splits
    from lowdim.train.multigrid_trainer import MultigridCallback
    from lowdim.train.recipes import Recipe, load_recipe
    from lowdim.train.run import run_recipe
    from lowdim.train.settings import FitResult, FitSettings
    from lowdim.train.tasks import Task, classification, language_modelling
    from lowdim.train.tasks.own import OwnTask, own_task
    from lowdim.train.tokenizers import byte_tokenizer, character_tokenizer
    from lowdim.train.watch_callback import WatchCallback

__all__ = [
    "AdaptedCallback",
    "AdaptedTrainerMixin",
    "FitResult",
    "FitSettings",
    "GridDataset",
    "LayerWatch",
    "MultigridBatchSampler",
    "MultigridCallback",
    "MultigridSchedule",
    "OwnTask",
    "Recipe",
    "ShortCycleBatchSampler",
    "SubBatchNorm",
    "Task",
    "TempBalanceCallback",
    "TuneSGDCallback",
    "WatchCallback",
    "byte_tokenizer",
    "character_tokenizer",
    "classification",
    "convert_batch_norm",
    "fit",
    "language_modelling",
    "load_recipe",
    "own_task",
    "resample",
    "run_recipe",
    "set_bn_splits",
]

_HOMES = {
    "AdaptedCallback": "callbacks",
    "TempBalanceCallback": "callbacks",
    "TuneSGDCallback": "curvature_callback",
    "LayerWatch": "layer_watch",
    "WatchCallback": "watch_callback",
    "AdaptedTrainerMixin": "mixin",
    "FitResult": "settings",
    "FitSettings": "settings",
    "fit": "loop",
    "OwnTask": "tasks.own",
    "own_task": "tasks.own",
    "Task": "tasks.base",
    "classification": "tasks.classify",
    "language_modelling": "tasks.causal_lm",
    "byte_tokenizer": "tokenizers",
    "character_tokenizer": "tokenizers",
    "MultigridSchedule": "multigrid",
    "GridDataset": "multigrid_data",
    "MultigridBatchSampler": "multigrid_data",
    "ShortCycleBatchSampler": "multigrid_data",
    "resample": "multigrid_data",
    "SubBatchNorm": "multigrid_norm",
    "convert_batch_norm": "multigrid_norm",
    "set_bn_splits": "multigrid_norm",
    "MultigridCallback": "multigrid_trainer",
    "Recipe": "recipes",
    "load_recipe": "recipes",
    "run_recipe": "run",
}

__getattr__ = lazy_names(__name__, _HOMES)
