import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
import vectors
from lowdim.adapters import SaRA
from lowdim.adapters.sara.entries import EntriesLayer
from lowdim.adapters.sara.method import NOMINAL
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.plan.kept import kept_tensors
from lowdim.surgery import is_conv1d, weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import LAYERS, make_input, make_layer
from lowdim.testing.small_model import sample_input, small_model

ON_LAYERS = [name for name, kind in LAYERS.items() if kind in SaRA.takes]


@pytest.mark.filterwarnings("ignore:no entry of")  # test_any_shape has layers of a single weight
class TestSaRA(AdapterCase):
    random_start = False  # everything follows from the weight
    exact_in_peft = False  # the update is sparse, of full rank
    has_factors = False
    threshold = 0.15

    def method(self, **changes):
        changes.pop("rank", None)  # there is none
        return SaRA(**{"threshold": self.threshold, **changes})

    def dense(self, update):
        change = torch.zeros_like(update.mask, dtype=update.values.dtype)
        return change.masked_scatter(update.mask, update.values - update.initial).flatten(1)

    def start(self, weight, stats):
        small = weight[weight.abs() < self.threshold]
        return {"values": small, "initial": small, "active": 1.0}

    def test_shapes_are_known_without_numbers(self):  # how many entries are trained follows from the numbers
        real = self.adapt(small_model(), disturbed=False).model.state_dict()
        with torch.device("meta"):
            model = small_model()
        on_meta = lowdim.adapt(model, self.method(), initialise=False).model.state_dict()
        counted = lowdim.adapt(small_model(), self.method(), initialise=False).model.state_dict()
        assert on_meta.keys() == real.keys()
        for key, value in real.items():
            assert counted[key].shape == value.shape
            single = key.endswith(("values", "active", "initial"))
            share = round(NOMINAL * real[key.rsplit(".", 1)[0] + ".mask"].numel()) if single else 0
            assert on_meta[key].shape == ((share,) if single else value.shape)

    def test_errors_name_the_layer(self):  # a threshold takes the place of the rank
        for bad in (0.0, -1e-3, float("nan"), float("inf"), None):
            with pytest.raises(ValueError, match="threshold"):
                self.method(threshold=bad)
        with pytest.raises(ValueError, match="dropout"):
            self.method(dropout=1.0)


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def moved(adapted, seed=11):
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter))
    return adapted


# Vectors


def test_vectors_of_the_mask():
    case = vectors.load("sara", "mask")
    threshold = case.hyperparameters["threshold"]
    update = SaRA(threshold).attach(linear(case["W0"])).update
    assert torch.equal(update.mask, case["mask"])
    assert torch.equal(update.values.detach(), case["values"])
    case.close(torch.tensor(SaRA.default_lr(threshold), dtype=torch.float64), "default_lr")
    assert bool(update.active.all())


def test_vectors_of_the_progressive_selection():
    case = vectors.load("sara", "progressive")
    how = case.hyperparameters
    model = nn.Sequential(linear(case["W1"]), nn.ReLU(), linear(case["W2"]))
    adapted = lowdim.adapt(model, SaRA(how["threshold"], progressive_iter=how["progressive_iter"]))
    names = ("lr", "weight_decay", "betas", "eps")
    optimizer = torch.optim.AdamW(adapted.trainable().values(), **{name: how[name] for name in names})
    losses = []
    for step in range(how["steps"]):
        optimizer.zero_grad()
        loss = (model(case["x"]) - case["target"]).square().mean() + adapted.regularizer()
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        adapted.step(optimizer)
        for layer, steps in zip(adapted.layers.values(), ("W1_steps", "W2_steps")):
            case.close(layer.effective_weight(), case[steps][step])
    case.close(torch.stack(losses), "losses")
    left = 0
    for layer, name in zip(adapted.layers.values(), ("active1", "active2")):
        dense = torch.zeros_like(case[name])
        dense[layer.update.mask] = layer.update.active
        assert torch.equal(dense, case[name])
        left += int((~layer.update.active).sum())
    assert left > 0


