"""What PEFT makes of the names in an adapter's configuration: layers, modules that are saved whole, task types.

PEFT compares names by their ends: `classifier` in `modules_to_save` also means `pre_classifier`. Its class for a task adds
heads of its own to that list, and calls the model with the keywords of that task. All of it is decided here, before a file is
written.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from lowdim.adapters.core.layer import AdaptedLayer
from lowdim.adapters.core.shared import SHARED
from lowdim.surgery import named_layers, submodule

__all__ = ["PREFIX", "Plan", "plan_names", "task_type"]

#: What PEFT puts in front of the names of the model that it wraps.
PREFIX = "base_model.model."

_COMMON = ("input_ids", "attention_mask", "inputs_embeds", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class _Task:
    """A class of PEFT: ends of the class names of models that it is for, heads that it adds, keywords that it passes on."""

    ends: tuple[str, ...]
    heads: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    generates: bool = False


_TASKS: Mapping[str, _Task] = {
    "SEQ_CLS": _Task(("ForSequenceClassification",), ("classifier", "score"), (*_COMMON, "labels")),
    "CAUSAL_LM": _Task(("ForCausalLM", "LMHeadModel"), (), (*_COMMON, "labels"), generates=True),
    "TOKEN_CLS": _Task(("ForTokenClassification",), ("classifier", "score"), (*_COMMON, "labels")),
    "QUESTION_ANS": _Task(("ForQuestionAnswering",), ("qa_outputs",), (*_COMMON, "start_positions", "end_positions")),
    "SEQ_2_SEQ_LM": _Task(
        ("ForConditionalGeneration",),
        (),
        (*_COMMON, "labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
        generates=True,
    ),
}


@dataclass(frozen=True)
class Plan:
    """What an export writes beside the factors.

    Attributes:
        task: PEFT's name of the task; None where its class could not load or run the model.
        saved: names of the modules that are written whole: those that were trained, those that share a weight with one of them,
            those that PEFT takes for one of them, and heads that the task's class expects.
        factored: names of the adapted layers outside of them, which are written as factors.
        targets: `target_modules`.
    """

    task: str | None
    saved: tuple[str, ...]
    factored: tuple[str, ...]
    targets: list[str] | str


def plan_names(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], modules_to_save: Iterable[str], *, heads: bool = True
) -> Plan:
    """Decide how the parts of an adapter are written to a PEFT folder.

    Args:
        heads: whether a head that PEFT's class for the task expects may be written, too.
    """
    names = _plain_names(model, layers)
    saved = _closed(model, names, modules_to_save)
    task = task_type(model)
    if task is not None:
        expected = _closed(model, names, _ending_with(_TASKS[task].heads, names))
        missing = [name for name in expected if not _inside(name, saved)]
        touched = any(_related(name, layer) for name in missing for layer in layers)
        if missing and (touched or not heads):
            task = None
        else:
            saved = _outermost((*saved, *missing))
    factored = tuple(name for name in layers if not _inside(name, saved))
    return Plan(task, saved, factored, _targets(names, factored))


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task, from its transformers class; None for any other, or where no token ids go in."""
    name = type(model).__name__
    task = next((task for task, about in _TASKS.items() if name.endswith(about.ends)), None)
    if task is None or getattr(model, "main_input_name", "input_ids") != "input_ids":
        return None
    about, config = _TASKS[task], getattr(model, "config", None)
    if task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False):
        return None
    if about.generates and not callable(getattr(model, "prepare_inputs_for_generation", None)):
        return None
    taken = inspect.signature(type(model).forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    return task if anything or all(key in taken for key in about.keywords) else None


def _plain_names(model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> list[str]:
    """The names that the model's modules have without the adapter."""
    within = {id(part) for layer in layers.values() for part in layer.modules() if part is not layer}
    return [name for name, module in named_layers(model).items() if id(module) not in within and not name.startswith(SHARED)]


def _closed(model: nn.Module, names: list[str], saved: Iterable[str]) -> tuple[str, ...]:
    """`saved`, and what has to be written with it.

    These are the modules outside that share a parameter with one of them, since PEFT copies each module for itself, and those
    that PEFT takes for one of them.
    """
    now: tuple[str, ...] = ()
    more = _outermost(saved)
    while more != now:
        now = more
        mine = {id(p) for name in now for p in submodule(model, name).parameters()}
        tied = [name for name in names if not _inside(name, now) and mine & _own(submodule(model, name))]
        more = _outermost((*now, *tied, *_ending_with((*now, *tied), names)))
    return now


def _own(module: nn.Module) -> set[int]:
    """The module's own parameters; of an adapted layer, those of the layer that it stands for."""
    plain = module.plain if isinstance(module, AdaptedLayer) else module
    return {id(p) for p in plain._parameters.values() if p is not None}


def _outermost(names: Iterable[str]) -> tuple[str, ...]:
    """The names that are not inside another one."""
    names = list(dict.fromkeys(names))
    return tuple(name for name in names if not _inside(name, [other for other in names if other != name]))


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _related(name: str, other: str) -> bool:
    """Whether one of the two is the other, or inside it."""
    return _inside(name, [other]) or _inside(other, [name])


def _ending_with(ends: tuple[str, ...], names: Iterable[str]) -> tuple[str, ...]:
    """The modules that PEFT takes for one of `ends`."""
    return tuple(name for name in names if name.endswith(ends)) if ends else ()


def _targets(names: Iterable[str], layers: tuple[str, ...]) -> list[str] | str:
    """The adapted layers' names; as a regular expression where PEFT would also match other names with the same ending."""
    ends = tuple("." + name for name in layers)
    others = (name for name in names if name not in layers)
    return "|".join(map(re.escape, layers)) if any(name.endswith(ends) for name in others) else list(layers)
