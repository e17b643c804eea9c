"""Labelled text and plain text from files: jsonl, json, csv, tsv, parquet, txt; with errors that say what to do."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lowdim.errors import DataError, MissingExtraError, UnknownNameError, nearest, unknown

__all__ = ["SHIPPED", "Examples", "Splits", "locate", "read_examples", "read_text", "read_texts", "split"]

_TEXT_NAMES = ("text", "sentence", "content", "review", "question", "document", "body", "comment", "utterance", "tweet")
_LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "intent", "y", "topic")
_ENCODINGS = ("cp1252", "latin-1", "utf-16")
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md")


@dataclass(frozen=True)
class Examples:
    """Texts with their labels as class indices; `notes` count what was left out."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at these places."""
        return Examples(tuple(self.texts[i] for i in indices), tuple(self.labels[i] for i in indices), self.classes)


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data: train on the first, choose on the second, report on the third, once."""

    train: Any
    validation: Any
    test: Any
    notes: tuple[str, ...] = field(default=())


#: Samples that are shipped with the package, by the name that stands for their path.
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
        DataError: the file is missing, empty, or not UTF-8 (the offset of the first bad byte and an encoding that works are named).
    """
    path = Path(path)
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = f"; nearest there: {', '.join(nearest(path.name, siblings))}" if siblings else ""
        raise DataError(f"{path}: no such file{close}")
    raw = path.read_bytes()
    if not raw.strip():
        raise DataError(f"{path} is empty")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} (0x{raw[error.start]:02x}, line {raw[: error.start].count(10) + 1})"
        if raw.count(0) > len(raw) // 100 and not raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise DataError(f"{path} is not text: it holds zero bytes, and {where} is not UTF-8") from None
        encoding = next((e for e in _ENCODINGS if _decodes(raw, e)), "latin-1")
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            encoding = "utf-16"
        raise DataError(
            f"{path} is not UTF-8: {where}; it reads as {encoding}: iconv -f {encoding} -t utf-8 {path.name}"
        ) from None