def test_vectors_of_the_nuclear_penalty():
    case = vectors.load("sara", "nuclear")
    how = case.hyperparameters
    model = nn.Sequential(linear(case["W0"]))
    adapted = lowdim.adapt(model, SaRA(how["threshold"], lambda_rank=how["lambda_rank"]))
    update = adapted.layers["0"].update
    names = ("lr", "weight_decay", "betas", "eps")
    optimizer = torch.optim.AdamW(adapted.trainable().values(), **{name: how[name] for name in names})
    norms = []
    for _ in range(how["steps"]):
        norms.append(update.nuclear_norm().detach())
        optimizer.zero_grad()
        penalty = adapted.regularizer()
        assert float(penalty.detach()) == pytest.approx(how["lambda_rank"] * float(norms[-1]), rel=1e-12)
        ((model(case["x"]) - case["target"]).square().mean() + penalty).backward()
        optimizer.step()
        adapted.step(optimizer)
    case.close(torch.stack(norms), "nuclear")
    case.tolerance = 1e-9  # of all but the norm
    case.close(update.values, "values")


# The mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_mask_is_strict_and_in_the_order_of_rows(dtype):
    layer = nn.Linear(3, 2, bias=False, dtype=dtype)
    layer.weight.data = torch.tensor([[0.5, -0.25, 0.125], [0.0, 0.375, -0.75]], dtype=dtype)
    update = SaRA(threshold=0.5).attach(layer).update
    assert update.mask.tolist() == [[False, True, True], [True, True, False]]
    assert update.values.tolist() == [-0.25, 0.125, 0.0, 0.375]
    assert update.values.dtype == dtype
    assert update.mask.dtype == update.active.dtype == torch.bool


def test_a_threshold_is_not_rounded_to_the_weights_dtype():
    # The bfloat16 number next to 0.002 is below it; rounded to bfloat16, the threshold would be that number itself.
    weight = torch.tensor([[0.002, 0.0021]], dtype=torch.bfloat16)
    assert float(weight[0, 0]) < 0.002 < float(weight[0, 1])
    layer = nn.Linear(2, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data = weight
    assert SaRA(threshold=2e-3).attach(layer).update.mask.tolist() == [[True, False]]


def test_a_convolutions_mask_has_the_weights_shape():
    conv = nn.Conv2d(4, 6, 3)
    update = SaRA(threshold=0.05).attach(conv).update
    assert torch.equal(update.mask, conv.weight.abs() < 0.05)
    assert torch.equal(update.values, conv.weight[update.mask])


def test_every_entry_or_none():
    model, plain = small_model(), small_model()
    adapted = lowdim.adapt(model, SaRA(threshold=10.0, target_modules=["first"]))
    assert len(adapted.layers["body.first"].update.values) == 12 * 8
    x = sample_input()
    assert torch.equal(model(x), plain(x))
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    whole = plain.body["first"].weight.grad.flatten()
    assert relative_error(adapted.layers["body.first"].update.values.grad, whole) < 1e-6

    with pytest.warns(UserWarning, match=r"no entry of Linear with weight \(6, 12\)"):
        none = lowdim.adapt(small_model(), SaRA(threshold=1e-12, target_modules=["second"]))
    assert none.layers["body.second"].update.values.shape == (0,)
    inner = x.clone().requires_grad_()
    none.model(inner).square().sum().backward()
    none.step()
    assert bool(inner.grad.any())
    assert not list(none.trainable())
    assert torch.equal(none.model(x), plain(x))


def test_biases_stay():
    model = small_model()
    adapted = lowdim.adapt(model, SaRA(threshold=10.0))
    assert all(name.endswith(".update.values") for name in adapted.trainable())


# The selection


def single(threshold=0.2, **options):
    torch.manual_seed(0)
    return lowdim.adapt(nn.Sequential(nn.Linear(8, 6)), SaRA(threshold, **options))


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_inactive_entries_stay_to_the_bit_whatever_the_optimizer(name, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, dtype=dtype))
    adapted = lowdim.adapt(model, SaRA(0.2, progressive_iter=3))
    update = adapted.layers["0"].update
    optimizer = OPTIMIZERS[name](list(adapted.trainable().values()))
    x = torch.randn(16, 8, dtype=dtype)
    moments: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        if step > 3:
            assert not bool(update.values.grad[~update.active].any())
            assert bool(update.values.grad[update.active].any())
        optimizer.step()
        if step == 3:
            moments = {k: v.clone() for k, v in optimizer.state[update.values].items() if torch.is_tensor(v)}
        adapted.step(optimizer)
        if step < 3:
            assert bool(update.active.all())
        if step == 3:
            assert torch.equal(update.active, update.values.detach().float().abs() < 0.2)
            assert 0 < int(update.active.sum()) < len(update.active)
            held = update.values.detach().clone()
            state = optimizer.state[update.values]
            assert all(torch.equal(value, state[key]) for key, value in moments.items())
    assert torch.equal(update.values[~update.active], held[~update.active])
    assert not torch.equal(update.values[update.active], held[update.active])
    assert not torch.equal(update.active, update.values.detach().abs() < 0.2) or name == "adagrad"  # selected once


