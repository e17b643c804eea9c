"""A feed-forward block of two structured layers, and the class that puts it into transformers' models."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowdim.errors import check_choice, check_int, refuse_strange
from lowdim.layers.structured_ffn.blocks import BlockDense, BlockShuffle
from lowdim.linalg import derive_seed
from lowdim.modules import LowRankLinear, Rebuildable
from lowdim.surgery import layer_dtype, make_linear

__all__ = ["StructuredFFN", "StructuredMLP", "structured_mlp"]

_KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lowrank": (LowRankLinear, {"rank": 256, "init": "svd"}),
    "blockdense": (BlockDense, {}),
    "blockshuffle": (BlockShuffle, {}),
    "dense": (nn.Linear, {}),
}
_ACTS = ("gelu", "swiglu")
#: What transformers' configurations call the activation -> ours.
_HIDDEN_ACTS = {"silu": "swiglu", "swish": "swiglu", "gelu": "gelu", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


class StructuredFFN(nn.Module):
    """A feed-forward block of two structured layers.

    Formula: `fc2(gelu(fc1(x)))` (GELU in its tanh form), or with `"swiglu"`, where `fc1` is twice as wide,
    `fc2(silu(h[..., :ffn_dim]) * h[..., ffn_dim:])` for `h = fc1(x)`.

    Args:
        hidden: width of input and output.
        ffn_dim: width in between.
        kind: `"lowrank"` (rank 256 and the svd start, if not given), `"blockdense"`, `"blockshuffle"` or `"dense"`.
        act: `"gelu"` or `"swiglu"`.
        bias: of both layers.
        how: options of the layers, such as rank and nblocks; a `seed` gives each its own.

    Raises:
        ValueError: unknown kind or act, sizes that do not fit the options (the layer is named).
        TypeError: an option that the layers do not have.

    Example:
        >>> import torch
        >>> from lowdim.layers import StructuredFFN
        >>> ffn = StructuredFFN(16, 64, "blockdense", rank=8, nblocks=2)
        >>> ffn(torch.zeros(3, 16)).shape, type(ffn.fc1).__name__
        (torch.Size([3, 16]), 'BlockDense')

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    NeurIPS 2024, arXiv 2406.16450.
    """

    def __init__(self, hidden: int, ffn_dim: int, kind: str, *, act: str = "gelu", bias: bool = True, **how: Any):
        super().__init__()
        check_int("hidden", hidden, 1)
        check_int("ffn_dim", ffn_dim, 1)
        check_choice("act", act, _ACTS)
        _check_options(kind, how)
        self.hidden, self.ffn_dim, self.kind, self.act, self.bias = hidden, ffn_dim, kind, act, bias
        self.fc1 = _layer("fc1", kind, hidden, ffn_dim * (2 if act == "swiglu" else 1), bias, how)
        self.fc2 = _layer("fc2", kind, ffn_dim, hidden, bias, how)

    def forward(
        self,
        x: Tensor,  # (..., hidden)
    ) -> Tensor:
        """`(..., hidden)`."""
        h = self.fc1(x)
        if self.act == "gelu":
            return self.fc2(F.gelu(h, approximate="tanh"))
        gate, up = h.chunk(2, -1)
        return self.fc2(F.silu(gate) * up)


def structured_mlp(kind: str, **how: Any) -> type[StructuredFFN]:
    """The class of a `StructuredMLP` that takes a configuration of transformers, for its patch mapping.

    It reads `hidden_size`, `intermediate_size`, `hidden_act` (silu is SwiGLU) and `mlp_bias` (where there is none, a SwiGLU has
    no bias and a GELU has one).

    Args:
        kind, how: see `StructuredFFN`. No seed: all blocks would start alike; `torch.manual_seed` decides.

    Raises:
        ValueError: unknown kind, or a seed; when a model is built, an activation other than silu and gelu.
        TypeError: an option that the layers do not have.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from lowdim.layers import structured_mlp
        >>> config = SimpleNamespace(hidden_size=16, intermediate_size=32, hidden_act="silu", mlp_bias=False)
        >>> mlp = structured_mlp("blockdense", rank=8, nblocks=2)(config)
        >>> mlp.fc1.out_features, mlp.fc1.bias
        (64, None)

    The mapping replaces every block of the model that is built under it:
    `transformers.monkey_patching.register_patch_mapping({"^LlamaMLP$": structured_mlp("blockdense", rank=256)})`. The saved
    model says what its blocks are; after `import lowdim` it is loaded without the mapping, too.

    Source: Wei et al., "Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
    NeurIPS 2024, arXiv 2406.16450.
    """
    _check_options(kind, how)
    if "seed" in how or "generator" in how:
        raise ValueError(
            "seed must not be given: all blocks would start alike; call torch.manual_seed before the model is built"
        )
    return type("StructuredMLP", (_FromConfig,), {"kind_": kind, "how": how, "__module__": __name__})


class StructuredMLP(StructuredFFN, Rebuildable):
    """A `StructuredFFN` in the place of a transformers model's own block, which files describe.

    `plain` is the block that it stands for: its class and its configuration, where they are known. `to_plain()` then gives a
    SwiGLU block of that class, and otherwise the same block with plain layers.
    """

    def __init__(self, hidden: int, ffn_dim: int, kind: str, *, act: str = "gelu", bias: bool = True, **how: Any):
        super().__init__(hidden, ffn_dim, kind, act=act, bias=bias, **how)
        self.options = {name: value for name, value in how.items() if name not in ("device", "dtype", "seed", "generator")}
        self.plain: tuple[type[nn.Module], Any] | None = None

    def description(self) -> dict[str, Any]:
        """Sizes, kind and options."""
        sizes = {"hidden": self.hidden, "ffn_dim": self.ffn_dim, "kind": self.kind, "act": self.act, "bias": self.bias}
        return {**sizes, **self.options}

    @classmethod
    def blank(cls, layer: nn.Module, **description: Any) -> Self:
        """A block without numbers in the place of `layer`, on the meta device."""
        first = next(module for module in layer.modules() if isinstance(getattr(module, "weight", None), Tensor))
        made = StructuredMLP(**description, device="meta", dtype=layer_dtype(first)).train(layer.training)
        if hasattr(layer, "config"):
            made.plain = (type(layer), layer.config)
        return made  # type: ignore[return-value]

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """The dense block."""
        first, second = (layer if isinstance(layer, nn.Linear) else layer.to_linear() for layer in (self.fc1, self.fc2))  # type: ignore[operator]
        names = ("gate_proj", "up_proj", "down_proj")
        if self.act == "swiglu" and self.plain is not None:
            with torch.device("meta"):
                block: Any = self.plain[0](self.plain[1])
            if all(isinstance(getattr(block, name, None), nn.Linear) for name in names):
                biases = first.bias.chunk(2) if first.bias is not None else (None, None)
                parts = [*zip(first.weight.chunk(2), biases, strict=True), (second.weight, second.bias)]
                for name, (weight, bias) in zip(names, parts, strict=True):
                    setattr(block, name, make_linear(weight.clone(), None if bias is None else bias.clone()))
                return block.train(self.training)
        how: dict[str, Any] = {"device": "meta", "dtype": first.weight.dtype}
        block = StructuredFFN(self.hidden, self.ffn_dim, "dense", act=self.act, bias=self.bias, **how)
        block.fc1, block.fc2 = first, second
        return block.train(self.training)


class _FromConfig(StructuredMLP):
    kind_: ClassVar[str]
    how: ClassVar[dict[str, Any]]

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        hidden_act = str(config.hidden_act)
        check_choice("hidden_act of the configuration", hidden_act, _HIDDEN_ACTS)
        act = _HIDDEN_ACTS[hidden_act]
        bias = bool(getattr(config, "mlp_bias", act == "gelu"))
        super().__init__(config.hidden_size, config.intermediate_size, self.kind_, act=act, bias=bias, **self.how)


def _check_options(kind: str, how: dict[str, Any]) -> None:
    check_choice("kind", kind, _KINDS)
    known = inspect.signature(_KINDS[kind][0]).parameters
    names = [name for name in known if name not in ("in_features", "out_features", "bias")]
    refuse_strange(f"a {kind} layer", how, names)


def _layer(name: str, kind: str, inputs: int, outputs: int, bias: bool, how: dict[str, Any]) -> nn.Module:
    cls, defaults = _KINDS[kind]
    options = {**defaults, **how}
    if options.get("seed") is not None:
        options["seed"] = derive_seed(options["seed"], name) % 2**31
    try:
        return cls(inputs, outputs, bias, **options)
    except ValueError as error:
        raise ValueError(f"layer {name} ({inputs} -> {outputs}): {error}") from error
