import copy
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.compress import (
    NeuMeta,
    NeuMetaConfig,
    NeuMetaField,
    neumeta,
    neumeta_coordinates,
    neumeta_reconstruction_loss,
    neumeta_weights,
)
from lowdim.errors import CheckpointError, LowdimError, UnknownNameError
from lowdim.files import read_tensors, write_tensors
from lowdim.jobs import compressor
from lowdim.jobs.systems import described_system, names_of
from lowdim.linalg import stream

SMALL = {"hidden_dim": 12, "num_layers": 2, "num_freqs": 2, "norm": 8.0, "steps": 3}


def build(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(2 * width, 3),
    )  # fmt: skip


def batches(count=2):
    draw = stream(0, "test")
    return [(torch.randn(6, 1, 5, 5, generator=draw), torch.randint(3, (6,), generator=draw)) for _ in range(count)]


def reference(width=4):
    torch.manual_seed(1)
    return build(width)


def config(**changes):
    return NeuMetaConfig(**{**SMALL, **changes})


def start(**changes):
    return NeuMetaField(6, 9, config(**changes))


@pytest.fixture(scope="module")
def family():
    return neumeta(build, config(), batches(), widths=[4, 8])


def same(got, want, **tolerance):
    torch.testing.assert_close(dict(got), dict(want), **tolerance)


# Training


@pytest.mark.parametrize(("ce", "recon", "reg"), [(2.0, 0.0, 0.0), (0.0, 30.0, 0.0), (0.0, 0.0, 0.5), (1.0, 10.0, 0.1)])
def test_one_step_by_hand(ce, recon, reg):
    """AdamW's first step is `p (1 − lr decay) − lr g / (|g| + ε)`; the average goes a part of the way."""
    how = {"ce_weight": ce, "recon_weight": recon, "reg_weight": reg, "lr": 0.01, "weight_decay": 0.2, "ema_decay": 0.75}
    model = reference()
    got = neumeta(build, config(**how, steps=1, seed=5), batches(1), widths=[4], reference=model)

    field, wanted = start(seed=5), dict(model.named_parameters())
    noise = torch.rand(neumeta_coordinates(model)[0].shape, generator=stream(5, "neumeta", "noise")) - 0.5
    W = neumeta_weights(field, model, noise)
    x, y = batches(1)[0]
    h = F.conv2d(x, W["0.weight"], W["0.bias"]).relu()
    h = F.conv2d(h, W["2.weight"], W["2.bias"]).amax((2, 3))
    loss = ce * F.cross_entropy(h @ W["5.weight"].T + W["5.bias"], y)
    terms = []
    for name, target in wanted.items():
        size = target.detach().abs() + 1e-6
        terms.append(((W[name] - target.detach()) ** 2 * size / size.max()).mean())
    loss = loss + recon * sum(terms) / 6 + reg * sum((w**2).sum().sqrt() for w in W.values())
    told = 0
    for name, p in field.named_parameters():
        (g,) = torch.autograd.grad(loss, p, retain_graph=True)
        after = p * (1 - 0.01 * 0.2) - 0.01 * g / (g.abs() + 1e-8)
        clear = (g.abs() > 1e-2 * g.abs().max()) & (g.abs() > 1e-6)  # elsewhere rounding decides the sign
        found = dict(got.field.named_parameters())[name]
        torch.testing.assert_close(found[clear], (0.75 * p + 0.25 * after)[clear], rtol=1e-4, atol=1e-6)
        told += bool(clear.any())
    assert told >= 36  # of 42 tensors; a block may be silent


def test_what_is_kept_is_the_average_of_the_steps():
    steps = [neumeta(build, config(steps=k, ema_decay=0.0), batches(), widths=[4, 8]).field for k in range(4)]
    got = neumeta(build, config(steps=3, ema_decay=0.6), batches(), widths=[4, 8]).field
    for values in zip(got.parameters(), *(field.parameters() for field in steps)):
        mean = values[1]
        for p in values[2:]:
            mean = 0.6 * mean + 0.4 * p
        torch.testing.assert_close(values[0], mean, rtol=1e-4, atol=1e-7)


