import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lowdim
import vectors
from lowdim.adapters import ATLAS, TaskVector, task_vector
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.linalg import scaled_sum
from lowdim.plan.kept import kept_tensors
from lowdim.testing.closeness import relative_error
from lowdim.testing.small_model import sample_input, small_model
from lowdim.testing.whole_case import WholeModelCase


def random_vectors(model, count=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda p: (0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)  # noqa: E731
    return [{name: draw(p) for name, p in model.named_parameters()} for _ in range(count)]


class TestATLAS(WholeModelCase):
    random = False  # coef starts at zero; the classes of a partition come from the method's own seed

    def method(self, model, **changes):
        return ATLAS(**{"task_vectors": random_vectors(model), **changes})

    def dense(self, adapted):
        """`Σ_t c[t, j] τ[t, j]` for parameter j."""
        tasks = adapted.method.task_vectors
        return {
            name: sum(adapted.coef[t, j].double() * task[name].double() for t, task in enumerate(tasks))
            for j, name in enumerate(adapted.names)
        }


class TestATLASPartition(TestATLAS):
    def method(self, model, **changes):
        return super().method(model, **{"partition": 3, **changes})

    def dense(self, adapted):
        """`Σ_t c[t, j, k] τ[t, j]` with k the class of the entry; only matrices are composed."""
        found, tasks = {}, adapted.method.task_vectors
        for j, name in enumerate(adapted.names):
            shape = tasks[0][name].shape
            if len(shape) == 2:
                classes = adapted.composition.get_buffer(f"classes_{shape[0]}x{shape[1]}").long()
                found[name] = sum(adapted.coef[t, j].double()[classes] * task[name].double() for t, task in enumerate(tasks))
        return found


class TestATLASGlobal(TestATLAS):
    def method(self, model, **changes):
        return super().method(model, **{"blockwise": False, **changes})

    def dense(self, adapted):
        """`Σ_t c[t] τ[t]`."""
        tasks = adapted.method.task_vectors
        return {
            name: sum(adapted.coef[t].double() * task[name].double() for t, task in enumerate(tasks)) for name in adapted.names
        }


def from_case(case):
    how = case.hyperparameters
    n, hidden, out = how["dims"]
    net = nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.LayerNorm(hidden), nn.Linear(hidden, out)).double()
    net.load_state_dict({name: case[f"p0.{name}"] for name in how["blocks"]})
    given = [{name: case[f"tv{t}.{name}"] for name in how["blocks"]} for t in range(how["tasks"])]
    maps = {tuple(t.shape): t for name, t in case.tensors.items() if name.startswith("map.")} or None
    adapted = lowdim.adapt(net, ATLAS(given, how["blockwise"], how["partition"], maps, how["linearized"]))
    assert adapted.blocks == how["blocks"]
    return net, adapted


@pytest.mark.parametrize("name", ["blockwise", "global", "linearized", "partition"])
def test_vectors(name):
    case = vectors.load("atlas", name)
    net, adapted = from_case(case)
    assert adapted.coef.shape == case["coef"].shape
    assert not bool(adapted.coef.any())
    with torch.no_grad():
        adapted.coef.copy_(case["coef"])
    y = adapted(case["x"])
    case.close(y, "y")
    (y.square().sum() / 2).backward()
    case.close(adapted.coef.grad, "grad")
    if name != "linearized":
        case.close(adapted.merge()(case["x"]), "y")
        assert type(net[0]) is nn.Linear


def test_steps():
    case = vectors.load("atlas", "steps")
    how = case.hyperparameters
    net, adapted = from_case(case)
    optimizer = torch.optim.AdamW(adapted.param_groups(how["lr"]), weight_decay=how["weight_decay"])
    for step in range(how["steps"]):
        optimizer.zero_grad()
        F.cross_entropy(net(case["x"]), case["labels"]).backward()
        optimizer.step()
        adapted.step(optimizer)
        case.close(adapted.coef, case["coefs"][step])


# Task vectors


def test_a_task_vector_leads_to_the_fine_tuned_model():
    base, tuned = small_model(), small_model(seed=1)
    vector = task_vector(base, tuned)
    assert list(vector) == [name for name, _ in base.named_parameters()]
    adapted = lowdim.adapt(base, ATLAS([vector]))
    with torch.no_grad():
        adapted.coef.fill_(1.0)
    x = sample_input()
    assert relative_error(base(x), tuned(x)) <= 1e-6


