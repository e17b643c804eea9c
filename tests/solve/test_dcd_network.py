"""The network, its vectors and loss, Ritz vectors, training, and the network as a function of vectors."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vectors
from lowdim.solve import DCDNet, as_model, as_preconditioner, dcd_loss, ritz_dataset, ritz_vectors, solve_dcd, train_dcd
from lowdim.testing.agreement import agrees, refuses
from lowdim.testing.result_case import ValueCase


def poisson(sides, mask=None):
    """The five-point stencil with Dirichlet boundaries on the cells of the mask."""
    lines = [2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1) for n in sides]
    A = np.kron(lines[0], np.eye(sides[1])) + np.kron(np.eye(sides[0]), lines[1])
    return A if mask is None else A[np.ix_(mask.ravel(), mask.ravel())]


class TestLoss(ValueCase):
    def data(self):
        rng = np.random.default_rng(0)
        A = poisson((3, 4))
        return A, *(torch.from_numpy(rng.normal(size=(5, 12))) for _ in range(2))

    def result(self):
        A, r, y = self.data()
        return dcd_loss(torch.from_numpy(A), r, y)

    def expected(self):
        A, r, y = self.data()
        found = [np.square(b - A @ v * (v @ b) / (v @ A @ v)).sum() for b, v in zip(r.numpy(), y.numpy())]
        return np.mean(found)

    def refusals(self):
        A, r, y = self.data()
        A = torch.from_numpy(A)
        return [
            (ValueError, "one shape", lambda: dcd_loss(A, r, y[:, 1:])),
            (ValueError, "one shape", lambda: dcd_loss(A, r[0], y[0])),
            (ValueError, "(11, 11)", lambda: dcd_loss(A, r[:, 1:], y[:, 1:])),
        ]


def test_the_loss_and_its_gradient():
    sparse = pytest.importorskip("scipy.sparse", reason="sparse matrices are scipy's")
    case = vectors.load("dcd", "loss")
    coo = case["A"].to_sparse()
    for A in (case["A"], coo, sparse.csr_array(case["A"].numpy()), case["A"].numpy()):
        y = case["y"].clone().requires_grad_()
        loss = dcd_loss(A, case["r"], y)
        loss.backward()
        case.close(loss, "loss")
        case.close(y.grad, "grad_y")
    assert torch.allclose(dcd_loss(coo, case["r"], 7 * case["y"]), case["loss"])
    zeros = torch.zeros(1, 36, dtype=torch.float64)
    assert float(dcd_loss(coo, case["r"][:1], zeros)) == pytest.approx(float(case["r"][:1].square().sum()))
    assert torch.autograd.gradcheck(lambda y: dcd_loss(coo, case["r"], y), case["y"].clone().requires_grad_())


def test_ritz_vectors():
    case = vectors.load("dcd", "ritz")
    k = case.hyperparameters["num_ritz"]
    values, columns = ritz_vectors(case["A"], k, start=case["start"])
    case.close(values, "ritz_values")
    signs = (columns * case["ritz_vectors"]).sum(0).sign()
    case.close(columns * signs, "ritz_vectors")
    ours = ritz_vectors(case["A"].numpy(), k, start=case["start"].numpy())
    assert all(isinstance(part, np.ndarray) for part in ours)
    agrees(ours[0], values, 1e-13)


def test_the_data_are_unit_sums_of_ritz_vectors_that_stress_the_low_ones():
    A = poisson((6, 6))
    w = ritz_vectors(A, 20)[1]
    samples = ritz_dataset(A, 20, 4000, theta=2, low_weight=5.0)
    assert samples.shape == (4000, 36)
    assert np.allclose(np.linalg.norm(samples, axis=1), 1)
    share = np.square(samples @ w).mean(0)
    assert np.allclose(share.sum(), 1)  # nothing outside their span
    assert share[:12].mean() / share[12:].mean() == pytest.approx(25, rel=0.15)
    assert np.array_equal(samples, ritz_dataset(A, 20, 4000, theta=2, low_weight=5.0))
    assert not np.array_equal(samples, ritz_dataset(A, 20, 4000, theta=2, low_weight=5.0, seed=1))


def test_the_null_space_is_left_out():
    line = 2 * np.eye(8) - np.eye(8, k=1) - np.eye(8, k=-1)
    line[0, 0] = line[-1, -1] = 1.0  # Neumann: constants are not in the range
    start = np.arange(8.0) ** 2  # not in the range either
    assert ritz_vectors(line, 8, start=start)[0][0] < 1e-8
    samples = ritz_dataset(torch.from_numpy(line), 8, 50, start=start)
    assert isinstance(samples, torch.Tensor)
    assert float(samples.sum(1).abs().max()) < 1e-10


def test_the_network_of_the_vectors():
    case = vectors.load("dcd", "network_3d")
    net = DCDNet(**case.hyperparameters).double()
    net.load_state_dict({name.removeprefix("param."): t for name, t in case.tensors.items() if name.startswith("param.")})
    case.close(net(case["input"]), "output")


def test_the_network_in_two_dimensions_follows_the_formula():
    torch.manual_seed(0)
    net = DCDNet(2, filters=3, fine_blocks=2, coarse_blocks=1, up_blocks=1).double()
    x = torch.randn(2, 1, 6, 4, dtype=torch.float64)

    def conv(name, h):
        layer = net.get_submodule(name)
        return F.conv2d(F.pad(h, (1, 1, 1, 1)), layer.weight, layer.bias)

    def block(name, h):
        return F.relu(conv(f"{name}.1", F.relu(conv(f"{name}.0", h)))) + h

    skip = F.relu(conv("post", block("fine.1", block("fine.0", F.relu(conv("pre", conv("first", x)))))))
    coarse = skip.view(2, 3, 3, 2, 2, 2).mean((3, 5))
    u = block("up.0", block("coarse.0", coarse).repeat_interleave(2, 2).repeat_interleave(2, 3) + skip)
    want = torch.einsum("bcij,c->bij", u, net.last.weight[0])[:, None] + net.last.bias
    assert torch.allclose(net(x), want, atol=1e-12)
    assert torch.allclose(net.float().bfloat16()(x.bfloat16()).float(), want.float(), atol=0.05)


def test_a_model_reshapes_and_keeps_the_kind_and_the_mode():
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.9))
    nn.init.constant_(net[0].weight, 2.0)
    nn.init.constant_(net[0].bias, 1.0)
    x = np.arange(6.0)
    for model in (as_model(net.train(), (2, 3)), as_model(net.train(), (2, 3), device="cpu")):
        for given in (x, torch.from_numpy(x), torch.from_numpy(x).float()):
            out = model(given)
            assert isinstance(out, type(given))
            assert out.dtype in (np.float64, torch.float64)
            assert np.allclose(out, 2 * x + 1)
    assert net.training
    assert net[1].training
    mask = np.array([[True, False, True], [True, True, False]])
    masked = as_model(net, (2, 3), mask=mask)
    assert masked(np.arange(4.0)).tolist() == [1.0, 3.0, 5.0, 7.0]
    assert masked(x).tolist() == [1.0, 0.0, 5.0, 7.0, 9.0, 0.0]  # solid cells stay 0


def test_rounding_to_float32_does_not_limit_the_residual():
    A = poisson((8, 8))
    torch.manual_seed(0)
    smooth = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.constant_(smooth.weight, 0.1)
    nn.init.constant_(smooth.weight[0, 0, 1, 1], 1.0)
    assert solve_dcd(A, np.ones(64), as_model(smooth, (8, 8)), rtol=1e-12).converged


def test_a_preconditioner_for_scipys_flexible_solver():
    linalg = pytest.importorskip("scipy.sparse.linalg", reason="the solver is scipy's")
    torch.manual_seed(0)
    net = DCDNet(2, filters=2)
    A, b = poisson((6, 6)), np.random.default_rng(0).normal(size=36)
    M = as_preconditioner(net, (6, 6))
    assert np.allclose(M @ (3 * b), 3 * (M @ b))  # of degree 1, as the network alone is not
    assert not (M @ np.zeros(36)).any()
    x, info = linalg.gcrotmk(A, b, M=M, rtol=1e-8, atol=0.0)
    assert info == 0
    assert np.linalg.norm(b - A @ x) <= 1e-7 * np.linalg.norm(b)


@pytest.mark.parametrize("masked", [False, True])
def test_one_step_of_a_trained_network_solves_most_of_a_low_mode(masked):
    mask = np.ones((8, 8), dtype=bool)
    mask[3:5, 2:4] = not masked
    A, seen = poisson((8, 8), mask), []

    def network():
        torch.manual_seed(0)
        return DCDNet(2, filters=8, coarse_blocks=1, up_blocks=1)

    def train(steps):
        how = {"num_ritz": 40, "num_samples": 200, "lr": 1e-2, "decay": 0.1, "mask": mask}
        return train_dcd(A, (8, 8), net=network(), steps=steps, callback=lambda *found: seen.append(found), **how)

    def left(net):
        """Of unseen right-hand sides, after one iteration."""
        model = as_model(net, (8, 8), mask=mask)
        return np.mean([solve_dcd(A, b, model, maxiter=1).residual for b in ritz_dataset(A, 40, 10, seed=9)])

    net = train(80)
    assert net.grid == (8, 8)
    assert not net.training
    assert [step for step, _ in seen] == list(range(1, 81))
    assert left(net) < 0.6
    assert left(network()) > 0.9
    if masked:
        first, second = (list(train(2).parameters()) for _ in range(2))
        assert all(torch.equal(p, q) for p, q in zip(first, second))


def test_wrong_input_is_refused():
    net, A = DCDNet(2, filters=1), poisson((4, 4))
    how = {"num_ritz": 4, "num_samples": 4, "steps": 1}
    refuses(
        [
            (ValueError, "dim", lambda: DCDNet(1)),
            (ValueError, "filters", lambda: DCDNet(2, filters=0)),
            (ValueError, "up_blocks", lambda: DCDNet(2, up_blocks=-1)),
            (ValueError, "side 1 is 5", lambda: net(torch.zeros(1, 1, 4, 5))),
            (ValueError, "(1, 2, 4, 4)", lambda: net(torch.zeros(1, 2, 4, 4))),
            (ValueError, "float32", lambda: as_model(net, (4, 4), dtype=torch.float64)),
            (ValueError, "must have 16 entries; got 15", lambda: as_model(net, (4, 4))(np.ones(15))),
            (ValueError, "1-D", lambda: as_model(net, (4, 4))(np.ones((1, 16)))),
            (ValueError, "mask", lambda: as_model(net, (4, 4), mask=np.ones((4, 3), dtype=bool))),
            (ValueError, "mask", lambda: as_model(net, (4, 4), mask=np.ones((4, 4)))),
            (ValueError, "at least one", lambda: as_model(net, (4, 4), mask=np.zeros((4, 4), dtype=bool))),
            (ValueError, "side 0 of grid", lambda: as_model(net, (0, 4))),
            (ValueError, "keep the shape", lambda: as_model(nn.Conv2d(1, 2, 1), (4, 4))(np.ones(16))),
            (ValueError, "num_ritz", lambda: ritz_vectors(A, 17)),
            (ValueError, "start must have 16", lambda: ritz_vectors(A, 4, start=np.ones(3))),
            (ValueError, "square", lambda: ritz_vectors(A[1:], 4)),
            (ValueError, "low_weight", lambda: ritz_dataset(A, 4, 4, low_weight=0.0)),
            (ValueError, "theta", lambda: ritz_dataset(A, 4, 4, theta=-1)),
            (ValueError, "num_samples", lambda: ritz_dataset(A, 4, 0)),
            (ValueError, "cutoff", lambda: ritz_dataset(A, 4, 4, cutoff=100.0)),
            (ValueError, "15 unknowns, A has 16 rows", lambda: train_dcd(A, (3, 5), **how)),
            (ValueError, "decay", lambda: train_dcd(A, (4, 4), decay=2.0, **how)),
            (ValueError, "steps", lambda: train_dcd(A, (4, 4), **{**how, "steps": 0})),
            (ValueError, "side 0 is 1", lambda: train_dcd(A, (1, 16), **how)),
        ]
    )