def read_examples(
    paths: Sequence[str | Path], *, text: str | None = None, label: str | None = None, classes: Sequence[str] = ()
) -> Examples:
    """Labelled texts from one or more files with the same columns.

    Args:
        text, label: column names; None finds them by their usual names, or as the only column of text and the only other one.
        classes: the classes in order, where an earlier file has fixed them; a label beyond them is an error.

    Raises:
        DataError: unreadable file, no rows, one class only, an unknown label.
        UnknownNameError: a column that does not exist, or cannot be found (the columns are listed).
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        rows += _rows(locate(path))
    name = ", ".join(str(p) for p in paths)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text_column, label_column = _columns(rows, columns, text, label, name)
    texts, labels, empty, missing = [], [], 0, 0
    for row in rows:
        value, mark = row.get(text_column), row.get(label_column)
        if value is None or not str(value).strip():
            empty += 1
        elif mark is None or str(mark).strip() == "":
            missing += 1
        else:
            texts.append(str(value))
            labels.append(_label(mark))
    if not texts:
        raise DataError(f"{name}: no row has both a text ({text_column!r}) and a label ({label_column!r})")
    known = list(classes) if classes else _ordered(set(labels))
    if len(known) < 2:
        raise DataError(
            f"{name}: column {label_column!r} has one class only ({known[0]!r}); at least two are needed to classify"
        )
    if not classes and len(known) > max(50, len(labels) // 2):
        raise DataError(
            f"{name}: column {label_column!r} has {len(known)} different values in {len(labels)} rows; is it a class? "
            "name another with --label"
        )
    strange = sorted(set(labels) - set(known))
    if strange:
        raise DataError(f"{name}: label {strange[0]!r} does not occur in the training data (classes: {', '.join(known)})")
    index = {c: i for i, c in enumerate(known)}
    notes = []
    if empty:
        notes.append(f"{empty} rows of {name} have an empty text and were left out")
    if missing:
        notes.append(f"{missing} rows of {name} have no label and were left out")
    return Examples(tuple(texts), tuple(index[c] for c in labels), tuple(known), tuple(notes))


def read_texts(paths: Sequence[str | Path], *, text: str | None = None) -> tuple[list[str], list[str]]:
    """Documents for a language model, and notes: a text file is one document, a row of a table another.

    Raises:
        DataError: unreadable or empty files.
        UnknownNameError: the text column cannot be found.
    """
    documents: list[str] = []
    notes: list[str] = []
    for path in map(locate, paths):
        if path.suffix.lower() in (".txt", ".text", ".md"):
            documents.append(read_text(path))
            continue
        rows = _rows(path)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        column = _column("--text", text, columns, _TEXT_NAMES, str(path)) or _longest(rows, columns)
        found = [str(row[column]) for row in rows if row.get(column) and str(row[column]).strip()]
        if len(found) < len(rows):
            notes.append(f"{len(rows) - len(found)} rows of {path} have an empty text and were left out")
        documents += found
    if not documents:
        raise DataError(f"{', '.join(map(str, paths))}: no text was found")
    return documents, notes


def split(
    examples: Examples, *, test: Examples | None = None, seed: int = 0, validation: float = 0.2, held_out: float = 0.3
) -> Splits:
    """Train, validation and test parts, each class in the same proportion; duplicates never straddle two parts.

    Args:
        test: a test set of its own; otherwise `held_out` of the examples.
        validation: share of what is left that chooses hyperparameters.

    Raises:
        DataError: too few examples of a class to split.
    """
    notes: list[str] = []
    seen: dict[str, int] = {}
    unique = [i for i, t in enumerate(examples.texts) if seen.setdefault(t.strip(), i) == i]
    if len(unique) < len(examples):
        notes.append(f"{len(examples) - len(unique)} repeated texts were left out, so that no text is in two parts")
    if test is not None:
        known = {t.strip() for t in test.texts}
        clean = [i for i in unique if examples.texts[i].strip() not in known]
        if len(clean) < len(unique):
            notes.append(f"{len(unique) - len(clean)} training texts also stand in the test file and were left out of training")
        unique = clean
    counts = Counter(examples.labels[i] for i in unique)
    need = 2 if test is not None else 3
    for index, name in enumerate(examples.classes):
        if counts[index] < need:
            raise DataError(f"class {name!r} has {counts[index]} examples; at least {need} are needed to split the data")
    rest, held = (unique, []) if test is not None else _stratified(examples, unique, held_out, seed, "test")
    train, chosen = _stratified(examples, rest, validation, seed, "validation")
    return Splits(examples.take(train), examples.take(chosen), test if test is not None else examples.take(held), tuple(notes))


def _stratified(examples: Examples, indices: list[int], share: float, seed: int, purpose: str) -> tuple[list[int], list[int]]:
    order = random.Random(f"{seed}/{purpose}")
    keep: list[int] = []
    taken: list[int] = []
    for index in range(len(examples.classes)):
        members = [i for i in indices if examples.labels[i] == index]
        order.shuffle(members)
        count = min(max(1, round(share * len(members))), len(members) - 1)
        taken += members[:count]
        keep += members[count:]
    order.shuffle(keep)
    order.shuffle(taken)
    return keep, taken


def _rows(path: Path) -> list[dict[str, Any]]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        return _parquet(path)
    if kind not in FORMATS:
        raise DataError(f"{path}: unknown kind of file {kind!r}; one of {', '.join(FORMATS)} is needed")
    content = read_text(path)
    if kind == ".jsonl":
        rows = [_json_line(path, i, line) for i, line in enumerate(content.splitlines(), 1) if line.strip()]
    elif kind == ".json":
        rows = _json(path, content)
    elif kind in (".csv", ".tsv"):
        rows = _table(path, content, kind)
    else:
        rows = _labelled_lines(path, content)
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


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
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise DataError(f"{path} must hold a JSON list of objects")
    return value


def _table(path: Path, content: str, kind: str) -> list[dict[str, Any]]:
    tab = kind == ".tsv" or content.split("\n", 1)[0].count("\t") > content.split("\n", 1)[0].count(",")
    lines = content.splitlines()
    # A tab-separated file treats quotes as text, as the GLUE files do; a comma-separated one as quotes.
    reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(lines)
    try:
        table = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num} is not {kind[1:]}: {error}") from None
    if len(table) < 2:
        raise DataError(f"{path} has a header and no rows" if table else f"{path} has no rows")
    header = [h.strip() for h in table[0]]
    for number, row in enumerate(table[1:], 2):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} fields, the header {len(header)} ({', '.join(header)})")
    return [dict(zip(header, row)) for row in table[1:]]


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "train", "reading parquet") from None
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet file ({str(error).splitlines()[0]})") from None


def _labelled_lines(path: Path, content: str) -> list[dict[str, Any]]:
    """`label text` lines, as fastText and the sent-conv files have them, or `label<TAB>text`."""
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        mark, _, rest = line.partition("\t") if "\t" in line else line.partition(" ")
        if not rest.strip():
            raise DataError(f"{path}, line {number}: a labelled text file has `label text` on each line; got {line[:40]!r}")
        rows.append({"label": mark.removeprefix("__label__"), "text": rest.strip()})
    return rows


def _columns(rows: list[dict[str, Any]], columns: list[str], text: str | None, label: str | None, name: str) -> tuple[str, str]:
    label_column = _column("--label", label, columns, _LABEL_NAMES, name)
    rest = [c for c in columns if c != label_column]
    text_column = _column("--text", text, rest if text is None else columns, _TEXT_NAMES, name)
    if text_column is None and rest:
        text_column = _longest(rows, rest)
    if label_column is None:
        others = [c for c in columns if c != text_column]
        if len(others) != 1:
            raise UnknownNameError(f"{name}: which column holds the label? name it with --label; columns: {', '.join(columns)}")
        label_column = others[0]
    if text_column is None or text_column == label_column:
        raise UnknownNameError(f"{name}: which column holds the text? name it with --text; columns: {', '.join(columns)}")
    return text_column, label_column


def _column(option: str, asked: str | None, columns: list[str], usual: Sequence[str], name: str) -> str | None:
    if asked is not None:
        if asked not in columns:
            close = ", ".join(nearest(asked, columns))
            raise UnknownNameError(f"{option}: {name} has no column {asked!r}; nearest: {close}; columns: {', '.join(columns)}")
        return asked
    lower = {c.lower(): c for c in reversed(columns)}
    return next((lower[u] for u in usual if u in lower), None)


def _longest(rows: list[dict[str, Any]], columns: list[str]) -> str:
    sample = rows[:200]
    return max(columns, key=lambda c: sum(len(v) for row in sample if isinstance(v := row.get(c), str)))


def _label(mark: Any) -> str:
    if isinstance(mark, bool):
        return str(mark).lower()
    if isinstance(mark, float) and mark.is_integer():
        return str(int(mark))
    return str(mark).strip()


def _ordered(labels: set[str]) -> list[str]:
    return sorted(labels, key=lambda c: (0, int(c), "") if c.lstrip("-").isdigit() else (1, 0, c))


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except (UnicodeDecodeError, LookupError):
        return False
    return True
