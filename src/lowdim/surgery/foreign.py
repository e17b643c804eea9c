"""Adapters of other libraries in a model: PEFT's, adapters', loralib's, and LoRA layers of any origin."""

from __future__ import annotations

from torch import nn

from lowdim.surgery.wrappers import unwrap

__all__ = ["other_adapter", "refuse_other_adapters"]

#: Packages whose modules are adapters, and names of their classes' bases.
_PACKAGES = {
    "peft": "PEFT",
    "adapters": "the package adapters",
    "loralib": "loralib",
    "torchtune": "torchtune",
    "unsloth": "unsloth",
}
_BASES = ("BaseTunerLayer", "PeftModel", "AdapterLayerBase", "LoRALayer", "AdapterModule")
#: Attributes of LoRA layers, pair by pair, whoever wrote them.
_PAIRS = (
    ("lora_A", "lora_B"),
    ("lora_a", "lora_b"),
    ("lora_down", "lora_up"),
    ("hada_w1_a", "hada_w1_b"),
    ("lokr_w1", "lokr_w2"),
)


def refuse_other_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model carries another library's adapter."""
    found = other_adapter(model)
    if found:
        raise ValueError(
            f"the model already carries an adapter that lowdim did not make: {found}. Merge it first "
            "(model = model.merge_and_unload() of a PeftModel), or load the plain model again"
        )


def other_adapter(model: nn.Module) -> str:
    """Where the model carries another library's adapter, in words; empty if it carries none."""
    known: dict[type, str] = {}
    for name, module in unwrap(model).named_modules():
        kind = type(module)
        if kind not in known:
            known[kind] = _library(kind)
        library = known[kind] or _by_parts(module)
        if library:
            return f"{name or 'the model itself'} is a {kind.__name__} ({library})"
    return ""


def _library(kind: type) -> str:
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if base.__name__ in _BASES and package in _PACKAGES:
            return _PACKAGES[package]
    return ""


def _by_parts(module: nn.Module) -> str:
    held = {*module._modules.keys(), *module._parameters.keys()}
    pair = next((pair for pair in _PAIRS if held.issuperset(pair)), None)
    return f"its parts {' and '.join(pair)} are LoRA's" if pair else ""
