"""Recipes: one YAML file describes a whole run. Unknown keys are errors with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from lowdim.errors import DataError, UnknownNameError, nearest, shown
from lowdim.train.safe_yaml import read_yaml

__all__ = ["Recipe", "load_recipe"]


class Recipe(BaseModel):
    """A training run. `lowdim run FILE --check` prints it filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    model: str = Field(description="A folder, a hub id, or minilm, stories260k, smollm2-135m")
    task: Literal["classify", "causal-lm", "pretrain"] = Field(
        "classify", description="Task; pretrain is causal-lm from random weights on packed text"
    )
    pretrained: bool = Field(True, description="False starts from random weights")
    tokenizer: str | None = Field(None, description="bytes, characters, a folder or a hub id; null: the model's own (pretrain)")
    method: str = Field("lora", description="A name from `lowdim list`, or linear-probe, lora, full")
    options: dict[str, Any] = Field(default_factory=dict, description="Hyperparameters of the method")

    data: list[str] = Field(
        min_length=1, description="Files, or datasets:PATH[:CONFIG[:SPLIT]] (pretrain); lowdim:shakespeare is shipped"
    )
    streaming: bool | None = Field(None, description="Pack text while training (pretrain); null: for datasets: sources only")
    eval: str | None = Field(None, description="A separate test file")
    text: str | None = Field(None, description="Name of the text column; a list of two for pairs of texts (classify)")
    label: str | None = Field(None, description="Name of the label column")
    limit: int | None = Field(None, ge=1, description="Maximum number of training texts or blocks")
    max_length: int = Field(128, ge=4, description="Tokens of a text or block")
    metric: str | None = Field(None, description="accuracy, f1 (macro), mcc; perplexity, loss")

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
    master_weights: bool = Field(
        False, description="Keep a float32 copy of each trained bfloat16 weight; false: they are rounded stochastically"
    )
    bf16: bool = Field(False, description="Compute in bfloat16 by autocast")
    seed: int = Field(0, ge=0, description="Of all random numbers")
    eval_steps: int = Field(0, ge=0, description="Steps between scores on the validation part; 0: at the end (pretrain)")
    save_steps: int = Field(0, ge=0, description="Steps between checkpoints; 0: no checkpoints")
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

    @field_validator("text", mode="before")
    @classmethod
    def _column_or_pair(cls, value: Any) -> Any:
        names = isinstance(value, (list, tuple)) and bool(value) and all(isinstance(name, str) for name in value)
        return ",".join(value) if names else value

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def load_recipe(path: str | Path, **changes: Any) -> Recipe:
    """Read a recipe; `changes` that are not None replace its values.

    Raises:
        DataError: the file is missing or not YAML.
        UnknownNameError: a key that no recipe has.
        ValueError: a value out of range (the key is named).
    """
    from lowdim.train.data import read_text

    path = Path(path)
    try:
        content = read_yaml(read_text(path))
    except ValueError as error:
        raise DataError(f"{path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold keys and values; got {type(content).__name__}")
    known = list(Recipe.model_fields)
    for key in content:
        if key not in known:
            raise UnknownNameError(
                f"{path}: no recipe has a key {shown(key)}; nearest: {', '.join(nearest(shown(key), known))}"
            )
    try:
        return Recipe(**{**content, **{key: value for key, value in changes.items() if value is not None}})
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {shown(e['input'])})" for e in error.errors()[:5]]
        more = f"; and {error.error_count() - 5} more" if error.error_count() > 5 else ""
        raise ValueError(f"{path}: {'; '.join(lines)}{more}") from None
