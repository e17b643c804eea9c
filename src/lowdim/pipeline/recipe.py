"""The recipe of a pipeline: one YAML file. Errors name the key and its line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lowdim.errors import nearest, shown
from lowdim.jobs import compressor
from lowdim.jobs.budgets import Budget, check_budget_options
from lowdim.train.recipe_files import Columns, Files, read_recipe
from lowdim.train.safe_yaml import Lines

__all__ = ["Cache", "Decompose", "Export", "PipelineRecipe", "Quantize", "Sparsify", "Step", "Tune", "load_pipeline"]

#: The systems of the two steps that have one of their own.
_CACHE, _SPARSE = "matryoshka-kv", "wina"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class _Compression(_Part):
    """A step that calls a system."""

    budget: str | None = Field(None, description="0.5x of the dense model, or 60MiB; null: the options say it")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the system, as `lowdim list NAME` shows them")

    @property
    def system(self) -> str:
        """Its slug."""
        raise NotImplementedError

    @field_validator("budget", mode="before")
    @classmethod
    def _is_budget(cls, value: Any) -> Any:
        if value is not None:
            Budget.parse(str(value), "budget")
        return value if value is None else str(value)

    @model_validator(mode="after")
    def _options_fit(self) -> _Compression:
        method = compressor(self.system)
        method.build(self.options)
        if self.budget is not None:
            check_budget_options(method, self.options)
        return self


class Decompose(_Compression):
    """Weights become factors or codes."""

    step: Literal["decompose"]
    method: Literal["lord", "pela", "welore", "lr2vq"] = Field("lord", description="The system")

    @property
    def system(self) -> str:
        """The method."""
        return self.method


class Tune(_Part):
    """What is left is trained on the task."""

    step: Literal["tune"]
    steps: int = Field(100, ge=1, description="Optimizer steps")
    lr: float = Field(5e-5, gt=0, description="Peak learning rate")
    batch_size: int = Field(8, ge=1, description="Texts of a step")
    parameters: Literal["replaced", "all"] = Field("replaced", description="Those of the layers that were replaced, or all")


class Cache(_Compression):
    """The KV cache holds the leading directions of each head."""

    step: Literal["cache"]

    @property
    def system(self) -> str:
        """MatryoshkaKV."""
        return _CACHE


class Sparsify(_Compression):
    """Each token reads only some inputs of the layers that are still dense."""

    step: Literal["sparsify"]

    @property
    def system(self) -> str:
        """WINA."""
        return _SPARSE


class Quantize(_Part):
    """Linear layers that no step has replaced are kept in few bits."""

    step: Literal["quantize"]
    scheme: Literal["int8", "int4"] = Field("int8", description="torchao's int8 or int4")


class Export(_Part):
    """The model is written: `model` in the folder of results."""

    step: Literal["export"]
    format: Literal["compressed", "dense"] = Field("compressed", description="dense: of full size, loads without lowdim")


Step = Annotated[Decompose | Tune | Cache | Sparsify | Quantize | Export, Field(discriminator="step")]


class PipelineRecipe(_Part):
    """A pipeline. `lowdim compress --steps FILE --check` prints it filled in."""

    model: str = Field(description="A folder, a hub id, or minilm, stories260k, smollm2-135m")
    task: Literal["causal-lm", "similarity"] = Field("causal-lm", description="similarity: pairs of texts with a score")
    data: Files = Field(min_length=1, description="Files; lowdim:shakespeare is shipped")
    eval: str | None = Field(None, description="A separate test file; null: a part of the data")
    text: Columns = Field(None, description="Name of the text column; a list of two for pairs")
    label: str | None = Field(None, description="Name of the column with the score (similarity)")
    max_length: int = Field(128, ge=4, description="Tokens of a text or block")
    samples: int = Field(128, ge=1, description="Training texts that systems look at")
    held_out: int | None = Field(None, ge=2, description="Test texts on which each step is scored; null: all")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the weights")
    seed: int = Field(0, ge=0, description="Of all random numbers")
    steps: list[Step] = Field(min_length=1, description="In their order")
    out: str = Field("lowdim-pipeline", description="Folder of the results")

    @field_validator("steps")
    @classmethod
    def _in_order(cls, steps: list[Any]) -> list[Any]:
        kinds = [step.step for step in steps]
        if "export" in kinds[:-1]:
            raise ValueError(f"export must be the last step; it is step {kinds.index('export') + 1} of {len(kinds)}")
        if "quantize" in kinds:
            later = [kind for kind in kinds[kinds.index("quantize") + 1 :] if kind != "export"]
            if later:
                raise ValueError(f"quantize must come after {later[0]}: weights in few bits are neither cut nor trained")
        for kind in ("cache", "sparsify"):
            if kinds.count(kind) > 1:
                raise ValueError(f"{kind} can be done once; the recipe has it {kinds.count(kind)} times")
        return steps

    @model_validator(mode="after")
    def _of_the_task(self) -> PipelineRecipe:
        kinds = [step.step for step in self.steps]
        if self.task == "similarity" and "cache" in kinds:
            raise ValueError(f"step {kinds.index('cache') + 1} (cache): an encoder caches no keys and values")
        if self.task == "causal-lm" and self.label is not None:
            raise ValueError("label is the column of the score of task: similarity")
        return self


def load_pipeline(path: str | Path, **changes: Any) -> PipelineRecipe:
    """Read a recipe; `changes` that are not None replace its values.

    Raises:
        DataError: the file is missing or not YAML.
        ValueError: a key that is unknown, missing or has a value out of range: the file's line and the key are named.

    Example:
        >>> import tempfile, pathlib
        >>> from lowdim.pipeline import load_pipeline
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = pathlib.Path(place) / "recipe.yaml"
        ...     _ = file.write_text("{model: stories260k, data: lowdim:shakespeare, steps: [{step: quantize}]}")
        ...     load_pipeline(file).steps[0].scheme
        'int8'
    """
    path = Path(path)
    content, lines = read_recipe(path)
    try:
        return PipelineRecipe(**{**content, **{key: value for key, value in changes.items() if value is not None}})
    except ValidationError as error:
        told = [_sentence(path, dict(e), lines) for e in error.errors()[:5]]
        more = f"; and {error.error_count() - 5} more" if error.error_count() > 5 else ""
        raise ValueError(f"{'; '.join(told)}{more}") from None


_KINDS: dict[str, type[_Part]] = {
    "decompose": Decompose, "tune": Tune, "cache": Cache, "sparsify": Sparsify, "quantize": Quantize, "export": Export,
}  # fmt: skip


def _sentence(path: Path, error: dict[str, Any], lines: Lines) -> str:
    """`FILE:LINE: KEY: what is wrong (got ...)`."""
    place: tuple[Any, ...] = tuple(error["loc"])
    owner: type[BaseModel] = PipelineRecipe
    if len(place) > 2 and place[0] == "steps" and place[2] in _KINDS:
        owner, place = _KINDS[place[2]], (*place[:2], *place[3:])  # without the kind, which is no key
    known = next((place[:n] for n in range(len(place), 0, -1) if place[:n] in lines), ())
    where = f"{path}:{lines[known]}" if known else str(path)
    key = ".".join(str(part + 1 if isinstance(part, int) else part) for part in place) or "the recipe"
    key = key.replace("steps.", "step ", 1) if place[:1] == ("steps",) and len(place) > 1 else key
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        close = ", ".join(nearest(str(error["loc"][-1]), owner.model_fields))
        return f"{where}: {key}: there is no such key; nearest: {close}"
    if error["type"] == "missing":
        return f"{where}: {key} is missing"
    if error["type"].startswith("union_tag"):
        return f"{where}: {key}: a step needs `step:` one of {', '.join(_KINDS)}; got {shown(_named(error['input']))}"
    got = "" if isinstance(error["input"], (dict, list, BaseModel)) else f" (got {shown(error['input'])})"
    return f"{where}: {key}: {message}{got}"


def _named(value: Any) -> Any:
    return value.get("step") if isinstance(value, dict) else value