def test_select_and_restore_by_hand():
    update = single().layers["0"].update
    with torch.no_grad():
        update.values.copy_(torch.linspace(-1, 1, len(update.values)))
    want = update.values.detach().clone()
    update.restore()
    assert torch.equal(update.values, want)
    update.select(0.5)
    assert torch.equal(update.active, want.abs() < 0.5)
    left = ~update.active
    with torch.no_grad():
        update.values.add_(1.0)
    update.select(0.3)  # restores first: what left stays at what it left with
    assert torch.equal(update.values[left], want[left])
    assert not bool(update.active.any())
    moved_on = update.values.detach().clone()
    with torch.no_grad():
        update.values.fill_(float("nan"))
    x = torch.randn(3, 8)
    assert bool(update.dense().isfinite().all())
    update.restore()
    assert torch.equal(update.values, moved_on)
    assert bool(single().model(x).isfinite().all())


def test_the_selection_continues_after_saving_and_after_a_trainers_checkpoint(tmp_path):
    def go(adapted, optimizer, first, last):
        for step in range(first, last):
            x = sample_input(16, seed=step)
            optimizer.zero_grad()
            (adapted.model(x) - x[:, :3].sin()).square().mean().backward()
            optimizer.step()
            adapted.step(optimizer)

    def begin():
        adapted = lowdim.adapt(small_model(), SaRA(0.15, progressive_iter=4))
        return adapted, torch.optim.AdamW(adapted.param_groups(0.05))

    whole, optimizer = begin()
    go(whole, optimizer, 0, 9)
    for killed in (2, 4, 6):
        part, optimizer = begin()
        go(part, optimizer, 0, killed)
        part.save(tmp_path / str(killed))
        fresh = lowdim.adapt(small_model(), SaRA(0.15, progressive_iter=4))
        fresh.model.load_state_dict(copy.deepcopy(part.model.state_dict()))
        loaded = lowdim.load_adapter(small_model(), tmp_path / str(killed))
        for resumed in (fresh, loaded):
            again = torch.optim.AdamW(resumed.param_groups(0.05))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            go(resumed, again, killed, 9)
            for name, layer in resumed.layers.items():
                update = whole.layers[name].update
                assert torch.equal(layer.update.values, update.values)
                assert torch.equal(layer.update.active, update.active)
                assert not bool(update.active.all())


# The penalty


def big(seed=0, dims=(70, 72, 66)):
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(n, out) for n, out in itertools.pairwise(dims)])