def test_task_vectors_from_state_dicts_leave_integers_buffers_and_tied_copies_out():
    def make(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
        net[2].weight = net[0].weight
        net[1].running_mean.normal_()
        return net.eval()

    base, tuned = make(0), make(1)
    x = torch.randn(4, 3, dtype=torch.float64)
    states = task_vector(base.state_dict(), tuned.state_dict())
    assert "1.num_batches_tracked" not in states
    assert {"1.running_mean", "2.weight"} <= set(states)  # a state dict does not tell them from parameters
    assert set(task_vector(base, tuned.state_dict())) == {name for name, _ in base.named_parameters()}
    mean = base[1].running_mean.clone()
    adapted = lowdim.adapt(base, ATLAS([states]))
    assert adapted.blocks == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    with torch.no_grad():
        adapted.coef.fill_(1.0)
    assert torch.equal(base[1].running_mean, mean)
    tuned[1].running_mean.copy_(mean)
    assert relative_error(base(x), tuned(x)) <= 1e-12


def test_a_block_under_its_tied_name_is_found():
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    net[1].weight = net[0].weight
    adapted = lowdim.adapt(net, ATLAS([{"1.weight": torch.ones(3, 3)}]))
    with torch.no_grad():
        adapted.coef.fill_(2.0)
    assert torch.equal(adapted.delta()["0.weight"], torch.full((3, 3), 2.0))


def test_a_block_that_a_task_vector_lacks_counts_as_zero():
    model = small_model(dtype=torch.float64)
    given = random_vectors(model)
    whole = [dict(vector) for vector in given]
    for task, name in ((0, "body.first.weight"), (1, "body.first.weight"), (2, "score.bias"), (0, "body.second.bias")):
        del given[task][name]
        whole[task][name] = torch.zeros_like(whole[task][name])
    for vector in (*given, *whole):
        vector.pop("body.first.bias")  # no task has it
    outputs = []
    for vectors_given in (given, whole):
        adapted = lowdim.adapt(small_model(dtype=torch.float64), ATLAS(vectors_given))
        with torch.no_grad():
            adapted.coef.copy_(torch.linspace(-1, 1, adapted.coef.numel()).view_as(adapted.coef))
        y = adapted(sample_input(dtype=torch.float64))
        outputs.append((y, torch.autograd.grad(y.square().sum(), adapted.coef)[0]))
        assert not bool(adapted.delta()["body.first.bias"].any())
    assert relative_error(outputs[0][0], outputs[1][0]) <= 1e-12
    missing = outputs[0][1] == 0
    assert bool(missing[0, adapted.blocks.index("body.first.weight")])
    assert relative_error(outputs[0][1], outputs[1][1].masked_fill(missing, 0)) <= 1e-12


def test_task_vectors_in_files_are_mapped_and_saved_by_reference(tmp_path):
    paths = []
    for task, vector in enumerate(random_vectors(small_model())):
        paths.append(tmp_path / f"task{task}.safetensors")
        save_file(vector, paths[-1])
    adapted = lowdim.adapt(small_model(), ATLAS(paths))
    beside = lowdim.adapt(small_model(), ATLAS(random_vectors(small_model())))
    with torch.no_grad():
        for one in (adapted, beside):
            one.coef.copy_(torch.linspace(-1, 1, one.coef.numel()).view_as(one.coef))
    x = sample_input()
    assert torch.equal(adapted(x), beside(x))
    assert adapted.method == beside.method
    adapted.save(tmp_path / "adapter")
    assert set(read_tensors(tmp_path / "adapter" / "adapter.safetensors")[0]) == {"lowdim_shared.coef"}
    assert torch.equal(lowdim.load_adapter(small_model(), tmp_path / "adapter")(x), adapted(x))
    paths[0].rename(tmp_path / "adapter" / paths[0].name)  # moved along with the adapter
    assert torch.equal(lowdim.load_adapter(small_model(), tmp_path / "adapter")(x), adapted(x))
    save_file(random_vectors(small_model(), seed=6)[0], paths[1])
    with pytest.raises(CheckpointError, match=r"task1\.safetensors is not the task vector"):
        lowdim.load_adapter(small_model(), tmp_path / "adapter")
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"task1\.safetensors is missing"):
        lowdim.load_adapter(small_model(), tmp_path / "adapter")


