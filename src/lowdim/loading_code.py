"""Python that loads an exported folder without lowdim, for its README."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowdim.models.classes import is_sentence_transformer, loading_class
from lowdim.models.heads import named_classes
from lowdim.models.sentence_classifier import SentenceClassifier

__all__ = [
    "answer_lines",
    "as_keywords",
    "class_line",
    "generation_lines",
    "head_lines",
    "imports",
    "loading_call",
    "pair_lines",
    "peft_lines",
]


def generation_lines(model: nn.Module, tokenizer: Any, place: str) -> str:
    """How a language model answers: through its chat template, if the tokenizer has one; nothing for other models."""
    if tokenizer is None or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return ""
    if getattr(tokenizer, "chat_template", None):
        batch = (
            'chat = [{"role": "user", "content": "a question"}]\n'
            'batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")\n'
        )
    else:
        batch = 'batch = tokenizer("a text", return_tensors="pt", return_token_type_ids=False)\n'
    return (
        f"\nfrom transformers import AutoTokenizer\n\ntokenizer = AutoTokenizer.from_pretrained({place})\n{batch}"
        "output = model.generate(**batch, max_new_tokens=32, do_sample=False)\n"
        'print(tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))\n'
    )


def loading_call(model: nn.Module, place: str, options: dict[str, Any]) -> str:
    """The call that loads the model from a place."""
    name = loading_class(model)[1]
    return f"{name}({place})" if is_sentence_transformer(model) else f"{name}.from_pretrained({place}, {as_keywords(options)})"


def as_keywords(options: dict[str, Any]) -> str:
    """Options as the arguments of a call."""
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def _batch_line(joint: str | None) -> str:
    """A batch of one text, or of one pair."""
    texts = (
        '["a text"]' if joint is None else '["a text"], ["its partner"]' if not joint else f"[{f'a text{joint}its partner'!r}]"
    )
    return f'batch = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")\n'


def imports(model: nn.Module, joint: str | None) -> str:
    """The class that loads the model, and the tokenizer's for pairs."""
    module, name = loading_class(model)
    names = [name] if joint is None else [name, "AutoTokenizer"]
    return f"from {module} import {', '.join(names)}\n"


def peft_lines(model: nn.Module, root: str, base: str, options: dict[str, Any], folder: Path) -> str:
    """How the base model is loaded, and the adapter over it, or over the part of it that the adapter is for."""
    call = loading_call(model, repr(base), options)
    if not root:
        return f'base = {call}\nmodel = PeftModel.from_pretrained(base, "{folder.name}")\n'
    first, _, rest = root.partition(".")
    part = f"model[{first}].{rest}" if first.isdigit() else f"model.{root}"
    return f'model = {call}\n{part} = PeftModel.from_pretrained({part}, "{folder.name}")\n'


def pair_lines(base: str, joint: str | None) -> str:
    """How a classifier reads a pair of texts; nothing for single texts."""
    if joint is None:
        return ""
    return f"tokenizer = AutoTokenizer.from_pretrained({base})\n\n{_batch_line(joint)}logits = model(**batch).logits\n"


def head_lines(folder: Path, base: str, joint: str | None) -> str:
    """How an encoder's states become the logits of a head in a file of its own."""
    return (
        f'head = load_file("{folder.name}/head.safetensors")\ntokenizer = AutoTokenizer.from_pretrained({base})\n\n'
        f"{_batch_line(joint)}"
        "states, mask = encoder(**batch).last_hidden_state, batch['attention_mask'].unsqueeze(-1)\n"
        'logits = ((states * mask).sum(1) / mask.sum(1)) @ head["weight"].T + head["bias"]\n'
    )


def class_line(model: nn.Module) -> str:
    """The names of the classes of a new head, which the configuration of the base model lacks."""
    new = isinstance(model, SentenceClassifier) or getattr(model, "new_modules", ()) or getattr(model, "replaced_head", False)
    names = named_classes(model) if new else ()
    return f"classes = {list(names)!r}  # in the order of the logits\n" if names else ""


def answer_lines(model: SentenceClassifier) -> str:
    """How logits become names of classes; nothing for regression."""
    several = "[[name for name, logit in zip(classes, row) if logit > 0] for row in logits]"
    one = "[classes[i] for i in logits.argmax(-1)]"
    line = class_line(model)
    return line and f"{line}answers = {several if model.problem == 'multi_label_classification' else one}\n"