def test_the_gradient_of_the_nuclear_norm():
    update = SaRA(threshold=0.2).attach(make_layer("linear")).update
    update.select(0.1)
    value = update.nuclear_norm()
    (got,) = torch.autograd.grad(value, update.values)
    dense = torch.zeros(9, 12, dtype=torch.float64)
    dense[update.mask] = update.values.detach() * update.active
    dense.requires_grad_()
    want = torch.linalg.matrix_norm(dense, "nuc")
    want.backward()
    assert relative_error(value, want) < 1e-12
    assert relative_error(got, dense.grad[update.mask] * update.active) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_nuclear_norm_of_zero_has_no_gradient(dtype):
    update = SaRA(threshold=1.0).attach(nn.Linear(7, 5, dtype=dtype)).update
    with torch.no_grad():
        update.values.zero_()
    value = update.nuclear_norm()
    value.backward()
    assert float(value.detach()) == 0.0
    assert value.dtype == torch.float32
    assert torch.equal(update.values.grad, torch.zeros_like(update.values))
    with torch.no_grad():
        update.values[0] = 3.0  # rank one: the other directions give nothing
    update.values.grad = None
    update.nuclear_norm().backward()
    assert update.values.grad.tolist() == pytest.approx([1.0] + [0.0] * (len(update.values) - 1), abs=1e-6)


def test_one_eligible_layer_is_drawn_for_each_step():
    adapted = lowdim.adapt(big(dims=(70, 72, 66, 40, 80)), SaRA(0.05, lambda_rank=0.5))  # the last two are too small
    norms = {name: 0.5 * float(layer.update.nuclear_norm().detach()) for name, layer in adapted.layers.items()}
    seen = []
    for _ in range(60):
        value = float(adapted.regularizer().detach())
        assert value == float(adapted.regularizer().detach())  # the same within a step
        seen.append(next(name for name, norm in norms.items() if norm == pytest.approx(value, rel=1e-6)))
        adapted.step()
    assert set(seen) == {"0", "1"}
    assert 15 < seen.count("0") < 45
    other = lowdim.adapt(big(dims=(70, 72, 66, 40, 80)), SaRA(0.05, lambda_rank=0.5, seed=1))
    drawn = []
    for _ in range(60):
        drawn.append(float(other.regularizer().detach()) == pytest.approx(norms["0"], rel=1e-6))
        other.step()
    assert drawn != [name == "0" for name in seen]


def test_the_draw_continues_after_a_resume(tmp_path):
    method = SaRA(0.05, lambda_rank=0.5)

    def values(adapted, count):
        found = []
        for _ in range(count):
            found.append(float(adapted.regularizer().detach()))
            adapted.step()
        return found

    whole = values(lowdim.adapt(big(), method), 12)
    assert len(set(whole)) == 2
    part = lowdim.adapt(big(), method)
    values(part, 5)
    part.save(tmp_path)
    fresh = lowdim.adapt(big(), method)
    fresh.model.load_state_dict(part.model.state_dict())
    assert values(fresh, 7) == whole[5:]
    assert values(lowdim.load_adapter(big(), tmp_path), 7) == whole[5:]


def test_what_is_not_eligible_gives_zero():
    x = torch.randn(2, 70)

    def value(model, method):
        adapted = lowdim.adapt(model, method)
        penalty = adapted.regularizer()
        assert penalty.shape == ()
        (model(x[:, : next(model.parameters()).shape[1]]).sum() + penalty).backward()
        return float(penalty.detach())

    assert value(big(), SaRA(0.05)) == 0.0
    assert value(big(dims=(64, 72)), SaRA(0.05, lambda_rank=1.0)) == 0.0
    assert value(big(dims=(65, 72)), SaRA(0.05, lambda_rank=1.0)) > 0.0
    adapted = lowdim.adapt(big(dims=(70, 70)), SaRA(0.05, lambda_rank=1.0))
    update = adapted.layers["0"].update
    count = len(update.values)
    assert value(big(dims=(70, 70)), SaRA(0.05, lambda_rank=1.0, nuclear_min_count=count)) == 0.0
    assert value(big(dims=(70, 70)), SaRA(0.05, lambda_rank=1.0, nuclear_min_count=count - 1)) > 0.0
    update.select(1e-4)  # active entries count, not all
    assert float(adapted.regularizer()) == 0.0
    conv = nn.Sequential(nn.Conv2d(80, 80, 3))
    assert float(lowdim.adapt(conv, SaRA(0.01, lambda_rank=1.0)).regularizer()) == 0.0