def test_given_classes_are_saved_and_drawn_ones_come_from_the_seed(tmp_path):
    given = {(12, 8): torch.randint(2, (12, 8))}
    adapted = lowdim.adapt(small_model(), ATLAS(random_vectors(small_model()), partition=2, partition_maps=given, seed=4))
    with torch.no_grad():
        adapted.coef.copy_(torch.randn(adapted.coef.shape))
    adapted.save(tmp_path)
    loaded = lowdim.load_adapter(small_model(), tmp_path)
    assert loaded.method == adapted.method
    assert torch.equal(loaded(sample_input()), adapted(sample_input()))
    outputs = []
    for seed in (4, 4, 5):
        one = lowdim.adapt(small_model(), ATLAS(random_vectors(small_model()), partition=2, seed=seed))
        with torch.no_grad():
            one.coef.copy_(torch.linspace(-1, 1, one.coef.numel()).view_as(one.coef))
        outputs.append(one(sample_input()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_blocks_of_one_shape_share_their_classes_and_only_matrices_move():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(2, 2, 1))
    ones = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    adapted = lowdim.adapt(net, ATLAS([ones], partition=5))
    assert adapted.coef.shape == (1, 6, 5)
    with torch.no_grad():
        adapted.coef.copy_(torch.arange(1.0, 6.0).expand(1, 6, 5))
    delta = adapted.delta()
    assert torch.equal(delta["0.weight"], delta["1.weight"])
    assert len(delta["0.weight"].unique()) > 1
    assert not any(bool(delta[name].any()) for name in ("0.bias", "1.bias", "2.weight", "2.bias"))
    assert type(net[2]) is nn.Conv1d


def test_task_vectors_take_the_dtype_of_the_model_and_are_in_no_trainers_checkpoint():
    model = small_model(dtype=torch.bfloat16)
    given = random_vectors(small_model())
    adapted = lowdim.adapt(model, ATLAS(given))
    assert all(t.dtype == torch.bfloat16 for block in adapted.composition.vectors.held for t in block)
    names = set(small_model().state_dict()) | {"lowdim_shared.coef"}
    assert set(model.state_dict()) == names
    twin = copy.deepcopy(model)
    assert twin.lowdim_shared.vectors is adapted.composition.vectors
    assert twin.lowdim_shared.coef is not adapted.coef


def test_autograd_keeps_no_copy_of_a_task_vector():
    model = nn.Linear(64, 64)
    for options in ({}, {"partition": 4}):
        adapted = lowdim.adapt(copy.deepcopy(model), ATLAS(random_vectors(model), **options))
        assert kept_tensors(adapted.delta, adapted.model) == []


# The linear part


def test_linearized_training_dicts_and_errors():
    class Dicts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_model(dtype=torch.float64)

        def forward(self, x):
            return {"logits": self.inner(x), "count": torch.tensor(3)}

    model = Dicts()
    plain, x = copy.deepcopy(model), sample_input(dtype=torch.float64)
    given = random_vectors(model)
    adapted = lowdim.adapt(model, ATLAS(given, linearized=True))
    assert torch.equal(model(x)["logits"], plain(x)["logits"])
    assert int(model(x)["count"]) == 3
    optimizer = torch.optim.Adam(adapted.param_groups(0.1))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x)["logits"] - 0.3).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    start, moved = plain(x)["logits"].detach(), model(x)["logits"].detach()
    with torch.no_grad():
        adapted.coef.mul_(2.0)
    assert relative_error(model(x)["logits"] - start, 2.0 * (moved - start)) <= 1e-11  # linear in coef
    with pytest.raises(ValueError, match="linearized"):
        adapted.merge()
    with pytest.raises(RuntimeError, match="called only as a whole"):
        model.inner(x)
    with pytest.raises(RuntimeError, match="turn off gradient checkpointing"):
        checkpoint(model.inner, x, use_reentrant=False)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x)["logits"], model(x)["logits"])


def test_linearized_saves_and_loads(tmp_path):
    model = small_model()
    adapted = lowdim.adapt(model, ATLAS(random_vectors(model), linearized=True))
    with torch.no_grad():
        adapted.coef.fill_(0.4)
    adapted.save(tmp_path)
    twin = small_model()
    loaded = lowdim.load_adapter(twin, tmp_path)
    assert loaded.method.linearized
    assert torch.equal(twin(sample_input()), model(sample_input()))


# Other numbers


