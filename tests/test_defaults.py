"""Defaults are part of what a result depends on: those of the systems that no other test calls without arguments."""

import importlib
import inspect
import math
from operator import attrgetter

import pytest

HALF = math.sqrt(0.5)
PAIRS = ((2, 32), (4, 64), (6, 128), (8, 256), (10, 512), (12, 768))

#: Module and name -> what an argument is where it is left out.
DEFAULTS = {
    "compress.PSTConfig": {
        "total_steps": None, "sparsity": 0.9, "weight_rank": 8, "mask_rank": 8, "weight_beta": 1.0, "mask_alpha1": 1.0,
        "mask_alpha2": 1.0, "initial_sparsity": 0.0, "initial_warmup": 0.1, "final_warmup": 0.3, "train_others": False,
        "seed": 0,
    },
    "layers.HouseholderProjector": {"bias": True, "rank": 10, "scale": 1.0},
    "layers.HouseholderProjector.from_linear": {"rank": 10, "scale": 1.0},
    "train.multigrid.MultigridSchedule": {
        "base_lr": 1.0, "gamma": 0.1, "long_cycle": True, "short_cycle": True, "epoch_factor": 1.5,
        "long_cycle_factors": ((0.25, HALF), (0.5, HALF), (0.5, 1), (1, 1)), "short_cycle_factors": (0.5, HALF),
        "bn_base_size": 8, "num_devices": 1, "sampling_rate": 1, "warmup_epochs": 0.0, "warmup_start_lr": 0.0,
    },
    "train.multigrid.SubBatchNorm": {"num_splits": 1, "eps": 1e-5, "momentum": 0.1, "affine": True},
    "represent.StarbucksLoss": {
        "pairs": PAIRS, "last_layer_weight": 1.0, "kl_div_weight": 1.0, "kl_temperature": 0.3, "detach_teacher": False,
    },
    "represent.StarbucksCollator": {"encoder_probability": 0.2, "decoder_probability": 0.4, "pad_to_multiple_of": 8},
    "represent.nested_whole_word_masks": {"encoder_probability": 0.2, "decoder_probability": 0.4, "max_predictions": 512},
    "represent.StarbucksPretraining": {"pairs": PAIRS, "decoder_layers": 1},
    "represent.starbucks_retrieval_loss": {"temperature": 1.0, "kl_div_weight": 1.0},
    "represent.shrink_encoder": {"head": "truncate"},
    "represent.size_table": {"metric": None, "batch_size": 32, "repeats": 5, "resamples": 1000, "seed": 0},
    "represent.DSimplexClassifier": {"reverse_labels": False},
    "represent.HOCLoss": {"mu": 10.0, "exclude_same_class": False},
    "represent.StationaryLoss": {"mu": 10.0, "ce_weight": 0.1},
    "represent.replacement_report": {"query": None, "k": 10, "resamples": 1000, "seed": 0},
    "represent.ManifoldLinearizingClustering": {
        "n_components": 32, "hidden": 256, "eps_sq": 0.1, "eta": 0.175, "kernel": "abs", "sinkhorn_iterations": 5,
        "membership_penalty": 0.05, "warmup_epochs": 10, "epochs": 20, "batch_size": 256, "lr": 3e-3, "lr_cluster": 2e-3,
        "augment": None, "alignment": 0.1,
    },
    "represent.membership": {"eta": 0.175, "kernel": "abs", "iterations": 5, "tol": None},
    "represent.sinkhorn_projection": {"eta": 0.175, "iterations": 5, "tol": None},
    "represent.coding_rate": {"eps_sq": 0.1},
    "represent.clustered_coding_rate": {"eps_sq": 0.1},
    "represent.MLCLoss": {"eps_sq": 0.1, "membership_penalty": 0.05},
    "represent.TotalCodingRateLoss": {"eps_sq": 0.1, "alignment": 0.1},
    "represent.FCCovLoss": {"penalty": 0.1},
    "represent.FCCovNet": {
        "n_components": 2, "metric": "euclidean", "hidden": (64, 64), "penalty": 0.1, "epochs": 100, "batch_size": 128,
        "lr": 5e-3,
    },
    "represent.TransductiveClustering": {
        "prototype": "mode", "laplacian": True, "lam": 0.7, "n_neighbors": 3, "sigma": None, "clamp": True, "max_iter": 100,
        "tol": 1e-4, "bound_iter": 600, "bound_tol": 1e-7, "mean_shift_iter": 1000, "mean_shift_tol": 1e-5,
    },
    "represent.episode_features": {"base_mean": None, "normalize": True, "shift": True},
    "represent.knn_affinity": {"n_neighbors": 3},
    "represent.bound_update": {"max_iter": 600, "tol": 1e-7, "clamped": None},
    "represent.label_locus": {"method": "lp", "tol": 1e-9},
    "represent.select_next_class": {"strategy": "farthest", "method": "lp"},
    "represent.active_selection": {"budget": None, "strategy": "farthest", "method": "lp"},
    "represent.frechet_one_hot": {"estimator": "straight_through", "eta": 0.01},
    "represent.ActiveMultiTask": {"order": 1, "lam": None, "stages": 3, "minimum": None},
    "represent.allocate_samples": {"order": 1, "minimum": 0},
    "represent.task_relevance": {"order": 1, "lam": None},
    "represent.SharedLinearRepresentation": {"max_iter": 200, "tol": 1e-8},
    "represent.DualRandomizedSmoothing": {"masks": None, "fill": "neighbour", "rule": "sound"},
    "represent.DualRandomizedSmoothing.certify": {"n0": 100, "n": 100_000, "alpha": 0.001, "batch_size": 1000},
    "represent.RandomizedSmoothing.predict": {"n": 100_000, "alpha": 0.001, "batch_size": 1000},
    "represent.dual_smoothing_radius": {"rule": "sound"},
    "represent.checkerboard": {"variant": "paper"},
    "represent.fill_masked": {"fill": "neighbour"},
    "diagnose.balanced_lrs": {"method": "linear", "low": 0.5, "high": 1.5},
    "diagnose.TempBalance": {
        "lr_method": "linear", "low": 0.5, "high": 1.5, "skip_first": True, "skip_last": True, "interval": None,
    },
    "diagnose.farms": {
        "rows": 128, "ratio": 1.0, "windows": 9, "step": None, "method": "median", "xmin_pos": 2, "bins": 100,
        "conv_scale": 0.5, "min_eigs": 5, "exclude": ("embed", "wte", "wpe"),
    },
    "diagnose.farms_eigs": {"rows": 128, "ratio": 1.0, "windows": 9, "step": None},
    "diagnose.fit_alpha": {"method": "median", "xmin_pos": 2, "bins": 100, "eig_threshold": None},
    "diagnose.pruning_ratios": {"epsilon": 0.2, "block": 1, "cap": 0.998},
    "diagnose.batch_spectrum": {"optimizer": "sgd", "steps": 30, "batches": 4, "probes": 2},
    "diagnose.heavy_ball": {"floor": 1e-3},
    "diagnose.tune_sgd": {"rule": "heavy_ball", "steps": 10, "floor": 1e-3},
    "diagnose.batch_extremes": {"n_data": None, "kind": "hessian"},
    "diagnose.intrinsic_dimension": {"threshold": 0.9, "baseline": None, "seeds": (0,), "reduce": "mean", "search": "grid"},
    "diagnose.generalization_dynamics": {"inr": 0.0, "noise_var": 1.0, "eigenvalues": None, "nodes": 400},
    "diagnose.feature_dynamics": {"held_out": None, "seed": 0, "rtol": 1e-10},
    "diagnose.lora_limits": {"beta": None, "epsilon": 1e-3, "max_degree": 64},
    "diagnose.lora_attention_gradient": {"beta": None, "method": "chained", "degree": 4},
    "solve.linf_lstsq": {"sketch": "srht", "rows": None, "eps": 0.5, "delta": 0.01, "seed": 0},
    "solve.solve_dcd": {"x0": None, "rtol": 1e-5, "atol": 0.0, "maxiter": 100, "orth": 2},
    "solve.dcd": {"x0": None, "rtol": 1e-5, "atol": 0.0, "maxiter": None, "M": None, "orth": 2},
    "solve.ritz_dataset": {"theta": None, "low_weight": 9.0, "cutoff": 1e-8},
    "solve.train_dcd": {"batch_size": 10, "lr": 1e-4, "decay": 1.0, "seed": 0},
    "solve.DCDNet": {"dim": 3, "filters": 16, "fine_blocks": 1, "coarse_blocks": 3, "up_blocks": 2},
}  # fmt: skip


def reached(path):
    home, _, name = path.partition(".")
    if name.startswith("multigrid."):
        home, name = "train.multigrid", name.removeprefix("multigrid.")
    return attrgetter(name)(importlib.import_module(f"lowdim.{home}"))


@pytest.mark.parametrize("path", DEFAULTS)
def test_what_is_left_out_is_as_published(path):
    parameters = inspect.signature(reached(path)).parameters
    assert {name: parameters[name].default for name in DEFAULTS[path]} == DEFAULTS[path]