def test_every_width_is_drawn_and_the_reference_counts_at_its_own():
    seen = []

    def watched(width):
        net = build(width)
        net.register_forward_pre_hook(lambda module, inputs: seen.append(width))
        return net

    neumeta(watched, config(steps=40), batches(), widths=[3, 4, 6])
    assert {width: seen.count(width) > 5 for width in (3, 4, 6)} == dict.fromkeys((3, 4, 6), True)
    with_it = neumeta(build, config(recon_weight=50.0, steps=4), batches(), widths=[4, 6], reference=reference(6)).field
    without = neumeta(build, config(recon_weight=0.0, steps=4), batches(), widths=[4, 6], reference=reference(6)).field
    assert not torch.equal(with_it.mlps[0].input.weight, without.mlps[0].input.weight)


def test_a_field_learns_the_reference():
    model = reference()
    how = config(hidden_dim=48, steps=250, ce_weight=0.0, recon_weight=100.0, reg_weight=0.0, coordinate_noise=0.0, lr=5e-3,
                 ema_decay=0.9)  # fmt: skip
    net = neumeta(build, how, batches(), widths=[4], reference=model).sample(4)
    wanted, made = model.state_dict(), net.state_dict()
    far = neumeta_reconstruction_loss({name: torch.zeros_like(t) for name, t in wanted.items()}, wanted)
    assert float(neumeta_reconstruction_loss(made, wanted)) < 0.02 * float(far)


def test_the_same_seed_gives_the_same_bits_and_leaves_torch_s_stream(family):
    state = torch.get_rng_state()
    again = neumeta(build, config(), batches(), widths=[4, 8])
    again.sample(5, samples=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, q) for p, q in zip(again.field.parameters(), family.field.parameters()))
    assert not any(p.requires_grad for p in again.field.parameters())


# Sampling


@pytest.mark.parametrize("width", [4, 7, 8, 20])
def test_a_network_of_any_width_is_an_ordinary_module(family, width):
    net = family.sample(width)
    assert not net.training
    same(net.state_dict(), neumeta_weights(family.field, build(width)))
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    assert copy.deepcopy(net)(batches()[0][0]).shape == (6, 3)


def test_several_samples_are_a_mean_of_one_clean_and_noisy_ones(family):
    draw, coords = stream(3, "test"), neumeta_coordinates(build(6))[0]
    parts = [neumeta_weights(family.field, build(6))]
    parts += [neumeta_weights(family.field, build(6), torch.rand(coords.shape, generator=draw) - 0.5) for _ in range(3)]
    net = family.sample(6, samples=4, generator=stream(3, "test"))
    same(net.state_dict(), {name: sum(part[name] for part in parts) / 4 for name in parts[0]}, rtol=1e-5, atol=1e-7)
    same(family.sample(6, samples=2).state_dict(), family.sample(6, samples=2).state_dict(), rtol=0, atol=0)


class Tied(nn.Module):
    """Tied weights, a buffer that is computed, and a constructor that reads its weights."""

    def __init__(self, width):
        super().__init__()
        self.words, self.out = nn.Embedding(9, width), nn.Linear(width, 9, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("turn", torch.linspace(0, 1, width), persistent=False)
        self.start = float(self.out.weight.detach().sum())

    def forward(self, x):
        return self.out(self.words(x) + self.turn)


def test_tied_weights_stay_tied_and_computed_buffers_keep_their_numbers():
    data = [(torch.arange(6), torch.arange(6))]
    family = neumeta(Tied, config(), data, widths=[4, 6])
    net = family.sample(5)
    assert net.out.weight is net.words.weight
    assert torch.equal(net.turn, torch.linspace(0, 1, 5))
    W = neumeta_weights(family.field, Tied(5))["words.weight"]
    torch.testing.assert_close(net(torch.arange(3)), (W[:3] + net.turn) @ W.T)


def test_networks_keep_the_dtype_that_build_gives_them():
    data = [(x.bfloat16(), y) for x, y in batches()]
    family = neumeta(lambda width: build(width).bfloat16(), config(), data, widths=[4], reference=reference().bfloat16())
    assert family.field.mlps[0].scales.dtype == torch.float32
    assert {p.dtype for p in family.sample(4).parameters()} == {torch.bfloat16}


def test_a_transformers_model_is_saved_by_its_own_save_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")

    def bert(width):
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20, hidden_size=8, intermediate_size=width, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=12, num_labels=3,
            )
        )  # fmt: skip

    ids = torch.arange(12).view(2, 6)
    family = neumeta(bert, config(steps=2), [({"input_ids": ids}, torch.tensor([0, 2]))], widths=[6, 10])
    net = family.sample(8)
    net.save_pretrained(tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.intermediate_size == 8
    assert torch.equal(again(ids).logits, net(ids).logits)


# Files

SCRIPT = """
import json, sys, torch
from torch import nn
from lowdim.compress import NeuMeta
def build(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        nn.Linear(2 * width, 3),
    )
family = NeuMeta.load(sys.argv[1], build)
x = torch.linspace(-1, 1, 50).view(2, 1, 5, 5)
print(json.dumps([family.sample(w, samples=s)(x).tolist() for w, s in ((4, 1), (7, 1), (7, 3))] + [family.widths]))
"""


def test_a_family_is_read_in_another_process(family, tmp_path):
    path = family.save(tmp_path / "family.safetensors")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, check=True)
    x = torch.linspace(-1, 1, 50).view(2, 1, 5, 5)
    want = [family.sample(width, samples=count)(x).tolist() for width, count in ((4, 1), (7, 1), (7, 3))]
    *got, widths = json.loads(done.stdout)
    assert got == want
    assert widths == [4, 8]
    tensors, header = read_tensors(path)
    assert set(tensors) == set(family.field.state_dict())
    about = json.loads(header["family"])
    assert NeuMetaConfig(**about["config"]) == family.config
    assert NeuMeta.load(path, build).config == family.config


