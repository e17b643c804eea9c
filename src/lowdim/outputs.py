"""Where commands write: one command at a time, what a killed one has left is cleared, and files of others are kept."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowdim.checksums import SEAL, checksum, checksums, file_checksum
from lowdim.errors import CheckpointError
from lowdim.files import read_json, read_json_object, write_json, write_text
from lowdim.locking import exclusive
from lowdim.temporary import clear_temporaries, is_temporary, temporary_folder

__all__ = ["check_replaceable", "new_folder", "output_file", "own_files", "write_page"]

_PAGE_MARK, _OLD_PAGE = b"<!-- written by lowdim, ", b'<p class="made">lowdim '
_PAGE_SEAL = re.compile(re.escape(b"\n" + _PAGE_MARK) + rb"(blake2b:[0-9a-f]+) -->\n\Z")


@contextlib.contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """An output folder for this command alone, which must be empty or not exist.

    Raises:
        FileExistsError: it is a file, or not empty.
        InUseError: another command works on it.
    """
    out = Path(out)
    with exclusive(out):
        clear_temporaries(out)
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"{out} is a file; name a folder")
        if out.is_dir() and not all(map(is_temporary, out.iterdir())):
            raise FileExistsError(f"{out} is not empty; name another folder")
        yield out


@contextlib.contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """An output file for this command alone; a file that is there must be one that lowdim wrote.

    Raises:
        FileExistsError: it is a folder, or a file that lowdim did not write.
        InUseError: another command works on it.
    """
    path = Path(path)
    with exclusive(path):
        clear_temporaries(path)
        check_replaceable(path)
        yield path


def check_replaceable(path: Path) -> None:
    """Check that a file is missing, or one that lowdim wrote and nobody has changed.

    Raises:
        FileExistsError: it is a folder, or a file of someone else.
    """
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder; name a file")
    if path.exists() and not (_own_page(path) if path.suffix == ".html" else _own_record(path)):
        raise FileExistsError(
            f"{path} was not written by lowdim, or was changed since; move it, or name another place with --out"
        )


def write_page(path: str | Path, page: str) -> Path:
    """Write an HTML page with a checksum in a last comment, by which `check_replaceable` knows it again."""
    return write_text(path, f"{page}\n<!-- written by lowdim, {checksum([page.encode()])} -->\n")


def _own_page(path: Path) -> bool:
    content = path.read_bytes()
    if _PAGE_MARK not in content:
        return _OLD_PAGE in content  # of a version that did not seal its pages
    found = _PAGE_SEAL.search(content)
    return found is not None and checksum([content[: found.start()]]) == found[1].decode()


def _own_record(path: Path) -> bool:
    """Whether it is a sealed JSON file, or a record of a version that did not seal them."""
    try:
        values = read_json_object(path)
        environment = values.get("environment")
        return _is_sealed(path) or (isinstance(environment, dict) and "lowdim" in environment)
    except CheckpointError:
        return False


def _is_sealed(path: Path) -> bool:
    """Whether a JSON file that can be read carries a checksum, which was then right."""
    return f'"{SEAL}"'.encode() in path.read_bytes()


@contextlib.contextmanager
def own_files(folder: Path, manifest: Path) -> Iterator[Path]:
    """A temporary folder of the same name; its files replace in `folder` what an earlier call wrote, and nothing else.

    Args:
        manifest: a JSON file that keeps the checksums of what was written; a kill at any moment leaves it valid.

    Raises:
        FileExistsError: a file of someone else has the name of one to be written; nothing is changed.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; move it")
    earlier, unknown = _known(manifest), not manifest.exists() and _is_old(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder) as place:
        draft = place / folder.name
        yield draft
        now = checksums(draft)
        there = {name: value for name in {*earlier, *now} if (value := _checksum_or_none(folder / name)) is not None}
        for name, value in there.items():
            if name in now and value not in (now[name], *earlier.get(name, ())) and not unknown:
                raise FileExistsError(
                    f"{folder / name} was not written by lowdim, or was changed since; move it and continue with --resume"
                )
        write_json(
            manifest, {name: sorted({*earlier.get(name, ()), *_listed(now, name)}) for name in {*earlier, *now}}, sealed=True
        )
        _move(draft, folder, [name for name in now if there.get(name) != now[name]])
        for name, value in there.items():
            if name not in now and value in earlier[name]:
                (folder / name).unlink()
        _remove_empty_folders(folder)
        write_json(manifest, {name: [value] for name, value in now.items()}, sealed=True)


def _is_old(folder: Path) -> bool:
    """Whether an earlier version, which kept no manifest, has written the folder's files of the usual names."""
    readme = folder / "README.md"
    return readme.is_file() and b"written by lowdim" in readme.read_bytes()


def _known(manifest: Path) -> dict[str, list[str]]:
    """The checksums, by name, of the files that were written before."""
    if not manifest.exists():
        return {}
    values = read_json(manifest)
    good = isinstance(values, dict) and all(isinstance(value, list) for value in values.values())
    if not good:
        raise CheckpointError(f"{manifest} is damaged: it must hold lists of checksums; remove it and what it describes")
    return values


def _listed(values: Mapping[str, Any], name: str) -> list[Any]:
    return [values[name]] if name in values else []


def _checksum_or_none(path: Path) -> str | None:
    return file_checksum(path) if path.is_file() else None


def _move(draft: Path, folder: Path, names: list[str]) -> None:
    for name in names:
        with (draft / name).open("rb") as stream:
            os.fsync(stream.fileno())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / name, folder / name)


def _remove_empty_folders(folder: Path) -> None:
    for path in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