# One product


@pytest.mark.parametrize("name", ON_LAYERS)
def test_the_entries_in_the_weight_and_next_to_it_agree(name, monkeypatch):
    layer = make_layer(name)
    adapted = moved(SaRA(threshold=0.2).attach(layer))
    adapted.update.select(0.15)
    x = make_input(layer).requires_grad_()
    parameters = [adapted.update.values, x]
    got = adapted(x)
    grads = torch.autograd.grad(got.square().sum(), parameters)
    assert isinstance(adapted, EntriesLayer)
    monkeypatch.setattr(EntriesLayer, "_direct", lambda self, x: False)
    want = adapted(x)
    assert relative_error(got, want) < 1e-13
    for a, b in zip(grads, torch.autograd.grad(want.square().sum(), parameters)):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("name", ON_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_is_that_of_the_merged_layer_to_the_bit(name, dtype):
    layer = make_layer(name, dtype)
    adapted = moved(SaRA(threshold=0.2).attach(layer))
    x = make_input(layer, dtype)
    merged = adapted.merged()
    if getattr(layer, "padding", None) != "same" and not is_conv1d(layer):  # Conv1D multiplies in another order
        assert torch.equal(adapted(x), merged(x))
    update = adapted.update
    matrix = weight_matrix(merged)
    mask = update.mask.view(matrix.shape)
    assert torch.equal(matrix[mask], update.values)
    assert torch.equal(matrix[~mask], weight_matrix(layer)[~mask])


def test_the_backward_pass_keeps_the_input_alone():
    for name in ("linear", "conv2d"):
        layer = make_layer(name)
        adapted = SaRA(threshold=0.2).attach(layer)
        x = make_input(layer)
        kept = kept_tensors(lambda: adapted(x), adapted)  # noqa: B023 (called at once)
        assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_hooks_and_wrapped_bases_are_respected():
    layer = nn.Linear(4, 3)
    adapted = moved(SaRA(threshold=0.3).attach(layer))
    x = torch.randn(2, 4)
    want = adapted(x)
    seen = []
    handle = adapted.base.register_forward_hook(lambda module, args, output: seen.append(output))
    assert relative_error(adapted(x), want) < 1e-6
    assert len(seen) == 1
    handle.remove()
    adapted.base.forward = lambda x: nn.Linear.forward(layer, x) + 1.0
    assert relative_error(adapted(x), want + 1.0) < 1e-6
    del adapted.base.forward
    adapted.base.bias.requires_grad_(True)  # someone trains the bias too
    adapted(x).sum().backward()
    assert torch.equal(adapted.base.bias.grad, torch.full((3,), 2.0))


def test_a_convolution_without_a_batch_and_with_reflection():
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
    plain = nn.Conv2d(3, 4, 3, padding=1)
    for layer, x in ((conv, torch.randn(2, 3, 6, 6)), (plain, torch.randn(3, 6, 6))):
        adapted = moved(SaRA(threshold=0.1).attach(layer))
        assert relative_error(adapted(x), adapted.merged()(x)) < 1e-5


def test_float32_values_over_bfloat16_weights_start_at_the_weights_and_keep_small_changes():
    model = small_model(dtype=torch.bfloat16)
    plain = model(sample_input(dtype=torch.bfloat16))
    adapted = lowdim.adapt(model, SaRA(0.15), dtype=torch.float32)
    update = adapted.layers["body.first"].update
    assert update.values.dtype == torch.float32
    assert torch.equal(model(sample_input(dtype=torch.bfloat16)), plain)
    before = update.values.detach().clone()
    with torch.no_grad():
        update.values.mul_(1 + 1e-5)
    assert not torch.equal(update.values, before)
    model(sample_input(dtype=torch.bfloat16)).float().square().sum().backward()
    assert update.values.grad.dtype == torch.float32


def test_weight_decay_pulls_the_values_themselves():
    adapted = single()
    update = adapted.layers["0"].update
    before = update.values.detach().clone()
    groups = adapted.param_groups(0.1, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups)
    update.values.grad = torch.zeros_like(update.values)
    optimizer.step()
    torch.testing.assert_close(update.values.detach(), before * (1 - 0.1 * 0.5))


# Files


def test_a_checkpoint_holds_bits_values_and_what_is_active(tmp_path):
    adapted = moved_model()
    adapted.layers["body.first"].update.select(0.1)
    adapted.save(tmp_path)
    tensors, _ = read_tensors(tmp_path / "adapter.safetensors")
    mine = {key.rsplit(".", 1)[1]: value for key, value in tensors.items() if key.startswith("body.first")}
    assert set(mine) == {"mask", "values", "active"}
    assert mine["mask"].dtype == torch.uint8
    assert len(mine["mask"]) == 12 * 8 // 8
    loaded = lowdim.load_adapter(small_model(), tmp_path)
    for name, layer in adapted.layers.items():
        other = loaded.layers[name]
        assert isinstance(other, EntriesLayer)
        for key, value in layer.update.state_dict().items():
            assert torch.equal(value, other.update.state_dict()[key]), key
        assert torch.equal(layer.update.index, other.update.index)


def moved_model():
    adapted = lowdim.adapt(small_model(), SaRA(0.15))
    moved(adapted.model)
    return adapted


def test_a_file_that_does_not_fit_is_refused():
    adapted = SaRA(0.2).attach(nn.Linear(4, 3))
    saved = {key: value.clone() for key, value in adapted.update.saved().items()}
    with pytest.raises(CheckpointError, match="mask"):
        adapted.update.restore({key: value for key, value in saved.items() if key != "mask"}, torch.ones(3, 4))
    flipped = {**saved, "mask": saved["mask"] ^ 1}
    with pytest.raises(CheckpointError, match="the mask has"):
        adapted.update.restore(flipped, torch.ones(3, 4))


# Bad input


def test_bad_input():
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="progressive_iter"):
            SaRA(progressive_iter=bad)
    for bad in (-1e-9, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="lambda_rank"):
            SaRA(lambda_rank=bad)
    for name in ("nuclear_min_dim", "nuclear_min_count", "seed"):
        with pytest.raises(ValueError, match=name):
            SaRA(**{name: -1})
    with pytest.raises(ValueError, match="threshold"):
        SaRA.default_lr(0.0)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="floating point"):
        SaRA().attach(layer)
    for other in (nn.ReLU(), nn.Embedding(4, 4), nn.LayerNorm(4)):
        with pytest.raises(TypeError, match="adapts"):
            SaRA().attach(other)


def test_relu_networks_learn_as_the_dense_gradient_says():
    # The gradient of the values is the dense gradient of the weight, read at the mask.
    model, plain = small_model(dtype=torch.float64), small_model(dtype=torch.float64)
    adapted = lowdim.adapt(model, SaRA(0.15))
    x = sample_input(7, dtype=torch.float64)
    for run in (model, plain):
        F.relu(run(x)).square().sum().backward()
    for name, layer in adapted.layers.items():
        update = layer.update
        assert relative_error(update.values.grad, plain.get_submodule(name).weight.grad[update.mask]) < 1e-13
