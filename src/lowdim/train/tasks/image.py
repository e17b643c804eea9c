"""Task image: a class for each image."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowdim.checksums import checksum
from lowdim.errors import DataError, shown
from lowdim.train.decoding import Decoded, decode, decode_all, pillow, short_name
from lowdim.train.images import ImageFiles, class_names, read_images
from lowdim.train.labels import encode_labels
from lowdim.train.parts import Rows, divide
from lowdim.train.splits import first_rows
from lowdim.train.streams import datasets_module
from lowdim.train.tasks.base import data_name
from lowdim.train.tasks.classify import Classification

__all__ = ["ImageClassification", "Pixels", "image_classification"]

_ROOM = 2**28  # bytes of pixel values that are kept between batches


@dataclass(kw_only=True)
class ImageClassification(Classification):
    """One class for each image.

    Attributes:
        size: height and width that the processor gives.
        contents: data file or folder -> checksum of its images.
    """

    kind: ClassVar[str] = "image"
    noun: ClassVar[str] = "images"
    size: tuple[int, int] = (224, 224)
    contents: dict[str, str] = field(default_factory=dict, repr=False)

    def fit_config(self, config: Any) -> None:
        """Write the size of the images into a configuration."""
        if tuple(_pair(getattr(config, "image_size", None))) != self.size:
            config.image_size = self.size[0] if self.size[0] == self.size[1] else list(self.size)

    def data_checksum(self, name: str) -> str | None:
        """The checksum of the pixels and labels of a data file or folder."""
        return self.contents.get(name)


class Pixels:
    """Collates rows of places into batches of pixel values.

    Images are decoded and resized when a batch needs them. The first that fit into 256 MiB are kept: a small data set is read
    once, and the memory that a large one takes does not grow with it.

    Args:
        paths: of all images; a row has its place among them as `image`.
        processor: of transformers.
        channels: 3, or 1 for models of grey images.
        dtype: of the model.
        room: bytes that may be kept.

    Raises:
        DataError: the processor gives images of several sizes, or of other channels than the model reads.
    """

    def __init__(
        self, paths: Sequence[Path], processor: Any, channels: int = 3, dtype: torch.dtype = torch.float32, room: int = _ROOM
    ):
        self.paths, self.processor, self.channels, self.dtype = paths, processor, channels, dtype
        self.room = room
        self.size = self._checked_size()
        self._kept: dict[int, Tensor] = {}

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The rows as a batch."""
        pixels = torch.stack([self.of(row["image"]) for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}

    def of(self, place: int) -> Tensor:
        """The pixel values of one image, `(channels, height, width)`."""
        if place in self._kept:
            return self._kept[place]
        values = self._processed(decode(self.paths[place], self.channels))
        size = values.numel() * values.element_size()
        if size <= self.room:
            self.room -= size
            self._kept[place] = values
        return values

    def _processed(self, image: Any) -> Tensor:
        grey = {"do_convert_rgb": False} if self.channels == 1 else {}
        return self.processor(image, return_tensors="pt", **grey)["pixel_values"][0].to(self.dtype)

    def _checked_size(self) -> tuple[int, int]:
        mode, kind = "L" if self.channels == 1 else "RGB", type(self.processor).__name__
        try:
            shapes = [tuple(self._processed(pillow().new(mode, size)).shape) for size in ((60, 40), (40, 60))]
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"the model's image processor ({kind}) cannot be used on images of mode {mode}: {error}") from error
        first, second = shapes
        if first != second:
            raise DataError(
                f"the model's image processor ({kind}) gives images of several sizes ({first}, {second}), which no batch can "
                "hold; set size to a height and a width, or do_center_crop, in its preprocessor_config.json"
            )
        if len(first) != 3 or first[0] != self.channels:
            raise DataError(
                f"the model's image processor ({kind}) gives an array {first}; the model reads ({self.channels}, height, width)"
            )
        return first[1], first[2]


def load(recipe: Any, processor: Any, **keywords: Any) -> ImageClassification:
    """The task of a recipe."""
    from lowdim import models

    channels = getattr(models.load_config(recipe.model), "num_channels", None) or 3
    del keywords["max_length"], keywords["most"]
    dtype = getattr(torch, recipe.dtype)
    return image_classification(processor, recipe.data, label=recipe.label, channels=channels, dtype=dtype, **keywords)