def test_the_regularizer():
    adapted = lowdim.adapt(small_model(), ATLAS(random_vectors(small_model())))
    with torch.no_grad():
        adapted.coef.copy_(torch.randn(3, 6))
    coef = adapted.coef.detach()
    got = adapted.regularizer()
    assert got.shape == ()
    torch.testing.assert_close(got.detach(), 0.5 * coef.square().sum(0).sqrt().mean())
    torch.testing.assert_close(adapted.regularizer(p=1, gamma=2.0).detach(), 2.0 * coef.abs().sum(0).mean())
    got.backward()
    assert bool(adapted.coef.grad.any())
    whole = lowdim.adapt(small_model(), ATLAS(random_vectors(small_model()), blockwise=False))
    with torch.no_grad():
        whole.coef.copy_(torch.tensor([3.0, 0.0, 4.0]))
    assert float(whole.regularizer(gamma=1.0).detach()) == pytest.approx(5.0)
    for bad in ({"p": 0.5}, {"gamma": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            adapted.regularizer(**bad)


def test_attach_is_adapt():
    model = small_model()
    adapted = ATLAS(random_vectors(model)).attach(model)
    assert adapted.model is model
    assert not any(p.requires_grad for name, p in model.named_parameters() if name != "lowdim_shared.coef")


def test_scaled_sum_of_tensors_elsewhere_and_in_other_types():
    tensors = [torch.randn(3, 4).bfloat16(), torch.randn(3, 4)]
    coef = torch.randn(2, requires_grad=True)
    torch.testing.assert_close(scaled_sum(coef, tensors), coef[0] * tensors[0].float() + coef[1] * tensors[1])
    scalar = scaled_sum(coef, [torch.tensor(2.0), torch.tensor(3.0)])
    assert torch.equal(torch.autograd.grad(scalar, coef)[0], torch.tensor([2.0, 3.0]))
    wide = coef.detach().double().requires_grad_()
    doubles = [t.double() for t in tensors]
    classes = torch.randint(3, (3, 4))
    per_class = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: scaled_sum(c, doubles), wide)
    assert torch.autograd.gradcheck(lambda c: scaled_sum(c, doubles, classes), per_class)
    for arguments in ((coef, tensors[:1]), (coef, [tensors[0], torch.ones(2)]), (coef, []), (coef, tensors, classes)):
        with pytest.raises(ValueError, match="coefficients"):
            scaled_sum(*arguments)


def test_bad_input():
    model = small_model()
    (good,) = random_vectors(model, 1)
    for nothing in ([], None, good, "one.safetensors"):
        with pytest.raises(ValueError, match="at least one task vector"):
            ATLAS(nothing)
    with pytest.raises(ValueError, match="mapping"):
        ATLAS([3])
    with pytest.raises(ValueError, match=r"block a .*tensor"):
        ATLAS([{"a": 3}])
    with pytest.raises(CheckpointError, match="does not exist"):
        ATLAS(["nowhere.safetensors"])
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="partition"):
            ATLAS([good], partition=bad)
    with pytest.raises(ValueError, match="partition needs blockwise"):
        ATLAS([good], blockwise=False, partition=2)
    for classes, text in (
        (torch.full((12, 8), 2), r"be in \[0, 2\); got 2"),
        (torch.full((12, 8), -1), r"be in \[0, 2\); got -1"),
        (torch.zeros(12, 7, dtype=torch.int64), r"\(12, 8\)\] must be an integer matrix"),
        (torch.zeros(12, 8), "integer matrix"),
    ):
        with pytest.raises(ValueError, match=text):
            ATLAS([good], partition=2, partition_maps={(12, 8): classes})
    with pytest.raises(ValueError, match="partition_maps needs partition"):
        ATLAS([good], partition_maps={})
    with pytest.raises(ValueError, match=r"task vector 1: the model has no parameter body\.frist\.weight .*body\.first"):
        lowdim.adapt(model, ATLAS([good, {"body.frist.weight": torch.ones(12, 8)}]))
    with pytest.raises(ValueError, match=r"task vector 0: block score\.bias has shape \(4,\); the model's is \(3,\)"):
        lowdim.adapt(model, ATLAS([{"score.bias": torch.ones(4)}]))
    with pytest.raises(ValueError, match="floating point parameter"):
        lowdim.adapt(nn.ReLU(), ATLAS([good]))
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match=r"block 0\.bias is only in the pretrained"):
        task_vector(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2, bias=False)))
    with pytest.raises(ValueError, match=r"block weight has shape \(2, 2\); fine-tuned, it has \(3, 2\)"):
        task_vector(nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False))
    assert TaskVector(good) == TaskVector(dict(good)) != TaskVector(random_vectors(model, 1, seed=9)[0])
