import copy

import pytest
import torch
from adapter_vectors import layer_of, train
from torch import is_tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lowdim
import vectors
from lowdim.adapters import ALLoRA, LoRA
from lowdim.plan.kept import kept_tensors
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.sample_layers import LAYERS, make_input, make_layer, moved_output
from lowdim.testing.small_model import sample_input, small_model


class TestStep(AdapterCase):
    def method(self, **changes):
        return ALLoRA(**{"rank": self.rank, "apply_to": "step", **changes})

    def dense(self, update):
        return update.B @ update.A  # it has no scale

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2

    # There is no dropout to turn on or to be out of range: it is not a field.
    def test_dropout_acts_while_training_only(self):
        with pytest.raises(TypeError, match="dropout"):
            self.method(dropout=0.5)
        adapted = self.adapt(small_model())
        assert torch.equal(adapted.model.train()(sample_input()), adapted.model.eval()(sample_input()))

    def test_errors_name_the_layer(self):
        for bad in (0, -1, True, 1.5):
            with pytest.raises(ValueError, match="rank"):
                self.method(rank=bad)
        self.adapt(small_model(), method=self.method(rank=9))


class TestGradient(TestStep):
    def method(self, **changes):
        return super().method(**{"apply_to": "gradient", **changes})

    def pytest_generate_tests(self, metafunc):
        # A grouped convolution goes through the dense kernel, past which no gradient can be scaled: refused, see below.
        if "layer_name" in metafunc.fixturenames:
            names = [name for name, kind in LAYERS.items() if kind in self.method().takes and name != "conv2d_grouped"]
            metafunc.parametrize("layer_name", names)

    def test_gradients_are_those_of_the_formula(self, layer_name):
        # They differ by the method's very rule, so the formula here has it too: the gradient of what ΔW adds is multiplied
        # by κ, that of the base is not.
        layer = make_layer(layer_name)
        adapted = self.attach(layer)
        x = make_input(layer).requires_grad_()
        wanted = {n: p for n, p in adapted.named_parameters() if p.requires_grad} | {"x": x}
        target = torch.randn(adapted(x).shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = torch.autograd.grad((adapted(x) * target).sum(), list(wanted.values()))
        change = moved_output(layer, self.dense(adapted.update), x) - layer(x)
        kappa = row_by_row(adapted.update.A, adapted.update.B, adapted.update.eta)
        kappa = kappa.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else kappa
        scaled = (layer(x) + kappa * change) * target
        want = torch.autograd.grad(scaled.sum(), list(wanted.values()))
        for key, a, b in zip(wanted, got, want, strict=True):
            assert relative_error(a, b) <= 1e-11, key


def row_by_row(A, B, eta):
    return torch.stack([1 / (torch.linalg.vector_norm(row) + 1 / eta**2).sqrt() for row in (B @ A).detach()])


@pytest.mark.parametrize("name", vectors.cases("allora"))
def test_vectors(name):
    case = vectors.load("allora", name)
    how = case.hyperparameters
    adapted = ALLoRA(rank=how["rank"], eta=how["eta"], apply_to=how["apply_to"]).attach(layer_of(case))
    update = adapted.update
    with torch.no_grad():
        update.A.copy_(case["A0"])
        update.B.copy_(case["B0"])
    before = [update.coefficients()]

    def check(step):
        if step == 0:
            case.close(update.A.grad, "grad_A_step1")
            case.close(update.B.grad, "grad_B_step1")
        case.close(before[-1], case["coefficients"][step])
        case.close(update.A, case["A_steps"][step])
        case.close(update.B, case["B_steps"][step])
        before.append(update.coefficients())

    train(case, adapted, how["steps"], check)
    case.close(adapted(case["x"]), "y_end")


def test_start_and_coefficients():
    update = ALLoRA(rank=3, eta=2.5).attach(nn.Linear(20, 7)).update
    assert update.A.shape == (3, 20)
    assert update.B.shape == (7, 3)
    assert not update.B.any()
    assert 0 < float(update.A.detach().abs().max()) <= 20**-0.5
    torch.testing.assert_close(update.coefficients(), torch.full((7,), 2.5))
    with torch.no_grad():
        update.B.normal_()
    torch.testing.assert_close(update.coefficients(), row_by_row(update.A, update.B, 2.5))
    assert bool((update.coefficients() < 2.5).all())


def test_coefficients_are_computed_in_float32_whatever_the_dtype():
    update = TestStep().attach(make_layer("linear", torch.bfloat16)).update
    got = update.coefficients()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, row_by_row(update.A.float(), update.B.float(), 2.0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(update.coefficients(), got)
    assert not got.requires_grad


def test_rounding_below_zero_is_not_a_nan():
    update = ALLoRA(rank=2).attach(nn.Linear(6, 500)).update
    with torch.no_grad():  # rows of B along the null space of A Aᵀ
        update.A.copy_(torch.tensor([[1.0], [3.0]]) * torch.linspace(0.1, 0.7, 6))
        update.B.copy_(torch.tensor([3.0, -1.0]) * torch.linspace(100, 500, 500)[:, None])
        squares = (update.B @ (update.A @ update.A.T) * update.B).sum(1)
        assert bool((squares < 0).any())
    assert bool(update.coefficients().isfinite().all())


@pytest.mark.parametrize("apply_to", ["gradient", "step"])
def test_what_has_diverged_stays_diverged(apply_to):
    adapted = ALLoRA(rank=2, apply_to=apply_to).attach(nn.Linear(6, 4))
    with torch.no_grad():
        adapted.update.B[1, 0] = float("nan")
    assert adapted.update.coefficients().isnan().tolist() == [False, True, False, False]
    optimizer = torch.optim.SGD(adapted.update.parameters(), lr=0.1)
    adapted(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()
    adapted.update.step()
    assert bool(adapted.update.B[1].isnan().any())


def test_the_base_path_keeps_its_gradient():
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4))
    lowdim.adapt(model, ALLoRA(rank=2, target_modules=["1"]))  # B = 0: nothing flows through the adapter yet
    x = torch.randn(3, 5, requires_grad=True)
    model(x).sum().backward()
    torch.testing.assert_close(x.grad, (model[1].base.weight @ model[0].weight).sum(0).expand(3, 5))


def _changes(apply_to, optimizer, **options):
    """`B` after one step from zero, by ALLoRA over by a LoRA of scale 1 with the same `A`."""
    layer = make_layer("linear")
    mine, plain = ALLoRA(rank=2, eta=3.0, apply_to=apply_to).attach(layer), LoRA(rank=2, alpha=2).attach(layer)
    with torch.no_grad():
        plain.update.A.copy_(mine.update.A)
    x = make_input(layer)
    for adapted in (mine, plain):
        run = optimizer(adapted.update.parameters(), lr=0.01, **options)
        adapted(x).square().mean().backward()
        run.step()
        adapted.update.step()
    return mine.update.B.detach() / plain.update.B.detach()


def test_adam_cancels_a_scaled_gradient_but_not_a_scaled_step():
    ones = torch.ones(9, 2, dtype=torch.float64)
    torch.testing.assert_close(_changes("gradient", torch.optim.SGD), 3 * ones)
    torch.testing.assert_close(_changes("gradient", torch.optim.Adam, eps=1e-30), ones)
    torch.testing.assert_close(_changes("step", torch.optim.Adam), 3 * ones)
    torch.testing.assert_close(_changes("step", torch.optim.SGD), 3 * ones)


def test_accumulated_gradients_are_one_step():
    whole, parts = (lowdim.adapt(small_model(dtype=torch.float64), ALLoRA(rank=2, apply_to="step")) for _ in range(2))
    for adapted, count in ((whole, 1), (parts, 4)):
        optimizer = torch.optim.AdamW(adapted.param_groups(0.05))
        for step in range(3):
            optimizer.zero_grad()
            for x in sample_input(8, seed=step, dtype=torch.float64).chunk(count):
                (adapted.model(x).square().mean() / count).backward()
            optimizer.step()
            adapted.step(optimizer)
    for key, value in whole.state_dict().items():
        assert relative_error(parts.state_dict()[key], value) < 1e-9, key


def test_forward_passes_within_a_step_do_not_move_the_start():
    adapted = TestStep().attach(make_layer("linear"))
    update, x = adapted.update, make_input(adapted.base)
    kappa, before = update.coefficients(), update.B.detach().clone()
    adapted(x)
    with torch.no_grad():
        update.B += 0.5  # what an optimizer that searches along a line does between two forward passes
    adapted(x)
    update.step()
    torch.testing.assert_close(update.B.detach(), before + 0.5 * kappa[:, None])
    again = update.B.detach().clone()
    update.step()  # nothing has been computed since
    assert torch.equal(update.B, again)
    with torch.no_grad():
        adapted(x)
        update.B += 0.5
    update.step()  # nor for training
    assert torch.equal(update.B, again + 0.5)


def test_loading_forgets_the_forward_pass_before():
    adapted = TestStep().attach(make_layer("linear"))
    update = adapted.update
    adapted(make_input(adapted.base))
    state = {key: value + 1 for key, value in update.state_dict().items()}
    update.load_state_dict(state)
    update.step()
    assert torch.equal(update.B, state["B"])


def test_a_reentrant_checkpoint_gives_the_same_step():
    runs = [lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=True)]
    results = []
    for run in runs:
        adapted = lowdim.adapt(small_model(dtype=torch.float64), ALLoRA(rank=2, apply_to="step"))
        optimizer = torch.optim.AdamW(adapted.param_groups(0.05))
        for step in range(3):
            optimizer.zero_grad()
            run(adapted.model, sample_input(dtype=torch.float64, seed=step).requires_grad_()).square().mean().backward()
            optimizer.step()
            adapted.step(optimizer)
        results.append(adapted.state_dict())
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


