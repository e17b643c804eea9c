"""Images with labels: a folder for each class, or a table with a column of paths."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, UnknownNameError, listed, shown
from lowdim.train.data import Used, check_plain
from lowdim.train.decoding import SUFFIXES
from lowdim.train.labels import label_filter
from lowdim.train.profiles import Profile, blank
from lowdim.train.roles import Roles, labelled_roles, profiles
from lowdim.train.tables import FORMATS, locate, read_rows

__all__ = ["ImageFiles", "class_names", "read_images"]

#: Names of the sub-folders of a data set that is already divided.
_PARTS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
_PATH_NAMES = (
    "image", "file", "path", "file_name", "filename", "image_path", "filepath", "file_path", "img", "images", "img_path",
    "image_file",
)  # fmt: skip


@dataclass
class ImageFiles:
    """Image files with their labels, as the data has them.

    Attributes:
        labels: names of folders, or the values of a column.
        notes: what was left out.
        columns: how they were found.
        validation, test: those of sub-folders of these names.
        named: whether the labels are names of folders.
    """

    paths: list[Path] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: list[Used] = field(default_factory=list)
    validation: ImageFiles | None = None
    test: ImageFiles | None = None
    named: bool = False

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class _Folders(Roles):
    """A folder for each class."""

    classes: int = 0

    @property
    def used(self) -> str:
        return f"each of {self.classes} folders is a class"


@dataclass(frozen=True)
class _Columns(Roles):
    """A table of images."""

    @property
    def used(self) -> str:
        return f"the path of the image is column {self.text[0]!r} and the label {self.label!r}"


def read_images(given: str | Path, *, text: str | None = None, label: str | None = None) -> ImageFiles:
    """The images of a folder or a table.

    A folder has a sub-folder for each class, or sub-folders `train`, `validation` and `test` of that form. A table has a column
    of paths, relative to the table's folder, and one of labels.

    Args:
        text, label: the columns of a table; None finds them.

    Raises:
        DataError: there are no images, files are missing, or no folder is a class.
        UnknownNameError: a column does not exist, or cannot be found.
    """
    path = locate(given)
    return _folder(path) if path.is_dir() else _table(path, text, label)


def class_names(labels: Iterable[str]) -> tuple[str, ...]:
    """Names of folders in order: numbers by size, then the others.

    Example:
        >>> from lowdim.train.images import class_names
        >>> class_names(["10", "9", "cat"])
        ('9', '10', 'cat')
    """
    return tuple(sorted(set(labels), key=lambda c: (0, int(c), c) if re.fullmatch("[0-9]{1,18}", c) else (1, 0, c)))


def _folder(path: Path) -> ImageFiles:
    """A folder of classes, or of parts that hold classes."""
    folders = _visible(path)
    parts: dict[str, list[Path]] = {}
    for folder in folders:
        if folder.name.lower() in _PARTS:
            parts.setdefault(_PARTS[folder.name.lower()], []).append(folder)
    if "train" not in parts:
        return _classes(path, folders)
    twice = next((each for each in parts.values() if len(each) > 1), None)
    if twice:
        raise DataError(f"{path}: {listed(each.name for each in twice)} are the same part; join them, or remove one")
    read = {part: _classes(one, _visible(one)) for part, (one,) in parts.items()}
    others = [folder.name for folder in folders if folder.name.lower() not in _PARTS]
    found = replace(read["train"], validation=read.get("validation"), test=read.get("test"))
    if others:
        found.notes.append(f"{path}: folders {listed(others)} are no part of train, validation and test and were left out")
    return found


def _visible(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith((".", "__")))


def _classes(path: Path, folders: Sequence[Path]) -> ImageFiles:
    """The images in a folder for each class, at any depth below it."""
    loose = sum(_is_image(each) for each in path.iterdir())
    if not folders:
        what = f"{loose} images and no folder for each class" if loose else "no folder for each class, and no image"
        raise DataError(
            f"{path} holds {what}; put the images of each class into a sub-folder of its name, or name a table with "
            "their paths and labels"
        )
    found = ImageFiles(named=True)
    odd, empty = Counter(), []
    for folder in folders:
        files = [each for each in sorted(folder.rglob("*")) if each.is_file() and not _hidden(each, folder)]
        images = [each for each in files if _is_image(each)]
        odd.update(each.suffix.lower() or each.name for each in files if not _is_image(each))
        if not images:
            empty.append(folder.name)
        found.paths += images
        found.labels += [folder.name] * len(images)
    if not found.paths:
        raise DataError(f"{path}: no file in {listed(empty)} is an image ({', '.join(sorted(SUFFIXES))})")
    found.columns.append(Used(str(path), _Folders((), classes=len(folders) - len(empty))))
    if loose:
        found.notes.append(f"{loose} images directly in {path} are in no class's folder and were left out")
    if empty:
        found.notes.append(f"{path}: folders {listed(empty)} hold no image and are no classes")
    if odd:
        found.notes.append(f"{odd.total()} files in {path} are no images ({listed(odd)}) and were left out")
    return found


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")


def _hidden(path: Path, root: Path) -> bool:
    dotted = any(part.startswith(".") for part in path.relative_to(root).parts)
    return dotted or path.name.lower() in ("thumbs.db", "desktop.ini")


def _table(path: Path, text: str | None, label: str | None) -> ImageFiles:
    """The rows of a table that have a path and a label."""
    if path.suffix.lower() not in FORMATS:
        raise DataError(
            f"{path}: name a folder with a sub-folder for each class, or a table with a column of paths ({', '.join(FORMATS)})"
        )
    table = read_rows(path, (text, label))
    columns = profiles(table)
    roles = labelled_roles(columns, text or _path_column(columns, table, path), label, str(path))
    name, *others = roles.text
    if others:
        raise DataError(f"--text {text}: an image has one path; name one column")
    assert roles.label is not None
    mark_name = roles.label
    found = ImageFiles(columns=[Used(str(path), _Columns(roles.text, roles.label, roles.unused))])
    is_label = label_filter(table.column(mark_name))
    missing, bare, unlabelled = [], 0, 0
    for value, mark in zip(table.column(name), table.column(mark_name)):
        check_plain(value, name, path)
        check_plain(mark, mark_name, path)
        if blank(value):
            bare += 1
        elif blank(mark) or not is_label(mark):
            unlabelled += 1
        else:
            file = path.parent / str(value).strip()
            if not file.is_file():
                missing.append(str(value))
            found.paths.append(file)
            found.labels.append(mark)
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(table)} images are not there, such as {listed(map(shown, missing[:3]))}; paths "
            f"are relative to {path.parent}"
        )
    if not found.paths:
        raise DataError(f"{path}: no row has both an image ({shown(name)}) and a label ({shown(mark_name)})")
    found.notes += table.notes
    if bare:
        found.notes.append(f"{bare} rows of {path} name no image and were left out")
    if unlabelled:
        found.notes.append(f"{unlabelled} rows of {path} have no label and were left out")
    return found


def _path_column(columns: Sequence[Profile], table: Any, path: Path) -> str:
    """The column whose values end as names of images do."""
    held = [c for c in columns if any(_names_image(value) for value in table.column(c.name)[:20])]
    usual = [c for c in held if c.plain in _PATH_NAMES]
    if len(usual or held) != 1:
        what = f"columns {listed(repr(c.name) for c in held)} do" if held else "none has values such as 'cat/1.png'"
        raise UnknownNameError(
            f"{path}: which column holds the paths of the images? {what}; name it with --text (columns: "
            f"{listed(c.name for c in columns)})"
        )
    return (usual or held)[0].name


def _names_image(value: Any) -> bool:
    return isinstance(value, str) and Path(value.strip()).suffix.lower() in SUFFIXES
