"""Models by name: a folder, a hub id, or one of ours; with weights, or from the configuration alone."""

from lowdim.models.load import (
    NAMES,
    TASKS,
    Source,
    assets,
    build,
    encoder_options,
    fit_vocabulary,
    head_modules,
    load_by_class,
    load_config,
    load_model,
    load_processor,
    load_tokenizer,
    longest_text,
    quiet,
    reads_segments,
    resolve,
)
from lowdim.models.padding import declare_padding
from lowdim.models.probe import Probe, room_for

__all__ = [
    "NAMES",
    "TASKS",
    "Probe",
    "Source",
    "assets",
    "build",
    "declare_padding",
    "encoder_options",
    "fit_vocabulary",
    "head_modules",
    "load_by_class",
    "load_config",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "longest_text",
    "quiet",
    "reads_segments",
    "resolve",
    "room_for",
]
