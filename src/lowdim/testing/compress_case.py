"""What every compression of a trained model owes: `model -> model` with layers swapped in place.

A system's test says how to compress and writes, as a formula of the dense layer, what a compressed layer must answer; it then
gets all of these::

    class TestWeightSVD(CompressCase):
        options = {"rank": 4}
        needs_data = False

        def compress(self, model, batches, **options):
            return weight_svd(model, WeightSVDConfig(**options))

        def expected(self, layer, inputs, compressed):
            u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
            return inputs @ (u[:, :4] * s[:4] @ vh[:4]).T + layer.bias

A check that a system cannot pass is switched off by name, with a reason: `test_lossless = None  # why`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.calibrate import capture
from lowdim.compress import LowRankLinear, load_compressed
from lowdim.files import read_json, read_tensors, write_json, write_tensors
from lowdim.modules import describe_layers
from lowdim.testing.new_process import run_in_new_process

__all__ = ["CompressCase", "small_net"]


def small_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Two linear layers with a batch norm and dropout between them, and a head named as transformers names it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            OrderedDict(
                up=nn.Linear(12, 48),
                norm=nn.BatchNorm1d(48),
                drop=nn.Dropout(0.5),
                act=nn.ReLU(),
                down=nn.Linear(48, 12),
                classifier=nn.Linear(12, 3),
            )
        )
    return net.to(dtype)


class CompressCase(ABC):
    """Base of a compressor's test class: define `compress` and `expected`, and set the attributes.

    Attributes:
        options: hyperparameters with which `small_net` is compressed.
        lossless: hyperparameters that keep the outputs; None if there are none.
        needs_data: whether the system needs sample batches.
        compressed: the classes that may replace a linear layer.
        shrinks: the model has fewer numbers afterwards; False for masks, which keep all.
        frozen: parameters of a compressed layer, by their names in it, that get no gradient right after it was made.
        freezes_others: everything outside of the compressed layers is frozen.
        transposed: options with which a Conv1D gets what an nn.Linear gets with `options`: an axis of the stored weight.
        tolerance: largest error of a compressed layer's output, relative to the largest entry, in float64.
    """

    options: ClassVar[dict[str, Any]] = {}
    lossless: ClassVar[dict[str, Any] | None] = None
    needs_data: ClassVar[bool] = True
    compressed: ClassVar[tuple[type[nn.Module], ...]] = (LowRankLinear,)
    shrinks: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ()
    freezes_others: ClassVar[bool] = False
    transposed: ClassVar[dict[str, Any]] = {}
    tolerance: ClassVar[float] = 1e-8

    @abstractmethod
    def compress(self, model: nn.Module, batches: Any, **options: Any) -> Any:
        """The system's function; `options` includes `target_modules` in some tests."""

    @abstractmethod
    def expected(self, layer: nn.Linear, inputs: Tensor, compressed: Any) -> Tensor:
        """The required output for `inputs` of the layer that replaces `layer`, with `options`.

        Written out from the paper in plain torch: no function of the system, ranks and thresholds as the formula gives them.

        Args:
            layer: the dense layer, float64.
            inputs: `(rows, in)`, all inputs of the layer from `batches()` in the dense model.
            compressed: the new layer, for random numbers that cannot be computed.
        """

    def reload(self, model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, Any]) -> nn.Module:
        """A freshly built dense model with the compressed model's tensors; must be importable behaviour, not state."""
        return load_compressed(model, tensors, layers)

    def batches(self, count: int = 8, rows: int = 128, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Sample inputs of `small_net`."""
        return [torch.randn(rows, 12, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]

    def run(self, model: nn.Module, **options: Any) -> Any:
        """Compress with the default options and batches."""
        return self.compress(model, self.batches(), **{**self.options, **options})

    # Behaviour

    @pytest.mark.parametrize("name", ["up", "down"])
    def test_each_layer_answers_as_the_formula_says(self, name: str) -> None:
        """On the inputs it was compressed for, in float64; layers are compressed one by one and from the dense model."""
        model, batches = small_net(dtype=torch.float64).eval(), self.batches(dtype=torch.float64)
        dense = copy.deepcopy(model.get_submodule(name))
        inputs = torch.cat([found[name] for found in capture(model, [name], batches, inputs=True)])
        self.compress(model, batches, **self.options)
        compressed = model.get_submodule(name)
        with torch.no_grad():
            got, want = compressed(inputs), self.expected(dense, inputs, compressed)
        assert got.shape == want.shape
        error = float((got - want).abs().max() / want.abs().max())
        assert error <= self.tolerance, f"layer {name}: relative error {error:.3g} > {self.tolerance:.3g}"

    def test_swaps_in_place(self) -> None:
        """The same object, finite outputs that differ from those before; the head stays."""
        model = small_net().eval()
        x = self.batches()[0]
        want = model(x).detach()
        assert self.run(model) is model
        assert isinstance(model.up, self.compressed)
        assert isinstance(model.down, self.compressed)
        assert type(model.classifier) is nn.Linear
        got = model(x).detach()
        assert bool(torch.isfinite(got).all())
        assert 0 < float((got - want).norm() / want.norm()) < 1

    def test_shrinks(self) -> None:
        """Fewer numbers than before."""
        if not self.shrinks:
            pytest.skip("it keeps every number of the model: it masks, and does not shrink")
        model = small_net()
        before = sum(p.numel() for p in model.parameters())
        self.run(model)
        assert sum(p.numel() for p in model.parameters()) < before

    def test_lossless(self) -> None:
        """With enough freedom the function does not change."""
        if self.lossless is None:
            pytest.skip("no hyperparameters of this system leave the outputs as they were")
        model, x = small_net(dtype=torch.float64).eval(), self.batches(dtype=torch.float64)
        want = model(x[0]).detach()
        self.compress(model, x, **self.lossless)
        assert isinstance(model.up, self.compressed)
        torch.testing.assert_close(model(x[0]).detach(), want, rtol=1e-8, atol=1e-8)

    def test_same_input_same_bits(self) -> None:
        """Two runs give equal tensors."""
        one, two = (self.run(small_net()).state_dict() for _ in range(2))
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())

    def test_names_select(self) -> None:
        """Only the selected layers change; the rest is bit-identical."""
        model = small_net()
        before = copy.deepcopy(model.state_dict())
        self.run(model, target_modules=["down"])
        assert isinstance(model.down, self.compressed)
        assert type(model.up) is nn.Linear
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items() if not n.startswith("down."))

    @pytest.mark.parametrize("training", [True, False])
    def test_model_is_otherwise_as_it_was(self, training: bool) -> None:
        """Mode, gradients, buffers and hooks of the rest; the new layers copy the mode."""
        model = small_net().train(training)
        model.classifier.bias.requires_grad_(False)
        model.norm.weight.grad = torch.ones(48)
        mean = model.norm.running_mean.clone()
        self.run(model)
        assert {module.training for module in model.modules()} == {training}
        assert torch.equal(model.norm.running_mean, mean)
        others = {n: p for n, p in model.named_parameters() if not n.startswith(("up.", "down."))}
        still = [n for n, p in others.items() if not p.requires_grad]
        assert still == (list(others) if self.freezes_others else ["classifier.bias"])
        assert torch.equal(model.norm.weight.grad, torch.ones(48))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_new_parameters_train(self) -> None:
        """Fine-tuning can follow: every number of a compressed layer gets a gradient, but for those the system freezes."""
        model = self.run(small_net())
        model.eval()
        model(self.batches()[0]).square().sum().backward()
        for name in ("up", "down"):
            own = dict(model.get_submodule(name).named_parameters())
            assert set(self.frozen) <= own.keys()
            assert {path for path, p in own.items() if p.grad is not None and bool(p.grad.any())} == own.keys() - set(
                self.frozen
            )

    def test_batches_are_consumed_once(self) -> None:
        """A generator works, and gives the same as a list."""
        self._needs_data()
        drawn: list[int] = []

        def batches() -> Any:
            for i, batch in enumerate(self.batches()):
                drawn.append(i)
                yield batch

        got = self.compress(small_net(), batches(), **self.options).state_dict()
        assert drawn == list(range(8))
        want = self.run(small_net()).state_dict()
        assert all(torch.equal(value, want[name]) for name, value in got.items())

    # Files, dtypes, copies

    def test_loads_in_another_process(self, tmp_path: Path) -> None:
        """The saved tensors suffice to rebuild the model around them."""
        model, x = self.run(small_net()).eval(), self.batches()[0]
        write_tensors(tmp_path / "model.safetensors", model.state_dict())
        write_json(tmp_path / "layers.json", describe_layers(model))
        write_tensors(tmp_path / "x.safetensors", {"x": x})
        run_in_new_process(_answer, type(self), str(tmp_path))
        assert torch.equal(read_tensors(tmp_path / "answer.safetensors")[0]["y"], model(x).detach())

    def test_half_precision_model(self) -> None:
        """Stays half; the decomposition itself loses no more than the rounding of its result."""
        half = small_net(dtype=torch.bfloat16).eval()
        wide = copy.deepcopy(half).float()
        self.compress(half, self.batches(dtype=torch.bfloat16), **self.options)
        self.compress(wide, [batch.bfloat16().float() for batch in self.batches()], **self.options)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        x = self.batches()[0]
        got, want = half(x.bfloat16()).float().detach(), wide(x).detach()
        assert float((got - want).norm() / want.norm()) < 0.05

    def test_deepcopy_is_independent(self) -> None:
        """A copy of a compressed model is a compressed model."""
        model, x = self.run(small_net()).eval(), self.batches()[0]
        other, want = copy.deepcopy(model), model(x).detach()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert torch.equal(model(x).detach(), want)

    # Ties and other layer classes

    def test_a_module_under_two_names_stays_one(self) -> None:
        """And is calibrated on all its uses."""
        net = small_net()
        model = nn.ModuleDict({"a": net, "b": nn.ModuleDict({"again": net.up})})
        self.compress(_Call(model, "a"), self.batches(), **self.options)
        assert isinstance(net.up, self.compressed)
        assert model.get_submodule("b.again") is net.up

    def test_a_layer_tied_to_an_embedding_is_left_alone(self) -> None:
        """Decomposing it would untie it."""
        model = _Tied()
        batches = [torch.arange(16).view(2, 8)] * 100
        self.compress(model, batches, **self.options)
        assert isinstance(model.up, self.compressed)
        assert model.out.weight is model.emb.weight
        with pytest.raises(ValueError, match=r"out shares its weight with emb\.weight"):
            self.compress(_Tied(), batches, **{**self.options, "target_modules": ["out"]})

    def test_transposed_layers_of_transformers(self) -> None:
        """Conv1D is treated as a linear layer."""
        conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
        plain, model = small_net().eval(), small_net().eval()
        for name in ("up", "down"):
            linear = plain.get_submodule(name)
            layer = conv1d(linear.out_features, linear.in_features)
            layer.load_state_dict({"weight": linear.weight.T, "bias": linear.bias})
            setattr(model, name, layer.eval())
        self.run(plain)
        self.run(model, **self.transposed)
        assert isinstance(model.up, self.compressed)
        x = self.batches()[0]
        torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)

    def test_grouped_query_attention(self) -> None:
        """Layers of four shapes; key and value projections that get a rank below the size of a head are in the report."""
        model = _grouped_llama()
        batches = [{"input_ids": torch.randint(32, (8, 16), generator=torch.Generator().manual_seed(i))} for i in range(8)]
        self.compress(model, batches, **self.options)
        replaced = {name for name, module in model.named_modules() if isinstance(module, self.compressed)}
        assert replaced
        assert bool(torch.isfinite(model(**batches[0]).logits).all())
        report = getattr(model, "lowdim_report", None)
        if report is None:  # while training, layers are masked and nothing is lost yet
            return
        assert {row.name for row in report.replaced} == replaced
        ranks = {row.name: row.rank for row in report.replaced if row.name.endswith(("k_proj", "v_proj"))}
        narrow = {name: rank for name, rank in ranks.items() if rank is not None and rank < 12}
        assert report.details.get("below_head_dim", {}) == narrow

    # Wrong input: a clear error, and an unchanged model

    def test_wrong_name(self) -> None:
        """The nearest names are listed."""
        with pytest.raises(ValueError, match=r"'dwn' matches no module; nearest names: down"):
            self.run(small_net(), target_modules=["dwn"])
        with pytest.raises(ValueError, match="only layers that cannot"):
            self.run(small_net(), target_modules=["norm"])

    @pytest.mark.parametrize("batches", [None, []])
    def test_no_batches(self, batches: Any) -> None:
        """None and an empty list are not data."""
        self._needs_data()
        with pytest.raises(ValueError, match=r"batches is (missing|empty)"):
            self.compress(small_net(), batches, **self.options)

    def test_an_error_leaves_the_model_as_it_was(self) -> None:
        """NaN in a batch or a weight names the layer, and nothing has changed."""
        model = small_net()
        batches = self.batches()
        if self.needs_data:
            batches[3][0, 0] = torch.nan
        else:
            with torch.no_grad():
                model.up.weight[0, 0] = torch.nan
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"layer up.*NaN"):
            self.compress(model, batches, **self.options)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)) for name, value in after.items())
        assert not any(m._forward_hooks for m in model.modules())

    def _needs_data(self) -> None:
        if not self.needs_data:
            pytest.skip("it looks at weights alone, and reads no batch")


def _grouped_llama() -> Any:
    """A Llama in which two query heads of size 12 share a key and a value head; skips without transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=1, **sizes)
        return transformers.LlamaForCausalLM(config).eval()


class _Call(nn.Module):
    def __init__(self, modules: nn.ModuleDict, name: str):
        super().__init__()
        self.held, self.called = modules, name

    def forward(self, x: Tensor) -> Tensor:
        return self.held[self.called](x)


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(16, 12)
        self.up, self.down = nn.Linear(12, 48), nn.Linear(48, 12)
        self.out = nn.Linear(12, 16, bias=False)
        self.out.weight = self.emb.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.down(F.relu(self.up(self.emb(ids)))))


def _answer(case: type[CompressCase], folder: str) -> None:
    tensors, _ = read_tensors(Path(folder) / "model.safetensors")
    x = read_tensors(Path(folder) / "x.safetensors")[0]["x"].clone()  # own memory, aligned
    model = case().reload(small_net(seed=99), tensors, read_json(Path(folder) / "layers.json")).eval()
    write_tensors(Path(folder) / "answer.safetensors", {"y": model(x).detach()})
