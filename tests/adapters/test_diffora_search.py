"""DiffoRA's search: the gradient of the logits, what each optimizer moves, and the search before a training loop."""

import copy
import math

import pytest
import torch
from diffora_blocks import Q_V, batch, blocks, loss_fn, searched
from torch import nn

import lowdim
from lowdim.adapters import DiffoRA
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import small_model


@pytest.mark.parametrize("lacking", [(), ((1, "v"),)], ids=["full", "absent"])
def test_the_unrolled_gradient_is_the_total_derivative(lacking):
    adapted = searched(DiffoRA(**Q_V, unrolled=True), lacking)
    train, valid, xi, eps = batch(1), batch(2), 0.2, 1e-5
    got = adapted.dam_gradient(loss_fn, train, valid, xi)

    def after_one_step():
        copied = copy.deepcopy(adapted)
        weights = copied.weight_parameters()
        gradients = torch.autograd.grad(loss_fn(copied.model, train), weights)
        with torch.no_grad():
            for p, g in zip(weights, gradients, strict=True):
                p -= xi * g
            return float(loss_fn(copied.model, valid))

    for i, row in enumerate(adapted.grid):
        for j, name in enumerate(row):
            if name is None:
                assert got[i, j] == 0
                continue
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    adapted.dam[i, j] += sign * eps
                values.append(after_one_step())
                with torch.no_grad():
                    adapted.dam[i, j] -= sign * eps
            assert abs((values[0] - values[1]) / (2 * eps) - float(got[i, j])) < 1e-7


def test_the_gradient_of_dam_is_zero_first_and_not_when_unrolled():
    for unrolled in (False, True):
        adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V, unrolled=unrolled))
        assert bool(adapted.dam_gradient(loss_fn, batch(1), batch(2), 0.1).any()) == unrolled


def test_the_virtual_step_has_the_mask_of_the_training_loss_and_leaves_no_trace():
    adapted = searched(DiffoRA(**Q_V, unrolled=True, dropout=0.5))
    optimizer = torch.optim.AdamW(adapted.weight_parameters(), lr=0.1)
    before = copy.deepcopy(adapted.model.state_dict())
    torch.manual_seed(0)
    one = adapted.dam_gradient(loss_fn, batch(1), batch(2), 0.1)
    torch.manual_seed(0)
    assert torch.equal(adapted.dam_gradient(loss_fn, batch(1), batch(2), 0.1), one)
    assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in adapted.model.state_dict().items())


def test_the_virtual_step_takes_the_rate_of_the_moment():
    results = []
    for lr in (0.1, 0.3):
        adapted = searched(DiffoRA(**Q_V, unrolled=True))
        weight_optimizer = torch.optim.SGD(adapted.weight_parameters(), lr=0.1)
        weight_optimizer.param_groups[0]["lr"] = lr  # what a schedule does
        want = adapted.dam_gradient(loss_fn, batch(1), batch(2), lr)
        before = adapted.dam.detach().clone()
        adapted.search_step(loss_fn, batch(1), batch(2), torch.optim.SGD([adapted.dam], lr=1.0), weight_optimizer)
        assert relative_error(before - adapted.dam, want) < 1e-12
        results.append(want)
    assert not torch.allclose(*results)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_absent_cells_never_move(optimizer, decay):
    adapted = searched(DiffoRA(**Q_V), lacking=((1, "v"),))
    dam_optimizer = optimizer([adapted.dam], lr=0.1, weight_decay=decay)
    weight_optimizer = torch.optim.AdamW(adapted.weight_parameters(), lr=0.05)
    before = adapted.dam.detach().clone()
    losses = [adapted.search_step(loss_fn, batch(1), batch(2), dam_optimizer, weight_optimizer) for _ in range(5)]
    absent = torch.tensor([[name is None for name in row] for row in adapted.grid])
    assert absent.tolist() == [[False, False], [False, True], [False, False]]
    assert bool((adapted.dam[absent] == -math.inf).all())
    assert bool((adapted.dam[~absent] != before[~absent]).all())
    assert bool(adapted.dam[~absent].isfinite().all())
    assert adapted.gates()[absent] == 0
    assert losses[-1][0] < losses[0][0]
    assert not adapted.discretize()[absent]


def test_the_logits_are_moved_by_their_optimizer_alone():
    adapted = searched(DiffoRA(**Q_V))
    everything = torch.optim.SGD(adapted.param_groups(0.1))  # holds dam, too
    still = torch.optim.SGD([adapted.dam], lr=0.0)
    before = adapted.dam.detach().clone()
    adapted.search_step(loss_fn, batch(1), batch(2), still, everything)
    assert torch.equal(adapted.dam, before)


