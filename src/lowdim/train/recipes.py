"""Recipes: one YAML file describes a whole run. Unknown keys are errors with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lowdim.errors import UnknownNameError, nearest, shown
from lowdim.train.recipe_files import Columns, Files, read_recipe
from lowdim.train.replacing import Replaces

__all__ = ["Recipe", "load_recipe", "new_recipe"]

#: What is trained on if no data are named.
_SHIPPED = {
    "classify": "lowdim:sentence-polarity",
    **dict.fromkeys(("causal-lm", "pretrain", "instruct"), "lowdim:shakespeare"),
}


class Recipe(BaseModel):
    """A training run. `lowdim run FILE --check` prints it filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(description="A folder, a hub id, or minilm, stories260k, smollm2-135m")
    task: Literal["classify", "regress", "instruct", "causal-lm", "pretrain", "image", "tokens", "embed"] = Field(
        "classify", description="Task; pretrain is causal-lm from random weights on packed text"
    )
    pretrained: bool = Field(True, description="False starts from random weights")
    tokenizer: str | None = Field(None, description="bytes, characters, a folder or a hub id; null: the model's own (pretrain)")
    ffn: str | None = Field(
        None,
        description="Feed-forward layers, from random weights: blockdense, blockshuffle, lowrank, dense; blockdense,rank=64",
    )
    mixer: str | None = Field(None, description="In the place of attention, from random weights: delta-product or s4d")
    method: str = Field("lora", description="A name from `lowdim list`, or linear-probe, lora, full")
    options: dict[str, Any] = Field(default_factory=dict, description="Hyperparameters of the method")

    data: Files = Field(
        min_length=1, description="Files, or datasets:PATH[:CONFIG[:SPLIT]] (pretrain); lowdim:shakespeare is shipped"
    )
    streaming: bool | None = Field(None, description="Pack text while training (pretrain); null: for datasets: sources only")
    eval: str | None = Field(None, description="A separate test file")
    validation: str | None = Field(None, description="A separate validation file; null: a part of the data")
    text: Columns = Field(None, description="Name of the text column; a list of two for pairs of texts (classify, regress)")
    label: str | None = Field(None, description="Name of the label column")
    label_separator: str | None = Field(None, description="What stands between several labels in one string; lists need none")
    limit: int | None = Field(None, ge=1, description="Maximum number of training texts or blocks")
    max_length: int = Field(128, ge=4, description="Tokens of a text or block")
    metric: str | None = Field(None, description="A metric of the task; null: its usual one")
    answer_pattern: str | None = Field(
        None,
        description="The part of an answer that counts: number (the last one), or a regular expression with a group",
    )
    sizes: list[tuple[int, int]] | None = Field(
        None,
        description="(layers, dimensions) that are trained besides the whole (embed): all layers for Matryoshka, growing ones "
        "for Starbucks",
    )
    replaces: Replaces | None = Field(
        None,
        description="The old model whose index stays (embed, texts with a class each): its vectors, `FILE` or `FILE:KEY`, or "
        "its name; or {vectors: FILE, mu: 10, ce_weight: 0.1}",
    )
    keep: str | None = Field(None, description="A text whose loss before and after is reported: what must not be forgotten")

    steps: int = Field(100, ge=1, description="Optimizer steps")
    batch_size: int = Field(16, ge=1, description="Texts of a forward pass, per device")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes of an optimizer step")
    total_batch: int | None = Field(None, ge=1, description="Texts of an optimizer step on all devices; sets the accumulation")
    layerwise: bool = Field(False, description="Update in the backward pass and free each gradient at once (lowdim.optim)")
    lr: float | None = Field(None, gt=0, description="Peak learning rate; the method's own first choice if left out")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the steps")
    schedule: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "polynomial", "cosine_with_restarts"
    ] = Field("linear", description="How the rate falls after the warm-up")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 switches it off")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the weights")
    quantize: Literal["int8", "int4", "nf4"] | None = Field(
        None, description="Keep the base's linear weights in few bits: torchao int8 or int4, bitsandbytes nf4 (adapters)"
    )
    optimizer: Literal["adamw", "adamw8bit"] = Field(
        "adamw", description="Of methods without an optimizer of their own; adamw8bit keeps its moments in 8 bits"
    )
    ranks: Literal["uniform", "farms"] = Field(
        "uniform", description="farms: each layer's rank follows its tail exponent, at the same number of trained numbers"
    )
    master_weights: bool = Field(
        False, description="Keep a float32 copy of each trained bfloat16 weight; false: they are rounded stochastically"
    )
    bf16: bool = Field(False, description="Compute in bfloat16 by autocast")
    group_by_length: bool = Field(False, description="Put rows of like length into a batch, so that less of it is padding")
    seed: int = Field(0, ge=0, description="Of all random numbers")
    eval_steps: int = Field(0, ge=0, description="Steps between scores on the validation part; 0: at the end (pretrain)")
    save_steps: int = Field(0, ge=0, description="Steps between checkpoints; 0: no checkpoints")
    watch: int = Field(0, ge=0, description="Steps between measurements of what training does to the layers' weights; 0: none")
    report_to: str = Field("none", description="A tracker known to transformers, e.g. tensorboard")

    out: str = Field("lowdim-run", description="Folder of the results")

    @property
    def from_scratch(self) -> bool:
        """Whether the weights start at random."""
        return self.task == "pretrain" or not self.pretrained

    @field_validator("master_weights")
    @classmethod
    def _of_16_bits(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("dtype") == "float32":
            raise ValueError("master_weights needs dtype: bfloat16; float32 weights need no copy")
        return value

    @field_validator("quantize")
    @classmethod
    def _of_trained_weights(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and (info.data.get("task") == "pretrain" or info.data.get("pretrained") is False):
            raise ValueError("quantize is for a pre-trained base, which stays as it is; random weights are all trained")
        return value

    @field_validator("ranks")
    @classmethod
    def _of_trained_layers(cls, value: str, info: ValidationInfo) -> str:
        if value != "uniform" and (info.data.get("task") == "pretrain" or info.data.get("pretrained") is False):
            raise ValueError(f"ranks {value} follow from trained weights; here they are random")
        return value

    @field_validator("ffn", "mixer")
    @classmethod
    def _of_new_blocks(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        from lowdim.models.blocks import check_blocks

        check_blocks(**{"ffn": None, "mixer": None, str(info.field_name): value})
        if not (info.data.get("task") == "pretrain" or info.data.get("pretrained") is False):
            raise ValueError(f"{info.field_name} is for a model with random weights: task pretrain, or pretrained: false")
        return value

    @field_validator("sizes")
    @classmethod
    def _of_embeddings(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("task") != "embed":
            raise ValueError(f"sizes is for task embed; the task is {info.data.get('task')}")
        return value

    @field_validator("replaces")
    @classmethod
    def _of_one_size(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("task") != "embed":
            raise ValueError(f"replaces is for task embed; the task is {info.data.get('task')}")
        if value is not None and info.data.get("sizes") is not None:
            raise ValueError("replaces trains one size, that of the old vectors: leave out sizes")
        return value


def load_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read a recipe; `changes` that are not None replace its values.

    Raises:
        DataError: the file is missing or not YAML.
        UnknownNameError: a key that no recipe has.
        ValueError: a value out of range (the key is named).
    """
    content, _ = read_recipe(path)
    known = list(Recipe.model_fields)
    for key in content:
        if key not in known:
            raise UnknownNameError(
                f"{path}: no recipe has a key {shown(key)}; nearest: {', '.join(nearest(shown(key), known))}"
            )
    return _made(str(path), {**content, **{key: value for key, value in changes.items() if value is not None}})


def new_recipe(*, model: str | None = None, task: str | None = None, **given: Any) -> Recipe:
    """A recipe without a file. None means the default.

    Here that is also a shipped text, `bytes` for a shape without a tokenizer, and method `full` for random weights.

    Raises:
        ValueError: no model or no task, or a value out of range.

    Example:
        >>> from lowdim.train.recipes import new_recipe
        >>> made = new_recipe(model="llama-tiny", task="pretrain", ffn="blockdense")
        >>> made.data, made.tokenizer, made.method
        (['lowdim:shakespeare'], 'bytes', 'full')
    """
    from lowdim.models.architectures import is_shape

    if model is None or task is None:
        raise ValueError("without a recipe, a run needs --model and --task")
    usual: dict[str, Any] = {"model": model, "task": task}
    if task in _SHIPPED:
        usual["data"] = _SHIPPED[task]
    if task == "pretrain":
        usual |= {"method": "full", "tokenizer": "bytes" if is_shape(model) else None}
    return _made("recipe", {**usual, **{key: value for key, value in given.items() if value is not None}})


def _made(what: str, content: dict[str, Any]) -> Recipe:
    try:
        return Recipe(**content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {shown(e['input'])})" for e in error.errors()[:5]]
        more = f"; and {error.error_count() - 5} more" if error.error_count() > 5 else ""
        raise ValueError(f"{what}: {'; '.join(lines)}{more}") from None
