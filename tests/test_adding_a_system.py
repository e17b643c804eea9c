"""A new system touches eight places of its own and two others: one is added to a copy of the repository, and all passes."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: The toy: weights cut to a low rank by their singular values.
OWN = {
    "src/lowdim/compress/toy_svd.py": '''
        """Toy SVD: each weight cut to a low rank."""

        from __future__ import annotations

        from collections.abc import Iterable
        from dataclasses import dataclass
        from typing import Any

        from torch import nn

        from lowdim.compress.core.report import CompressedLayer, CompressionReport, attach_report
        from lowdim.errors import check_int
        from lowdim.linalg import truncated_svd
        from lowdim.modules import LowRankLinear
        from lowdim.surgery import dense_matrix, find_layers, is_linear, matrix_shape, swap_layers

        __all__ = ["ToySVDConfig", "toy_svd"]


        @dataclass(frozen=True)
        class ToySVDConfig:
            """How `toy_svd` cuts.

            Attributes:
                rank: of each layer, at most its smaller side; >= 1.
            """

            rank: int = 4

            def __post_init__(self) -> None:
                check_int("rank", self.rank, 1)


        def toy_svd(model: nn.Module, config: ToySVDConfig, batches: Iterable[Any] | None = None) -> nn.Module:
            """Replace each linear layer by the nearest one of low rank, in place.

            Formula: `W = U S Vᵀ`, `B = U_r S_r (out, r)`, `A = V_rᵀ (r, in)`.

            Example:
                >>> from torch import nn
                >>> from lowdim.compress import ToySVDConfig, last_report, toy_svd
                >>> model = toy_svd(nn.Sequential(nn.Linear(8, 8)), ToySVDConfig(rank=2))
                >>> [layer.rank for layer in last_report(model).layers]
                [2]

            Source: A. Toy, "A Toy", arXiv 2401.00001.
            """
            layers = find_layers(model, accept=is_linear)
            rows = []
            for name, layer in layers.items():
                out_features, in_features = matrix_shape(layer)
                rank = min(config.rank, out_features, in_features)
                before = sum(p.numel() for p in layer.parameters())
                after = before + rank * (out_features + in_features) - out_features * in_features
                rows.append(CompressedLayer(name, out_features, in_features, rank, 0.0, before, after))
            swap_layers(model, layers, lambda name, layer: _cut(layer, config.rank))
            attach_report(model, CompressionReport("Toy SVD", tuple(rows)))
            return model


        def _cut(layer: Any, rank: int) -> LowRankLinear:
            u, s, vh = truncated_svd(dense_matrix(layer).detach(), min(rank, *matrix_shape(layer)), method="exact")
            return LowRankLinear.from_factors(vh, u * s, layer.bias)
    ''',
    "src/lowdim/reproduce/toy_svd.py": '''
        """Toy SVD: half the rank keeps more than half of a random matrix."""

        from __future__ import annotations

        import torch
        from torch import nn

        from lowdim.compress import ToySVDConfig, toy_svd
        from lowdim.reproduce.settings.outcome import Check, Context, Outcome

        __all__ = ["run"]


        def run(context: Context) -> Outcome:
            """One layer of width 16, cut to rank 8."""
            torch.manual_seed(0)
            layer = nn.Linear(16, 16, bias=False)
            weight = layer.weight.detach().clone()
            (small,) = toy_svd(nn.Sequential(layer), ToySVDConfig(rank=8))
            kept = 1 - float(((small.B @ small.A).detach() - weight).square().sum() / weight.square().sum())
            check = Check("share of the squares that is kept", kept, ">=", 0.5)
            return Outcome("toy-svd", "A linear layer of width 16.", rows=[{"rank": 8, "kept": kept}], checks=[check])
    ''',
    "tests/compress/test_toy_svd.py": """
        from pathlib import Path

        import torch
        from torch import nn

        from lowdim.compress import ToySVDConfig, toy_svd
        from lowdim.files import read_tensors


        def test_vectors():
            tensors, _ = read_tensors(Path(__file__).parents[1] / "vectors" / "toy-svd" / "layer.safetensors")
            layer = nn.Linear(6, 4, dtype=torch.float64)
            layer.weight.data = tensors["weight"]
            (small,) = toy_svd(nn.Sequential(layer), ToySVDConfig(rank=1))
            torch.testing.assert_close(small.B @ small.A, tensors["dense"])
    """,
    "docs/systems/toy-svd.md": """
        # Toy SVD

        Each weight is cut to a low rank by its singular values.

        ```console
        $ lowdim compress --model stories260k --data lowdim:shakespeare --method toy-svd --option rank=20 --out small
        ```
    """,
}
ROW = """
    Entry(
        number=61,
        slug="toy-svd",
        name="Toy SVD",
        paper="A Toy",
        arxiv="2401.00001",
        claim="A toy that shows how many places a system touches.",
        target="toy_svd",
    ),
)
"""
WRITTEN = ("results/toy-svd.json", "tests/vectors/toy-svd/layer.safetensors")
#: Both are written by `make tables`.
OTHERS = {"README.md", "docs/choosing.md"}
TESTS = [
    "tests/test_catalogue.py", "tests/test_house.py", "tests/test_public_names.py", "tests/jobs/test_options.py",
    "tests/compress/test_toy_svd.py",
]  # fmt: skip
#: The library has sixty systems today, and the toy is one more; that is not the toy's doing.
COUNTS_SIXTY = "tests/test_catalogue.py::test_sixty_rows_in_order"


def _files(root):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository with the toy in it, and how to run a command there."""
    place = tmp_path_factory.mktemp("copy") / "lowdim"
    for name in _files(ROOT):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, place / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=place, check=True)
    environment = {**os.environ, "PYTHONPATH": str(place / "src"), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return done.stdout

    for name, text in OWN.items():
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        (place / name).write_text("\n".join(line[indent:] for line in lines).rstrip() + "\n", encoding="utf-8")
    _replace(place / "src/lowdim/catalogue/rows/compress.py", r"\n\)\n$", ROW)
    names = '__all__ += ["ToySVDConfig", "toy_svd"]\n'
    home = place / "src/lowdim/compress/__init__.py"
    home.write_text(
        home.read_text("utf-8") + f"\nfrom lowdim.compress.toy_svd import ToySVDConfig, toy_svd\n\n{names}",
        "utf-8",
    )
    vectors = (
        "import torch; from lowdim.files import write_tensors; w = torch.arange(24.0, dtype=torch.float64).view(4, 6).sin(); "
        "u, s, v = torch.linalg.svd(w); d = s[0] * torch.outer(u[:, 0], v[0]); "
        f"write_tensors({WRITTEN[1]!r}, {{'weight': w, 'dense': d}})"
    )
    (place / WRITTEN[1]).parent.mkdir()
    run("-c", vectors)
    run("-m", "lowdim", "reproduce", "toy-svd")
    run("docs/tables.py")
    run.place = place
    return run


def _replace(path, pattern, new):
    text, count = re.subn(pattern, lambda match: "\n" + new.strip("\n") + "\n", path.read_text("utf-8"))
    assert count == 1, path
    path.write_text(text, encoding="utf-8")


@pytest.mark.slow  # it copies the repository and runs some hundred tests in the copy
def test_a_system_touches_eight_places_of_its_own_and_two_others(copy):
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=copy.place, capture_output=True, text=True, check=True
    )
    touched = {line[3:] for line in status.stdout.splitlines() if line[1] != " "}
    own = touched - OTHERS
    edited = {"src/lowdim/compress/__init__.py", "src/lowdim/catalogue/rows/compress.py"}
    assert own == {*OWN, *WRITTEN, *edited}
    assert len(own) == 8
    assert touched & OTHERS == OTHERS
    page = (ROOT / "docs" / "adding-a-system.md").read_text("utf-8")
    assert "eight places of its own and two others" in page


@pytest.mark.slow
def test_everything_passes_with_it(copy):
    pytest_ = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    copy(*pytest_, "--deselect", COUNTS_SIXTY, *TESTS)
    out = copy(*pytest_, "tests/test_docs.py", "-k", "toy or links")  # its page, its example, and the links to both
    assert out.count(".") > 40
    copy("-m", "ruff", "check", "-q", "src/lowdim/compress", "src/lowdim/reproduce/toy_svd.py")
    pytest.importorskip("importlinter")
    copy("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")


@pytest.mark.slow
def test_the_commands_know_it(copy, tmp_path):
    assert "toy-svd" in copy("-m", "lowdim", "list", "compress")
    assert "rank = 4   a whole number >= 1" in copy("-m", "lowdim", "list", "toy-svd")
    data = ["--model", "stories260k", "--data", "lowdim:shakespeare", "--max-length", "32"]
    options = ["--method", "toy-svd", "--option", "rank=20", "--out", str(tmp_path / "small")]
    out = copy("-m", "lowdim", "compress", *data, *options)
    assert "Toy SVD: " in out
    assert (tmp_path / "small" / "compression.json").is_file()
