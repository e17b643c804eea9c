"""The key `replaces` of a recipe: which model is replaced, and how much its vectors count."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Replaces"]


class Replaces(BaseModel):
    """An old embedding model, by its stored vectors or by its name; its name alone may stand for the whole.

    Attributes:
        vectors: `FILE` or `FILE:KEY`, a row for each text of the data.
        model: a folder, `minilm` or a hub id, which computes them before training.
        mu: inverse temperature of the HOC loss.
        ce_weight: weight of the cross entropy against fixed vertices; the HOC loss, which reads the old vectors, has the rest.

    Example:
        >>> from lowdim.train.replacing import Replaces
        >>> Replaces.model_validate("old.npy").vectors, Replaces.model_validate({"model": "minilm"}).mu
        ('old.npy', 10.0)

    Source: Biondi et al., CVPR 2024, arXiv 2405.02581.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    vectors: str | None = Field(None, min_length=1)
    model: str | None = Field(None, min_length=1)
    mu: float = Field(10.0, gt=0)
    ce_weight: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        from lowdim.train.embedding_files import names_vectors

        return {"vectors" if names_vectors(value) else "model": value}

    @model_validator(mode="after")
    def _of_one_source(self) -> Replaces:
        if (self.vectors is None) == (self.model is None):
            raise ValueError("name either the file of the old model's vectors or the old model")
        return self

    @property
    def name(self) -> str:
        """Of the file, or of the model."""
        return str(self.vectors or self.model)