@pytest.mark.parametrize("apply_to", ["gradient", "step"])
def test_nothing_dense_is_built_and_no_more_is_kept_than_by_lora(apply_to):
    layer, x = nn.Linear(64, 96), torch.randn(8, 64, requires_grad=True)

    def kept(method):
        adapted = method.attach(layer)
        adapted(x).sum().backward()  # so that "step" holds what it remembers already
        return sum(t.untyped_storage().nbytes() for t in kept_tensors(lambda: adapted(x), adapted))

    assert kept(ALLoRA(rank=4, apply_to=apply_to)) <= kept(LoRA(rank=4))
    adapted = ALLoRA(rank=4, apply_to=apply_to).attach(layer)
    with Bytes() as seen:
        adapted(x).sum().backward()
    own = layer.weight.untyped_storage().data_ptr()
    assert max(size for pointer, size in seen.sizes if pointer != own) == 4 * 8 * 96  # the output; ΔW would have 4 · 64 · 96


class Bytes(TorchDispatchMode):
    """Notes where everything that is computed lies, and how large it is."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.sizes += [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tree_leaves(out) if is_tensor(t)]
        return out


def test_float32_update_over_bfloat16_weights():
    layer = make_layer("linear", torch.bfloat16)
    adapted = ALLoRA(rank=2).attach(layer, dtype=torch.float32)
    with torch.no_grad():
        adapted.update.B.normal_()
    x = make_input(layer, torch.bfloat16).requires_grad_()
    adapted(x).float().sum().backward()
    kappa = adapted.update.coefficients()
    want = torch.outer(kappa, F.linear(x.detach().float(), adapted.update.A.detach()).flatten(0, 1).sum(0))
    assert adapted.update.B.grad.dtype == torch.float32
    assert relative_error(adapted.update.B.grad, want) < 1e-2
    assert x.grad.dtype == torch.bfloat16


def test_gradients_of_each_sample_by_itself():
    model = small_model(dtype=torch.float64)
    adapted = TestGradient().adapt(model)
    x = sample_input(4, dtype=torch.float64)
    values = {name: p.detach() for name, p in adapted.trainable().items()}
    one = grad(lambda values, row: functional_call(model, values, (row[None],)).square().sum())
    each = vmap(one, in_dims=(None, 0))(values, x)
    model(x).square().sum().backward()
    for name, parameter in adapted.trainable().items():
        assert relative_error(each[name].sum(0), parameter.grad) < 1e-12


def test_grouped_convolutions_are_for_steps_only():
    layer = make_layer("conv2d_grouped")
    with pytest.raises(TypeError, match="ALLoRA adapts"):
        ALLoRA(rank=2).attach(layer)
    adapted = ALLoRA(rank=2, apply_to="step").attach(layer)
    with pytest.raises(TypeError, match="ALLoRA adapts"):
        ALLoRA(rank=2).attach(adapted)


def test_no_scale_no_dropout_and_bad_input():
    for field in ("alpha", "dropout"):
        with pytest.raises(TypeError, match=field):
            ALLoRA(**{field: 0.1})
    for bad in (0.0, -1.0, float("nan"), "2"):
        with pytest.raises(ValueError, match="eta"):
            ALLoRA(eta=bad)
    with pytest.raises(ValueError, match=r"apply_to must be one of gradient, step; got 'steps'"):
        ALLoRA(apply_to="steps")
    with pytest.raises(TypeError, match="Embedding"):
        ALLoRA(rank=2).attach(nn.Embedding(4, 3))
    assert {"alpha", "dropout"}.isdisjoint(ALLoRA().config())


# FSDP2 in bfloat16 with float32 parameters: forward sees B rounded, step() must not take that for what B was.


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def _mixed(mesh):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    adapted = lowdim.adapt(small_model(), ALLoRA(rank=2, apply_to="step"))
    fully_shard(adapted.model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    return adapted


def _one(adapted, optimizer, step):
    optimizer.zero_grad()
    adapted.model(sample_input(seed=step)).square().mean().backward()
    optimizer.step()
    moved = {name: layer.update.B.to_local().clone() for name, layer in adapted.layers.items()}
    adapted.step(optimizer)
    return moved


def test_steps_are_exact_where_forward_runs_in_a_narrower_dtype(one_process):
    adapted = _mixed(one_process)
    optimizer = torch.optim.SGD(adapted.param_groups(1e-3))
    for step in range(4):
        before = {name: layer.update.B.to_local().clone() for name, layer in adapted.layers.items()}
        rounded = {
            name: [t.bfloat16() for t in (layer.update.A.to_local(), before[name])] for name, layer in adapted.layers.items()
        }
        moved = _one(adapted, optimizer, step)
        for name, layer in adapted.layers.items():
            kappa = row_by_row(*(t.float() for t in rounded[name]), 2.0)[:, None]
            want = before[name] + kappa * (moved[name] - before[name])
            got = layer.update.B.to_local()
            assert relative_error(got - before[name], want - before[name]) < 1e-4, (step, name)


def test_a_resumed_run_is_exact_there_too(one_process):
    whole = _mixed(one_process)
    optimizer = torch.optim.SGD(whole.param_groups(0.05))
    for step in range(2):
        _one(whole, optimizer, step)
    state = copy.deepcopy(whole.model.state_dict())
    part = _mixed(one_process)
    part.model.load_state_dict(state)
    again = torch.optim.SGD(part.param_groups(0.05))
    for step in range(2, 4):
        _one(whole, optimizer, step)
        _one(part, again, step)
    for name, layer in whole.layers.items():
        assert torch.equal(part.layers[name].update.B.to_local(), layer.update.B.to_local())


def test_weights_changed_by_hand_there_are_taken_as_forward_saw_them(one_process):
    adapted = _mixed(one_process)
    optimizer = torch.optim.SGD(adapted.param_groups(0.05))
    _one(adapted, optimizer, 0)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.to_local().fill_(3.0)
    _one(adapted, optimizer, 1)
    weights = [layer.update.B.to_local() for layer in adapted.layers.values()]
    assert all(relative_error(weight, torch.full_like(weight, 3.0)) < 0.2 for weight in weights)
