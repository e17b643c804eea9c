"""Models by name: a folder, a hub id, or one of ours; with weights, or from the configuration alone."""

from lowdim.models.configurations import encoder_options, fit_vocabulary, load_config, longest_text, reads_segments
from lowdim.models.forms import TASKS
from lowdim.models.heads import head_modules, name_classes
from lowdim.models.loading import build, load_by_class, load_model, skeleton
from lowdim.models.padding import declare_padding
from lowdim.models.probe import Probe, room_for
from lowdim.models.processors import load_image_processor, load_processor, load_tokenizer
from lowdim.models.sentence_encoders import load_sentence_encoder
from lowdim.models.sources import NAMES, Source, assets, quiet, resolve

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
    "load_image_processor",
    "load_model",
    "load_processor",
    "load_sentence_encoder",
    "load_tokenizer",
    "longest_text",
    "name_classes",
    "quiet",
    "reads_segments",
    "resolve",
    "room_for",
    "skeleton",
]
