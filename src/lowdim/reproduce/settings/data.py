"""Public data sets that several reproductions read."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowdim.errors import DataError
from lowdim.reproduce.settings.outcome import Context

__all__ = ["fashion_mnist", "tiny_shakespeare", "trec"]

_FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


def fashion_mnist(context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images (60000, 784) uint8, labels (60000,) int64, test images (10000, 784), labels.

    Raises:
        DataError: the four gz files are neither in Debian's place nor under `--data`/fashion-mnist.
    """
    folder = _FASHION
    if not folder.is_dir():
        folder = context.file("fashion-mnist/train-images-idx3-ubyte.gz", "Debian's package dataset-fashion-mnist").parent
    parts = []
    for kind in ("train", "t10k"):
        images = _idx(folder / f"{kind}-images-idx3-ubyte.gz", 16)
        labels = _idx(folder / f"{kind}-labels-idx1-ubyte.gz", 8)
        parts += [torch.from_numpy(images.reshape(len(labels), 784)), torch.from_numpy(labels.astype(np.int64))]
    return parts[0], parts[1], parts[2], parts[3]


def tiny_shakespeare(context: Context) -> str:
    """The text of Tiny Shakespeare (1.1 M characters)."""
    path = context.file("text/tinyshakespeare/input.txt", "karpathy/char-rnn, data/tinyshakespeare")
    return path.read_text(encoding="utf-8")


def trec(context: Context) -> tuple[list[str], list[int], list[str], list[int]]:
    """TREC question classification, six classes: train texts, labels, test texts, labels."""
    out: list[list] = []
    for part in ("train", "test"):
        path = context.file(f"classification/sent-conv/TREC.{part}.all", "harvardnlp/sent-conv-torch, data")
        rows = [line.split(" ", 1) for line in path.read_text(encoding="latin-1").splitlines() if line.strip()]
        out += [[text for _, text in rows], [int(label) for label, _ in rows]]
    return out[0], out[1], out[2], out[3]


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"{path} does not exist; install Debian's package dataset-fashion-mnist")
    with gzip.open(path) as stream:
        return np.frombuffer(stream.read(), dtype=np.uint8, offset=header).copy()
