"""Finding rows and methods by name."""

from __future__ import annotations

from dataclasses import replace

from lowdim.catalogue.entry import BASELINES, BY_FARMS, FAMILIES, NESTED, Entry, Variant
from lowdim.catalogue.rows import ROWS
from lowdim.errors import unknown

__all__ = ["entries", "find", "methods", "variant", "variants"]


def entries() -> tuple[Entry, ...]:
    """The sixty, in order."""
    return ROWS


def find(slug: str) -> Entry:
    """The entry of this slug (or of the variant of this name).

    Raises:
        UnknownNameError: there is no such entry; the nearest names are listed.
    """
    rows = entries()
    for row in rows:
        if slug == row.slug or slug in (v.name for v in row.variants):
            return row
    raise unknown("system", slug, [row.slug for row in rows])


def variants() -> dict[str, Variant]:
    """Every trainable method by name: the baselines, then the systems that work today."""
    found = {v.name: v for v in BASELINES}
    for row in entries():
        if row.available:
            found.update({v.name: v for v in row.variants})
    return found


def variant(name: str) -> Variant:
    """The trainable method of this name; with `+farms` after it, the same with ranks by layer (`Variant.ranks`).

    For embeddings `+matryoshka` or `+starbucks` after it trains several sizes at once; `starbucks` alone is full fine-tuning.

    Example:
        >>> from lowdim.catalogue import variant
        >>> variant("lora+starbucks").label, variant("starbucks").label
        ('LoRA, Starbucks', 'Starbucks')

    Raises:
        UnknownNameError: unknown, or known but not built yet, or not something that is trained.
    """
    known = variants()
    if name in known:
        return known[name]
    if name.endswith(BY_FARMS):
        return variant(name.removesuffix(BY_FARMS)).by_farms()
    base, plus, nested = ("full", "+", name) if name in NESTED else name.partition("+")
    if plus:
        if nested not in NESTED:
            raise unknown(f"what follows {base}+", nested, (*NESTED, BY_FARMS[1:]))
        first, title = variant(base), NESTED[nested]
        if base == "full":
            return replace(first, name=nested, label=title, nested=nested)
        return replace(first, name=f"{first.name}+{nested}", label=f"{first.label}, {title}", nested=nested)
    for row in entries():
        if name == row.slug:
            why = "is not built yet" if not row.available else f"is not a way to train a model (family {row.family})"
            raise unknown(f"method ({row.name} {why})", name, known)
    raise unknown("method", name, [*known, *NESTED])


def methods(selection: str) -> list[Variant]:
    """Methods from a comma-separated list of names, family names, or `all`.

    Raises:
        UnknownNameError: a name that is neither, or nothing that can be trained.
    """
    chosen: dict[str, Variant] = {}
    for word in (part.strip() for part in selection.split(",")):
        if not word:
            continue
        if word == "all":
            chosen.update(variants())
        elif word in FAMILIES or word == "training":
            if word == "training":
                chosen["full"] = variant("full")
            families = ("optim", "layers") if word == "training" else (word,)
            for row in entries():
                if row.available and row.family in families:
                    chosen.update({v.name: v for v in row.variants})
        else:
            found = variant(word)
            chosen[found.name] = found
    if not chosen:
        raise unknown("--methods (nothing that trains a model)", selection, variants())
    return list(chosen.values())
