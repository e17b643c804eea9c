import torch

from lowdim import linalg
from lowdim.calibrate import collect
from lowdim.linalg import Memory, recall, remembered

CALLS: list[str] = []


@remembered
def double(x, *, times=2):
    CALLS.append("double")
    return {"y": x * times, "n": (times, None)}


def test_a_result_is_given_again_with_its_bits_and_as_a_copy():
    memory, x = Memory(), torch.randn(3, 4)
    CALLS.clear()
    with memory.active():
        first, again = double(x), double(x.clone())
        again["y"].zero_()
        third = double(x)
    assert CALLS == ["double"]
    assert memory.hits == 2
    assert torch.equal(first["y"], x * 2)
    assert torch.equal(third["y"], x * 2)
    assert third["n"] == (2, None)


def test_other_values_options_shapes_and_dtypes_are_computed():
    memory, x = Memory(), torch.ones(2, 3)
    CALLS.clear()
    with memory.active():
        for given in (x, x * 2, x.reshape(3, 2), x.double(), x[:, :2]):
            double(given)
        double(x, times=3)
    assert len(CALLS) == 6
    assert memory.hits == 0


def test_nothing_is_kept_outside_the_block_and_by_inner_calls():
    memory, x = Memory(), torch.ones(2)
    CALLS.clear()
    double(x)
    with memory.active():
        recall(("outer", x), lambda: double(x)["y"])
        double(x)
    double(x)
    assert len(CALLS) == 4
    assert memory.hits == 0


def test_the_least_recently_used_result_goes_first():
    numbers = [torch.full((10,), float(i)) for i in range(3)]
    memory = Memory(limit=2 * 40)
    with memory.active():
        for i in (0, 1, 0, 2):  # 1 goes
            recall(("n", numbers[i]), lambda i=i: numbers[i])
        assert memory.hits == 1
        assert memory.bytes == 80
        recall(("n", numbers[0]), lambda: numbers[0])
        recall(("n", numbers[1]), lambda: numbers[1])
    assert memory.hits == 2
    with Memory(limit=39).active():
        recall(("n", numbers[0]), lambda: numbers[0])  # too large to keep


def test_decompositions_are_remembered():
    memory, W = Memory(), torch.randn(6, 5)
    C = W.T @ W
    plain = [*linalg.svd(W), *linalg.context_svd(W, C)]
    with memory.active():
        linalg.svd(W), linalg.context_svd(W, C)
        again = [*linalg.svd(W), *linalg.context_svd(W, C)]
    assert memory.hits == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, again))


class Squares:
    def __init__(self):
        self.calls = 0

    def loss(self, model, batch):
        self.calls += 1
        return model(batch).square().mean()


def test_statistics_are_remembered_for_one_task_model_and_data():
    model, task, batches = torch.nn.Sequential(torch.nn.Linear(3, 2)), Squares(), [torch.randn(4, 3)]
    layers = {"0": model[0]}
    with Memory().active():
        first = collect(model, layers, {"gradient"}, batches, task.loss)
        again = collect(model, layers, {"gradient"}, list(batches), task.loss)
        assert task.calls == 1
        assert torch.equal(first["0"]["gradient"], again["0"]["gradient"])
        collect(model, layers, {"gradient"}, batches, Squares().loss)
        with torch.no_grad():
            model[0].weight.add_(1.0)
        changed = collect(model, layers, {"gradient"}, batches, task.loss)
        assert task.calls == 2
        assert not torch.equal(first["0"]["gradient"], changed["0"]["gradient"])
        collect(model, layers, {"gradient"}, batches, lambda m, b: task.loss(m, b))
        collect(model, layers, {"gradient"}, batches, lambda m, b: task.loss(m, b))
        assert task.calls == 4
