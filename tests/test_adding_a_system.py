"""A new system touches eight places of its own and two others: one is added to a copy of the repository, and all passes."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Toy:
    """A system to be added.

    Attributes:
        names: what its module gives to the family.
        row: in the catalogue, without the number.
        files: its own files, by place.
        vectors: Python that puts `tensors` together.
        tests: of the repository that must pass with it, beside those that hold for any system.
    """

    slug: str
    family: str
    names: tuple[str, ...]
    row: str
    files: dict[str, str]
    vectors: str
    tests: tuple[str, ...]

    @property
    def written(self) -> tuple[str, str]:
        """What its commands write."""
        return f"results/{self.slug}.json", f"tests/vectors/{self.slug}/layer.safetensors"

    @property
    def edited(self) -> set[str]:
        """Files of its family that it adds a line to."""
        return {f"src/lowdim/{self.family}/__init__.py", f"src/lowdim/catalogue/rows/{self.family}.py"}


#: Weights cut to a low rank by their singular values.
SVD = Toy(
    slug="toy-svd",
    family="compress",
    names=("ToySVDConfig", "toy_svd"),
    row='slug="toy-svd", name="Toy SVD", paper="A Toy", arxiv="2401.00001", target="toy_svd"',
    files={
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
    },
    vectors="w = torch.arange(24.0, dtype=torch.float64).view(4, 6).sin(); u, s, v = torch.linalg.svd(w); "
    "tensors = {'weight': w, 'dense': s[0] * torch.outer(u[:, 0], v[0])}",
    tests=("tests/compress/test_toy_svd.py",),
)

#: The layer that the docs show, trained by name.
EXAMPLE, TEST = (ROOT / "docs/examples/adding_a_layer.py").read_text("utf-8").split("\n\nclass Test", 1)
CASE = "from lowdim.testing.layer_case import LayerCase\n"
BLOCKS = Toy(
    slug="block-diagonal",
    family="layers",
    names=("BlockDiagonal",),
    row='slug="block-diagonal", name="Block-diagonal", target="BlockDiagonal", arxiv="1705.01000", '
    'paper="Neural networks with block diagonal inner product layers", '
    'variants=(Variant("block-diagonal", options={"nblocks": 2}),)',
    files={
        "src/lowdim/layers/block_diagonal.py": EXAMPLE.replace(CASE, ""),
        "src/lowdim/reproduce/block_diagonal.py": '''
            """A block-diagonal layer has one part in `nblocks` of the weights."""

            from __future__ import annotations

            import torch
            from torch import nn

            from lowdim.layers import BlockDiagonal
            from lowdim.reproduce.settings.outcome import Check, Context, Outcome

            __all__ = ["run"]


            def run(context: Context) -> Outcome:
                """Count the weights of one layer."""
                torch.manual_seed(0)
                share = BlockDiagonal.from_linear(nn.Linear(16, 16), nblocks=4).blocks.numel() / 256
                return Outcome("block-diagonal", "One layer.", checks=[Check("share of the weights", share, "<=", 0.25)])
        ''',
        "tests/layers/test_block_diagonal.py": '''
            from pathlib import Path

            import torch
            from torch import nn

            from lowdim.files import read_tensors
            from lowdim.layers import BlockDiagonal
            from lowdim.testing.layer_case import LayerCase


            def test_vectors():
                tensors, _ = read_tensors(Path(__file__).parents[1] / "vectors" / "block-diagonal" / "layer.safetensors")
                layer = nn.Linear(6, 4, dtype=torch.float64)
                layer.weight.data = tensors["weight"]
                assert torch.equal(BlockDiagonal.from_linear(layer, nblocks=2).dense_weight(), tensors["dense"])


            class Test''' + TEST.replace("\n", "\n" + " " * 12),
        "docs/systems/block-diagonal.md": """
            # Block-diagonal layers

            No block sees the inputs of another.

            ```console
            $ lowdim plan --model stories260k --methods block-diagonal
            ```
        """,
    },
    vectors="w = torch.arange(24.0, dtype=torch.float64).view(4, 6); d = torch.block_diag(w[:2, :3], w[2:, 3:]); "
    "tensors = {'weight': w, 'dense': d}",
    tests=(
        "tests/layers/test_block_diagonal.py", "tests/methods", "tests/jobs/test_capabilities.py", "tests/test_golden.py",
        "tests/test_second_device_training.py", "tests/train/test_run_resume.py",
    ),
)  # fmt: skip
#: The adapter that the docs show, trained by name.
ADAPTER, ADAPTER_TEST = (ROOT / "docs/examples/adding_an_adapter.py").read_text("utf-8").split("\n\nclass Test", 1)
ADAPTER_CASE = "from lowdim.testing.adapter_case import AdapterCase\n"
#: A system imports its family's core, and not the family.
ADAPTER_BASES = "from lowdim.adapters import Method, WeightUpdate\n"
ADAPTER_CORE = "from lowdim.adapters.core.method import Method\nfrom lowdim.adapters.core.update import WeightUpdate\n"
KRONA = Toy(
    slug="krona",
    family="adapters",
    names=("KronA",),
    row='slug="krona", target="KronA", arxiv="2212.10650", '
    'paper="KronA: Parameter Efficient Tuning with Kronecker Adapter", variants=(Variant("krona"),)',
    files={
        "src/lowdim/adapters/krona.py": ADAPTER.replace(ADAPTER_CASE, "").replace(ADAPTER_BASES, ADAPTER_CORE),
        "src/lowdim/reproduce/krona.py": '''
            """KronA trains few numbers in an update of full rank."""

            from __future__ import annotations

            import torch
            from torch import nn

            from lowdim.adapters import KronA, adapt
            from lowdim.reproduce.settings.outcome import Check, Context, Outcome

            __all__ = ["run"]


            def run(context: Context) -> Outcome:
                """Count the numbers of one layer."""
                torch.manual_seed(0)
                adapted = adapt(nn.Sequential(nn.Linear(16, 16)), KronA(blocks=4))
                share = sum(p.numel() for p in adapted.trainable().values()) / 256
                return Outcome("krona", "One layer.", checks=[Check("share of the weights", share, "<=", 0.25)])
        ''',
        "tests/adapters/test_krona.py": '''
            from pathlib import Path

            import torch

            from lowdim.adapters import KronA
            from lowdim.files import read_tensors
            from lowdim.testing.adapter_case import AdapterCase


            def test_vectors():
                tensors, _ = read_tensors(Path(__file__).parents[1] / "vectors" / "krona" / "layer.safetensors")
                update = KronA(blocks=2).blank(6, 4, stats={}, dtype=torch.float64, device=None)
                update.load_state_dict({"P": tensors["P"], "Q": tensors["Q"]})
                assert torch.allclose(update.dense(), tensors["dense"])


            class Test''' + ADAPTER_TEST.replace("\n", "\n" + " " * 12),
        "docs/systems/krona.md": """
            # KronA

            The update is a Kronecker product of two small matrices.

            ```console
            $ lowdim plan --model stories260k --methods krona
            ```
        """,
    },
    vectors="p = torch.arange(4.0, dtype=torch.float64).view(2, 2); q = torch.arange(6.0, dtype=torch.float64).view(3, 2); "
    "tensors = {'P': p, 'Q': q, 'dense': torch.kron(p, q)}",
    tests=(
        "tests/adapters/test_krona.py", "tests/adapters/test_distributed.py", "tests/methods",
        "tests/jobs/test_capabilities.py", "tests/test_second_device_training.py", "tests/train/test_run_resume.py",
    ),
)  # fmt: skip
#: Both are written by `make tables`.
OTHERS = {"README.md", "docs/choosing.md"}
#: Tests of the whole catalogue, which fail if a system lacks something.
TESTS = (
    "tests/test_catalogue.py",
    "tests/test_house.py",
    "tests/test_public_names.py",
    "tests/jobs/test_options.py",
    "tests/adapters/test_distributed.py::test_every_method_has_a_row",
    "tests/methods/test_strategies.py::test_a_kind_fits_its_class",
    "tests/methods/test_strategies.py::test_the_table_names_methods_only",
    "tests/test_golden.py::test_every_stored_adapter_is_read",
    "tests/train/test_run_resume.py::test_every_adapter_is_killed_and_resumed",
)
#: The library has sixty systems today, and the toy is one more; that is not the toy's doing.
COUNTS_SIXTY = "tests/test_catalogue.py::test_sixty_rows_in_order"


def _files(root):
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (root / name).is_file()]


@pytest.fixture(scope="module", params=[SVD, BLOCKS, KRONA], ids=lambda toy: toy.slug)
def copy(request, tmp_path_factory):
    """The repository with the toy in it, and how to run a command there."""
    toy = request.param
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

    for name, text in toy.files.items():
        (place / name).write_text(_unindented(text), encoding="utf-8")
    rows = place / f"src/lowdim/catalogue/rows/{toy.family}.py"
    text = rows.read_text("utf-8")
    assert text.endswith("\n)\n")
    claim = "A toy that shows how many places a system touches."
    rows.write_text(f'{text[:-2]}    Entry(number=61, claim="{claim}", {toy.row}),\n)\n', "utf-8")
    home = place / f"src/lowdim/{toy.family}/__init__.py"
    module = toy.slug.replace("-", "_")
    added = f"\nfrom lowdim.{toy.family}.{module} import {', '.join(toy.names)}\n\n__all__ += {list(toy.names)!r}\n"
    home.write_text(home.read_text("utf-8") + added, "utf-8")
    (place / toy.written[1]).parent.mkdir()
    run(
        "-c", f"import torch; from lowdim.files import write_tensors; {toy.vectors}; write_tensors({toy.written[1]!r}, tensors)"
    )
    run("-m", "lowdim", "reproduce", toy.slug)
    run("docs/tables.py")
    run.place, run.toy = place, toy
    return run


def _unindented(text):
    lines = text.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines).rstrip() + "\n"


@pytest.mark.slow  # it copies the repository and runs some hundred tests in the copy
def test_a_system_touches_eight_places_of_its_own_and_two_others(copy):
    status = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=all"], cwd=copy.place, capture_output=True, text=True, check=True
    )
    touched = {line[3:] for line in status.stdout.splitlines() if line[1] != " "}
    own = touched - OTHERS
    assert own == {*copy.toy.files, *copy.toy.written, *copy.toy.edited}
    assert len(own) == 8
    assert touched & OTHERS == OTHERS
    page = (ROOT / "docs" / "adding-a-system.md").read_text("utf-8")
    assert "eight places of its own and two others" in page


@pytest.mark.slow
def test_everything_passes_with_it(copy):
    toy, run_tests = copy.toy, ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    copy(*run_tests, "--deselect", COUNTS_SIXTY, *TESTS)
    its = f"{toy.slug} or {toy.slug.replace('-', '_')}"
    copy(*run_tests, *toy.tests, "-k", its)
    out = copy(*run_tests, "tests/test_docs.py", "-k", f"{its} or links")
    assert out.count(".") > 40
    pytest.importorskip("importlinter")
    copy("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")


@pytest.mark.slow
def test_the_commands_know_it(copy, tmp_path):
    slug = copy.toy.slug
    assert slug in copy("-m", "lowdim", "list", copy.toy.family)
    shown = copy("-m", "lowdim", "list", slug)
    if copy.toy is not SVD:
        option, name = ("nblocks = 2   ", "Block-diagonal") if copy.toy is BLOCKS else ("blocks = 16   ", "KronA")
        assert option in shown
        forecast = copy("-m", "lowdim", "plan", "--model", "stories260k", "--methods", slug, "--length", "16")
        assert name in forecast
        return
    assert "rank = 4   a whole number >= 1" in shown
    data = ["--model", "stories260k", "--data", "lowdim:shakespeare", "--max-length", "32"]
    options = ["--method", slug, "--option", "rank=20", "--out", str(tmp_path / "small")]
    assert "Toy SVD: " in copy("-m", "lowdim", "compress", *data, *options)
    assert (tmp_path / "small" / "compression.json").is_file()