def image_classification(
    processor: Any,
    files: Sequence[str | Path],
    *,
    evaluation: str | Path | None = None,
    validation: str | Path | None = None,
    text: str | None = None,
    label: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    channels: int = 3,
    dtype: torch.dtype = torch.float32,
) -> ImageClassification:
    """An image classification task from folders and tables (`lowdim.train.images`).

    Every image is decoded once at the start: damaged files are found before training, and images with equal pixels are in one
    part only. Images that are merely similar are not compared.

    Args:
        processor: an image processor of transformers.
        evaluation, validation: folders or tables of the test and validation parts; otherwise the sub-folders of these names, or
            a part of the data.
        text, label: the columns of a table: paths, and labels.
        limit: maximum number of training images, with at least one of each class.
        channels: that the model reads, 3 or 1.
        dtype: of the model.

    Raises:
        DataError, UnknownNameError: see `lowdim.train.images` and `lowdim.train.decoding`.
    """
    if channels not in (1, 3):
        raise DataError(f"the model reads images of {channels} channels; images have 3 (RGB), or 1 (grey)")
    parts, notes = _parts(files, validation, evaluation, text, label)
    found = list(itertools.chain.from_iterable(parts.values()))
    labels, classes, remarks = _labels(parts)
    paths = [path for _, each in found for path in each.paths]
    collate = Pixels(paths, processor, channels, dtype)
    images = decode_all(paths, channels)
    keys = [image.key for image in images]
    counts = {part: sum(len(each) for _, each in parts[part]) for part in parts}
    held = _ranges(counts)
    divided = divide(
        Rows(keys, labels, classes, "images"),
        validation=held["validation"] if parts["validation"] else None,
        test=held["test"] if parts["test"] else None,
        seed=seed,
    )
    train = divided.train if limit is None else first_rows(divided.train, labels, limit)
    notes += [note for _, each in found for note in each.notes] + remarks + _decoding_notes(images) + list(divided.notes)
    learn, choose, report = (_dataset(where, labels) for where in (train, divided.validation, divided.test))
    first = train[0]
    pixels, (height, width) = _pixels(paths[first]), collate.size
    return ImageClassification(
        train=learn,
        validation=choose,
        test=report,
        collate=collate,
        classes=classes,
        notes=tuple(notes),
        name=data_name(files),
        columns=tuple(used for _, each in found for used in each.columns),
        example=f"{short_name(paths[first])}, {pixels}, read as {width} x {height} -> {shown(classes[labels[first]])}",
        processor=processor,
        size=collate.size,
        contents=_contents(found, keys, labels),
    )


_Found = tuple[str, ImageFiles]


def _parts(
    files: Sequence[str | Path], validation: Any, evaluation: Any, text: str | None, label: str | None
) -> tuple[dict[str, list[_Found]], list[str]]:
    """The files of each part, and notes."""
    parts: dict[str, list[_Found]] = {"train": [], "validation": [], "test": []}
    notes: list[str] = []
    for name in files:
        found = read_images(name, text=text, label=label)
        for part, each in (("train", found), ("validation", found.validation), ("test", found.test)):
            if each is not None:
                parts[part].append((str(name), each))
    for part, option, name in (("validation", "--validation", validation), ("test", "--eval", evaluation)):
        if name is None:
            continue
        if parts[part]:
            notes.append(f"the data's own {part} folder is not used, since {option} names another")
        held = read_images(name, text=text, label=label)
        if held.validation or held.test:
            raise DataError(f"{option} {name}: it holds several parts; name the folder of one, such as {Path(name) / part}")
        parts[part] = [(str(name), held)]
    return parts, notes


def _labels(parts: dict[str, list[_Found]]) -> tuple[list[int], tuple[str, ...], list[str]]:
    """The class of each image, all parts one after the other; the classes, and notes."""
    own = [each for _, each in parts["train"]]
    marks = [mark for each in own for mark in each.labels]
    folders = all(each.named for each in own)
    column = "" if folders else own[0].columns[0].roles.label or ""
    source = ", ".join(name for name, _ in parts["train"])
    known = class_names(map(str, marks)) if folders else ()
    encoded = encode_labels(marks, source, known, column)
    indices, notes = list(encoded.indices), list(encoded.notes)
    for name, each in itertools.chain(parts["validation"], parts["test"]):
        held = encode_labels(each.labels, name, encoded.classes, column)
        indices += held.indices
        notes += held.notes
    return indices, encoded.classes, notes


def _ranges(counts: dict[str, int]) -> dict[str, range]:
    """The places of each part."""
    ends = list(itertools.accumulate(counts.values()))
    return {part: range(end - counts[part], end) for part, end in zip(counts, ends)}


def _dataset(where: Iterable[int], labels: Sequence[int]) -> Any:
    where = list(where)
    return datasets_module().Dataset.from_dict({"image": where, "labels": [labels[i] for i in where]})


def _decoding_notes(images: Sequence[Decoded]) -> list[str]:
    """What of the images the model does not see."""
    notes = []
    if see_through := sum(image.see_through for image in images):
        notes.append(f"{see_through} images have transparency, which is dropped: the colours beneath it show")
    if animated := sum(image.animated for image in images):
        notes.append(f"{animated} images have several frames, of which the first is read")
    return notes


def _contents(found: Sequence[_Found], keys: Sequence[bytes], labels: Sequence[int]) -> dict[str, str]:
    """The checksum of each data file or folder: its images' pixels and labels, in order."""
    parts: dict[str, list[bytes]] = {}
    rows = iter(zip(keys, labels))
    for name, each in found:
        parts.setdefault(name, []).extend(key + b"%d" % label for key, label in itertools.islice(rows, len(each)))
    return {name: checksum(own) for name, own in parts.items()}


def _pair(size: Any) -> Sequence[Any]:
    return size if isinstance(size, (list, tuple)) else (size, size)


def _pixels(path: Path) -> str:
    width, height = decode(path).size
    return f"{width} x {height} pixels"
