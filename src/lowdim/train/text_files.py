"""Documents of files that are too large to be held: text files are read in pieces."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lowdim.errors import DataError
from lowdim.train.data import TEXT_FILES, Used, read_documents
from lowdim.train.repeats import Repeats, same_text
from lowdim.train.tables import locate, read_text
from lowdim.train.unseen import Piece

__all__ = ["TextFiles"]

_PIECE = 2**16  # bytes of a text file that are read at once
_LARGE = 2**28  # text files of this size or more are checked while reading, not before


class TextFiles:
    """The documents of files, which are checked at once; a text file is one document, read in pieces.

    Args:
        apart: files whose documents are held out; a text file with the same text is left out here.

    Attributes:
        notes, columns: see `lowdim.train.data.Documents`.
        repeated, held_out: text files that were left out, as another file, or one of `apart`, has the same text.
    """

    def __init__(self, files: Sequence[str | Path], text: str | None, apart: TextFiles | None = None):
        self.text, self._apart = text, apart
        self.files: list[Path] = []
        self.notes: list[str] = []
        self.columns: tuple[Used, ...] = ()
        self.held_out = 0
        self._known = Repeats()
        for path in map(locate, files):
            if path.suffix.lower() not in TEXT_FILES:
                found = read_documents([path], text=text)
                self.notes += [note for note in found.notes if note not in self.notes]
                self.columns += tuple(used for used in found.columns if used not in self.columns)
                self.files.append(path)
            elif self._new(path):
                self.files.append(path)

    @property
    def repeated(self) -> int:
        """Text files that another one has, too."""
        return self._known.left_out

    def _new(self, path: Path) -> bool:
        if path.is_file() and path.stat().st_size >= _LARGE:
            return True
        key = same_text(read_text(path))
        if self._apart is not None and self._apart.has(key):
            self.held_out += 1
            return False
        return self._known.add(key)

    def has(self, key: bytes) -> bool:
        """Whether one of the text files has this text."""
        return self._known.has(key)

    def __call__(self) -> Iterator[Piece]:
        """The documents in pieces."""
        for path in self.files:
            if path.suffix.lower() in TEXT_FILES:
                yield from _pieces(path)
            else:
                yield from ((document, True) for document in read_documents([path], text=self.text).texts)

    def digest(self) -> str:
        """Of the contents, and of those of the files that are held out."""
        found = hashlib.blake2b(repr(self.text).encode(), digest_size=12)
        for path in self.files:
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    found.update(chunk)
        return found.hexdigest() + (self._apart.digest() if self._apart is not None else "")


def _pieces(path: Path) -> Iterator[Piece]:
    """A text file in pieces that end at a line break, if there is one."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    rest, place = "", 0
    with path.open("rb") as file:
        while True:
            raw = file.read(_PIECE)
            try:
                rest += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise DataError(f"{path} is not UTF-8: near byte {place + error.start}") from None
            place += len(raw)
            if not raw:
                break
            cut = rest.rfind("\n") + 1 or (len(rest) if len(rest) > 4 * _PIECE else 0)
            if cut:
                yield rest[:cut], False
                rest = rest[cut:]
    yield rest, True