def test_a_new_head_is_trained_in_the_search(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, DiffoRA(rank=2, target_modules=["first", "second"]), modules_to_save=["score"])
    before = model.score.weight.detach().clone()
    x, y = torch.randn(8, 8), torch.randn(8, 3)
    adapted.before_training([(x, y)], loss_fn, lr=0.01, steps=5)
    assert not torch.equal(model.score.weight, before)


def test_attention_has_a_second_derivative():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    assert model.config._attn_implementation == "sdpa"
    adapted = lowdim.adapt(model, DiffoRA(rank=2, unrolled=True, target_modules=["q_proj", "v_proj", "down_proj"]))
    ids = torch.arange(12).view(2, 6)
    language = lambda model, batch: model(input_ids=batch, labels=batch).loss  # noqa: E731
    gradient = adapted.dam_gradient(language, ids, ids.flip(0), 0.1)
    assert gradient.shape == (2, 3)
    assert bool(gradient.isfinite().all() and gradient.any())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_before_training_searches_and_chooses(count):
    adapted = lowdim.adapt(blocks(), DiffoRA(**Q_V))
    adapted.model.eval()
    adapted.model.blocks[1].train()
    seen = []

    def counting(model, batch):
        seen.append((batch[0].data_ptr(), model.training, model.blocks[0].training))
        return loss_fn(model, batch)

    batches = [batch(i) for i in range(count)]
    before = [p.detach().clone() for p in adapted.weight_parameters()]
    assert adapted.before_training(batches, counting, 0.05, 40) == 8, "a fifth of the steps"
    assert adapted.dam is None
    assert len(seen) == 2 * 8  # a fifth of the steps, a validation and a training batch each
    assert all(training and inner for _, training, inner in seen)
    valid, train = ({pointer for pointer, _, _ in seen[k::2]} for k in (0, 1))
    assert valid | train == {b[0].data_ptr() for b in batches}
    assert bool(valid & train) == (count == 1)
    assert len(valid) == max(1, count // 2)
    assert not any(torch.equal(a, b) for a, b in zip(before, adapted.weight_parameters()))
    assert not adapted.model.training
    assert adapted.model.blocks[1].training
    assert not adapted.model.blocks[0].training
    seen.clear()
    assert adapted.before_training(batches, counting, 0.05, 40) == 0, "a second time there is nothing to do"
    assert not seen


def test_the_search_finds_the_modules_that_matter():
    class Deaf(nn.Module):
        """Of each block only one module is heard."""

        heard = "qvv"

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 8) for name in "qv"}) for _ in self.heard)

        def forward(self, h):
            for block, heard in zip(self.blocks, self.heard):
                h = h + sum((name == heard) * torch.tanh(layer(h)) for name, layer in block.items())
            return h

    torch.manual_seed(0)
    model, teacher, x = Deaf(), Deaf(), torch.randn(512, 8)
    y = teacher(x).detach()
    adapted = lowdim.adapt(model, DiffoRA(rank=2, alpha=4, target_modules=["q", "v"]))
    batches = [(x[k : k + 64], y[k : k + 64]) for k in range(0, 512, 64)]
    adapted.before_training(batches, loss_fn, lr=0.005, steps=200)
    assert ["qv"[j] for _, j in adapted.gates().nonzero().tolist()] == list(Deaf.heard)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_search_in_low_precision(dtype):
    adapted = lowdim.adapt(blocks(dtype=dtype), DiffoRA(**Q_V), dtype=torch.float32)
    assert adapted.dam.dtype == torch.float32
    optimizers = torch.optim.Adam([adapted.dam], lr=0.05), torch.optim.AdamW(adapted.weight_parameters(), lr=0.05)
    data = batch(1, dtype=dtype), batch(2, dtype=dtype)
    losses = [adapted.search_step(loss_fn, *data, *optimizers)[0] for _ in range(20)]
    assert losses[-1] < 0.8 * losses[0]
    adapted.discretize()
    x = data[0][0]
    want = adapted.model(x)
    assert relative_error(adapted.merge()(x), want) < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.slow
def test_the_gates_compile():
    adapted = searched(DiffoRA(**Q_V), dtype=torch.float32)
    x, y = batch(1, dtype=torch.float32)
    compiled = torch.compile(adapted.model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        wanted = [adapted.dam, *adapted.weight_parameters()] if adapted.dam is not None else adapted.weight_parameters()
        got, want = (torch.autograd.grad(loss_fn(run, (x, y)), wanted) for run in (compiled, adapted.model))
        assert all(relative_error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))
        if adapted.dam is not None:
            adapted.discretize()
