"""Rows from files: jsonl, json, csv, tsv, parquet, labelled lines of text."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from lowdim.errors import DataError, MissingExtraError, nearest, unknown

__all__ = ["FORMATS", "SHIPPED", "locate", "read_rows", "read_text"]

_ENCODINGS = ("cp1252", "latin-1")
_MARKS = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md")

#: Samples that are shipped with the package, by name.
SHIPPED = {"lowdim:sentence-polarity": "sentence_polarity/sample.jsonl", "lowdim:shakespeare": "shakespeare/sample.txt"}


def locate(name: str | Path) -> Path:
    """The path of a data file; `lowdim:shakespeare` and `lowdim:sentence-polarity` are shipped with the package.

    Raises:
        UnknownNameError: no such shipped sample.
    """
    if not str(name).startswith("lowdim:"):
        return Path(name).expanduser()
    if str(name) not in SHIPPED:
        raise unknown("--data", name, SHIPPED)
    return Path(__file__).parent.parent / "assets" / SHIPPED[str(name)]


def read_text(path: Path) -> str:
    """A file as UTF-8 text (a byte-order mark is dropped).

    Raises:
        DataError: the file is missing, empty, binary, or not UTF-8 (the first bad byte and an encoding that works are named).
    """
    path = _existing(path)
    raw = path.read_bytes()
    if not raw.removeprefix(b"\xef\xbb\xbf").strip():
        raise DataError(f"{path} is empty")
    wide = next((name for mark, name in _MARKS if raw.startswith(mark)), None)
    if wide is None and 0 in raw:
        # Text with two bytes per character has a zero in most pairs, always on the same side.
        wide = next(
            (name for side, name in ((1, "utf-16-le"), (0, "utf-16-be")) if raw[side::2].count(0) > len(raw) // 4), None
        )
        if wide is None:
            raise DataError(f"{path} is not text: it holds zero bytes, the first at byte {raw.index(0)}")
        _not_utf8(path, raw, raw.index(0), wide)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + len(raw) - len(error.object)  # the decoder counts from after a byte-order mark
        _not_utf8(path, raw, start, wide or next(e for e in _ENCODINGS if _decodes(raw, e)))


def _not_utf8(path: Path, raw: bytes, start: int, encoding: str) -> NoReturn:
    where = f"byte {start} (0x{raw[start]:02x}, line {raw[:start].count(10) + 1})"
    raise DataError(f"{path} is not UTF-8: {where}; it reads as {encoding}: iconv -f {encoding} -t utf-8 {path.name}") from None


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file in it")
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = f"; nearest there: {', '.join(nearest(path.name, siblings))}" if siblings else ""
        raise DataError(f"{path}: no such file{close}")
    return path


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file, column name -> value.

    Raises:
        DataError: unreadable, empty, of an unknown type, or not of the type of its suffix (the line is named).
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".parquet":
        rows = _parquet(_existing(path))
        if not rows:
            raise DataError(f"{path} has no rows")
        return rows
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown file type {kind!r}; it must be one of {', '.join(FORMATS)}")
    content = read_text(path)
    if kind == ".jsonl":
        rows = _json_lines(path, content)
    elif kind == ".json":
        rows = _json(path, content)
    elif kind in (".csv", ".tsv"):
        rows = _table(path, content, kind)
    else:
        rows = _labelled_lines(path, content)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


def _lines(content: str) -> list[str]:
    # Not str.splitlines, which also splits at the line and paragraph separators that a text may contain.
    return content.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _json_lines(path: Path, content: str) -> list[dict[str, Any]]:
    return [_json_line(path, i, line) for i, line in enumerate(_lines(content), 1) if line.strip()]


def _json_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} must be a JSON object; got {type(row).__name__}")
    return row


def _json(path: Path, content: str) -> list[dict[str, Any]]:
    try:
        value = json.loads(content)
    except ValueError as error:
        if content.lstrip().startswith("{") and len(_lines(content.strip())) > 1:  # such files often hold one object per line
            return _json_lines(path, content)
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} must hold a JSON list of objects")
    return value


def _table(path: Path, content: str, kind: str) -> list[dict[str, Any]]:
    head = _lines(content.lstrip())[0]
    mark = "\t" if kind == ".tsv" else max(",", ";", "\t", key=head.count)
    if mark == "\t":  # quotes are text there, as in the GLUE files
        table = [line.split("\t") for line in _lines(content) if line.strip()]
    else:
        table = _quoted(path, content, mark)
    if len(table) < 2:
        raise DataError(f"{path} has a header and no rows")
    header = [h.strip() for h in table[0]]
    twice = [h for h, count in Counter(header).items() if h and count > 1]
    if twice:
        raise DataError(f"{path}: duplicate column name {twice[0]!r} ({', '.join(header)})")
    for number, row in enumerate(table[1:], 2):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} fields, the header {len(header)} ({', '.join(header)})")
    return [dict(zip(header, row)) for row in table[1:]]


def _quoted(path: Path, content: str, mark: str) -> list[list[str]]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=mark, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # a document may be longer than the module's 128 KiB
    try:
        return [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "train", "reading parquet") from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from None


def _labelled_lines(path: Path, content: str) -> list[dict[str, Any]]:
    """`label text` lines, as in fastText and the sent-conv files, or `label<TAB>text`."""
    rows = []
    for number, line in enumerate(_lines(content), 1):
        if not line.strip():
            continue
        mark, _, rest = line.partition("\t") if "\t" in line else line.partition(" ")
        if not rest.strip():
            raise DataError(f"{path}, line {number}: a labelled text file has `label text` on each line; got {line[:40]!r}")
        rows.append({"label": mark.removeprefix("__label__"), "text": rest.strip()})
    return rows


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return False
    return True