def test_files_that_hold_no_family(family, tmp_path):
    path = family.save(tmp_path / "family.safetensors")
    tensors, header = read_tensors(path)
    whole = path.read_bytes()

    def refused(message, header=header, tensors=tensors):
        write_tensors(path, tensors, header)
        with pytest.raises(CheckpointError, match=message):
            NeuMeta.load(path, build)

    refused("holds no family", {})
    refused("version 7.*upgrade", {**header, "version": "7"})
    refused("damaged", {**header, "family": header["family"].replace("12", "13", 1)})
    refused("damaged", tensors={name: t for name, t in tensors.items() if name != "mlps.0.scales"})
    for place in (200, len(whole) // 2, len(whole) - 2):  # in the header, and in the numbers
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            NeuMeta.load(path, build)
    with pytest.raises(CheckpointError, match="does not exist"):
        NeuMeta.load(tmp_path / "nothing", build)


def test_a_family_read_with_another_build_says_so(family, tmp_path):
    path = family.save(tmp_path / "family.safetensors")
    other = NeuMeta.load(path, lambda width: nn.Linear(width, 3))
    with pytest.raises(ValueError, match=r"same parameters.*build\(4\) differs in weight, bias, 0.weight"):
        other.sample(4)


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": []}, "widths is empty"),
        ({"widths": [4, 0]}, "widths must be an int >= 1; got 0"),
        ({"reference": reference(5)}, r"one of the widths \[4, 8\]; its parameters are"),
        ({"batches": None}, "batches is missing"),
        ({"batches": []}, "batches is empty"),
        ({"batches": [torch.ones(3)]}, r"pairs \(x, y\); got Tensor"),
        ({"build": lambda width: nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))}, r"build\(4\): model has buffers"),
        ({"build": lambda width: nn.Conv1d(1, width, 3)}, r"build\(4\): .*weight has shape \(4, 1, 3\)"),
        ({"build": lambda width: nn.Linear(2, width, bias=width > 4)}, r"build\(8\) differs in bias"),
    ],
)
def test_bad_input_is_named(changes, message):
    given = {"build": build, "config": config(), "batches": batches(), "widths": [4, 8], **changes}
    with pytest.raises(ValueError, match=message):
        neumeta(**given)


def test_a_loss_that_is_not_finite_is_an_error(family):
    with pytest.raises(LowdimError, match="loss of training step 1 is nan"):
        neumeta(build, config(), batches(), widths=[4], loss_fn=lambda logits, y: logits.sum() * float("nan"))
    with pytest.raises(ValueError, match="width must be an int >= 1; got 0"):
        family.sample(0)
    with pytest.raises(ValueError, match="samples must be an int >= 1; got 0"):
        family.sample(4, samples=0)


def test_the_command_says_why_it_has_no_such_method():
    assert "neumeta" not in names_of("compress")
    with pytest.raises(
        UnknownNameError, match=r"--method must be one of lord, .*not neumeta: .*lowdim.compress.neumeta in Python"
    ):
        compressor("neumeta")
    row, options = described_system("neumeta")
    assert row.available
    assert options["neumeta"]["coordinate_noise"].default == 1.0
    assert all(option.help for option in options["neumeta"].values())
