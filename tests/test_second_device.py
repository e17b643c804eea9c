"""Every way to train, and what is done with trained models, on a device other than the CPU.

`second_device` says what that device is and what it has stand-ins for. Each method is attached, trained for a few steps with
what acts beside them, stored, taken back and merged there, and must give the CPU's losses.
"""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lowdim
import tiny
from lowdim.adapters import ATLAS, LoRA
from lowdim.adapters.core.adapted import Adapted
from lowdim.adapters.core.layer import kind_of
from lowdim.catalogue import variants
from lowdim.layers import densify
from lowdim.methods import Applied, apply
from lowdim.optim import GaLore
from methods import busy
from second_device import LAZY, FakeTensorDeviceMismatchError, LazyTensor, numbers, second_device, to_lazy

METHODS = variants()
STEPS = 3
#: Methods whose random numbers on other devices are not the CPU's: INT8 weights are rounded at random there.
OTHER_NUMBERS = {"q-galore"}


class Mixed(nn.Module):
    """An embedding, a convolution and linear layers."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.first = nn.Linear(32, 24)
        self.second = nn.Linear(24, 12)
        self.score = nn.Linear(12, 3)

    def forward(self, input_ids, labels):
        x = self.words(input_ids).unflatten(-1, (4, 4)).movedim(2, 1)  # (batch, 4, length, 4)
        x = torch.tanh(self.first(F.gelu(self.conv(x)).movedim(1, 2).flatten(2)))
        logits = self.score(torch.tanh(self.second(x)).mean(1))
        return SimpleNamespace(loss=F.cross_entropy(logits, labels), logits=logits)


def subject(kind):
    """A model, the name of its head, and a batch, all on the CPU."""
    torch.manual_seed(0)
    ids = torch.randint(3, 20, (9, 8))
    if kind == "llama":
        return tiny.llama(), (), {"input_ids": ids, "labels": ids}
    return Mixed(), ("score",), {"input_ids": ids, "labels": torch.arange(9) % 3}


def loss_of(model, batch):
    return model(**batch).loss


def small(chosen, model, head):
    """The method with small sizes, on every layer of the model that it takes."""
    options = {**chosen.options, **busy(chosen.name)}
    if "update_interval" in options:
        options["update_interval"] = 2  # within three steps
    takes = getattr(chosen.build(), "takes", None) if chosen.target else None
    if takes:
        names = [name for name, layer in model.named_modules() if kind_of(layer) in takes and name not in (*head, "lm_head")]
        options["target_modules"] = names
    return dataclasses.replace(chosen, options=options)


@dataclasses.dataclass
class Run:
    """A model trained for some steps, and what trained it."""

    applied: Applied
    optimizer: torch.optim.Optimizer
    batch: dict
    losses: list

    def step(self):
        losses = self.applied.loss(self.batch, loss_of)
        losses.total.backward()
        self.optimizer.step()
        self.applied.after_step(self.optimizer)
        self.optimizer.zero_grad()
        self.losses += [losses.task.item(), (losses.total - losses.task).item()]

    def logits(self):
        with torch.no_grad():
            return self.applied.model.eval()(**self.batch).logits


def trained(chosen, model, head, batch) -> Run:
    torch.manual_seed(7)
    rate = chosen.rates[0]
    applied = apply(chosen, model.train(), lr=rate, steps=STEPS, head=head, batches=[batch], loss_fn=loss_of)
    applied.model.train()
    run = Run(applied, applied.start(rate), batch, [])
    for _ in range(STEPS):
        run.step()
    return run


def left_on_the_cpu(thing, name=""):
    """Names of the tensors within that are on the CPU; single numbers, such as a count of steps, may be."""
    if isinstance(thing, torch.Tensor):
        return [name] if thing.ndim and not isinstance(thing, LazyTensor) else []
    if isinstance(thing, dict):
        return [found for key, value in thing.items() for found in left_on_the_cpu(value, f"{name}.{key}")]
    if isinstance(thing, (list, tuple)):
        return [found for i, value in enumerate(thing) for found in left_on_the_cpu(value, f"{name}.{i}")]
    return []


def kept(run):
    """All tensors that a run keeps between steps."""
    model = run.applied.model
    yield "parameters", dict(model.named_parameters())
    yield "buffers", dict(model.named_buffers())
    yield "optimizer", dict(enumerate(run.optimizer.state.values()))
    yield "companions", [companion.state_dict() for companion in run.applied.companions]


CASES = [(kind, name) for name in METHODS for kind in ("llama", "mixed") if (kind, name) != ("llama", "linear-probe")]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{name}-{kind}" for kind, name in CASES])
def test_every_method_trains_there_as_on_the_cpu(kind, name, tmp_path):
    model, head, batch = subject(kind)
    chosen = small(METHODS[name], model, head)
    base = copy.deepcopy(model)
    want = trained(chosen, copy.deepcopy(model), head, batch)
    with second_device():
        run = trained(chosen, to_lazy(model), head, to_lazy(batch))
        assert {what: left_on_the_cpu(tensors) for what, tensors in kept(run)} == {what: [] for what, _ in kept(run)}
        tolerance = 1e-2 if name in OTHER_NUMBERS else 1e-4
        assert run.losses == pytest.approx(want.losses, rel=tolerance, abs=1e-6)
        run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        if run.applied.companion is not None:
            run.applied.companion.load_state_dict(copy.deepcopy(run.applied.companion.state_dict()))
        run.step()
        assert {what: left_on_the_cpu(tensors) for what, tensors in kept(run)} == {what: [] for what, _ in kept(run)}
        run.applied.finish()
        said = run.logits()
        assert isinstance(said, LazyTensor)
        if run.applied.adapted is not None:
            folder = run.applied.adapted.save(tmp_path / "adapter")
            loaded = to_lazy(base)
            lowdim.load_adapter(loaded, folder)
            assert torch.allclose(loaded.eval()(**run.batch).logits, said, atol=1e-5)
            plain = run.applied.adapted.merge()
            assert torch.allclose(plain.eval()(**run.batch).logits, said, atol=1e-4)
        elif run.applied.kind == "layer":
            assert torch.allclose(densify(run.applied.model)(**run.batch).logits, said, atol=1e-4)


def test_task_vectors_train_there_as_on_the_cpu():
    """aTLAS, which is trained through its own `adapt` and has no row among the methods."""
    model, _, batch = subject("mixed")
    vectors = [{name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters()} for _ in range(2)]

    def losses(model, vectors, batch):
        adapted = lowdim.adapt(model, ATLAS(vectors))
        optimizer = torch.optim.AdamW(adapted.param_groups(0.1))
        found = []
        for _ in range(STEPS):
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            adapted.step(optimizer)
            optimizer.zero_grad()
            found.append(loss.item())
        assert not isinstance(batch["labels"], LazyTensor) or not left_on_the_cpu(dict(model.named_parameters()))
        return [*found, loss_of(adapted.merge(), batch).item()]

    want = losses(copy.deepcopy(model), vectors, batch)
    with second_device():
        assert losses(to_lazy(model), to_lazy(vectors), to_lazy(batch)) == pytest.approx(want, rel=1e-4)


# What is done with weights and tensors


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))


def rows():
    return torch.randn(80, 12, generator=torch.Generator().manual_seed(5))


def of_lord(model, x):
    from lowdim.compress import LoRDConfig, lord

    return lord(model, LoRDConfig(rank_ratio=0.4), [x])(x)


def of_welore(model, x):
    from lowdim.compress import WeLoreConfig, welore, welore_freeze

    model = welore(model, WeLoreConfig(threshold=0.5, min_reduction=0.0))
    loss = model(x).square().mean()
    return torch.autograd.grad(loss, welore_freeze(model))


def of_pela(model, x):
    from lowdim.compress import PELAConfig, PELAObjective, pela

    config = PELAConfig(compression_ratio=1.5, logit_weight=0.5, feature_modules=("0", "2"))
    student = pela(copy.deepcopy(model), config)
    objective = PELAObjective(model, student, config)
    loss = objective(x, lambda logits: logits.square().mean())
    return [loss.total, *torch.autograd.grad(loss.total, student.parameters())]


def of_lr2vq(model, x):
    from lowdim.compress import LR2VQConfig, lr2vq, lr2vq_tables

    config = LR2VQConfig(codebook_size=6, subvector_size=4, clustering_dim=2, pretrain_steps=2, train_steps=2)
    model = lr2vq(model, config, [x], lambda net, batch: net(batch).square().mean())
    loss = model(x).square().mean()
    return [loss, *torch.autograd.grad(loss, lr2vq_tables(model))]


def of_wina(model, x):
    from lowdim.compress import WINAConfig, wina

    sparse = wina(copy.deepcopy(model), WINAConfig(sparsity=0.4, mask_by="threshold"), [x])
    return [sparse(x), wina(copy.deepcopy(model), WINAConfig(sparsity=0.4))(x)]


def of_delta_product(model, x):
    """Whole, in two halves, step by step, and padded."""
    from lowdim.layers import DeltaProduct

    mixer = DeltaProduct(12, num_heads=2, num_v_heads=4, head_dim=3, expand_v=1.0, chunk_size=4, seed=0, device=x.device)
    x = x.view(2, 40, 12)
    first, state = mixer(x[:, :9], return_state=True)
    token, state = mixer.step(x[:, 9], state)
    last = mixer(x[:, 10:], state)
    padded = mixer(x[:, :6], attention_mask=(torch.arange(6, device=x.device) > 2).expand(2, 6))
    start = mixer(x[:, :5], mixer.initial_state(2))
    loss = sum(y.square().mean() for y in (first, token, last, padded, start))
    return [loss, mixer.transition(x[:, :3]), *torch.autograd.grad(loss, mixer.parameters())]


def of_nm_decay(model, x):
    from lowdim.compress import NMDecayConfig, finalize, nm_decay, step

    model = nm_decay(model, NMDecayConfig(total_steps=3, method="srste", gradient="masked"))
    found = [model(x)]
    for _ in range(2):
        found += torch.autograd.grad(model(x).square().mean(), model.parameters())
        step(model)
    return [*found, finalize(model)(x)]


def of_pst(model, x):
    from lowdim.compress import PSTConfig, finalize, pst, step

    model = pst(model, PSTConfig(total_steps=2, sparsity=0.5, initial_warmup=0.0, final_warmup=0.5))
    found = [model(x)]
    for _ in range(2):
        found += torch.autograd.grad(model(x).square().mean(), [p for p in model.parameters() if p.requires_grad])
        step(model)
    return [*found, finalize(model)(x)]


def of_neumeta(model, x):
    from lowdim.compress import NeuMetaConfig, neumeta, permute_channels

    def build(width):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 4)).to(x.device)

    reference = build(6)
    permute_channels(reference, [[("0.weight", 0), ("0.bias", 0), ("2.weight", 1)]])
    config = NeuMetaConfig(hidden_dim=8, num_layers=2, num_freqs=2, norm=6.0, steps=3)
    batch = (x, torch.arange(len(x), device=x.device) % 4)
    family = neumeta(build, config, [batch], widths=[4, 6], reference=reference)
    return family.sample(5, samples=2)(x)


def of_gbw_bn(model, x):
    """In training and in evaluation, with the step that keeps parameters positive definite, and with any optimizer's."""
    from lowdim.layers import SPDSGD, GBWBatchNorm

    x = x.view(4, 20, 12).mT @ x.view(4, 20, 12) + 0.1 * torch.eye(12, device=x.device)
    norm = GBWBatchNorm(12, theta=0.5, variance_about="mean", device=x.device)
    free = GBWBatchNorm(12, unconstrained=True, device=x.device)
    loss = sum(each(x).square().mean() for each in (norm, norm.eval(), free))
    loss.backward()
    SPDSGD([norm.bias, norm.metric], lr=1e-3).step()
    return [loss, norm.bias, norm.metric, norm.running_mean, norm.running_var, *(p.grad for p in free.parameters())]


def of_householder(model, x):
    """Fresh, from a trained layer, with and without gradients."""
    from lowdim.layers import HouseholderProjector

    fresh = HouseholderProjector(12, 8, rank=3, seed=0, device=x.device)
    trained = HouseholderProjector.from_linear(fresh.to_linear(), rank=2, scale=0.5)
    loss = (fresh(x) + trained(x)).square().mean()
    with torch.no_grad():
        quiet = trained(x)
    return [loss, quiet, trained.directions(), *torch.autograd.grad(loss, [fresh.U, trained.V, trained.bias])]


def of_multigrid(model, x):
    """Clips of another size, sub-batch norm in training and in evaluation, and with other parts."""
    from lowdim.train import SubBatchNorm, resample

    clips = resample(x.view(4, 3, 4, 4, 5), 2, 4, stride=2)
    norm = SubBatchNorm(3, 2, device=x.device)
    loss = norm(clips).pow(3).mean() + norm.eval()(clips).pow(3).mean()
    loss.backward()
    norm.train().set_splits(4)
    return [loss, norm(clips), norm.weight.grad, norm.running_var, norm.split_mean]


def of_s4d(model, x):
    """Whole, in two halves, in chunks, step by step, and padded; the other kernels whole."""
    from lowdim.layers import S4D

    x = x.view(2, 40, 12)
    mixer = S4D(12, 8, init="legs", seed=0, device=x.device)
    first, state = mixer(x[:, :9], return_state=True)
    token, state = mixer.step(x[:, 9], state)
    last = mixer(x[:, 10:], state)
    padded = mixer(x[:, :6], attention_mask=(torch.arange(6, device=x.device) > 2).expand(2, 6))
    start = mixer.linear(x[:, :5], mixer.initial_state(2), chunk_size=2)
    others = [S4D(12, 8, seed=0, device=x.device, **how)(x) for how in ({"disc": "dss"}, {"bidirectional": True})]
    loss = sum(y.square().mean() for y in (first, token, last, padded, start, *others))
    return [loss, mixer.dense_weight(4), *torch.autograd.grad(loss, mixer.parameters())]


def of_spectra(model, x):
    from lowdim.compress import lord_spectra

    return lord_spectra(model, [x])


def of_intruders(model, x):
    from lowdim.diagnose import intruder_dimensions

    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight[0] += 5.0
    return [layer.similarity for layer in intruder_dimensions(model, tuned, k=4).layers.values()]


def of_reduction(model, x):
    from lowdim.diagnose import reduce_intruders

    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight[0] += 5.0
    reduce_intruders(model, tuned, k=4)
    return tuned(x)


def of_scaled_factors(model, x):
    from lowdim.diagnose import scale_intruders_lora

    weight = model[0].weight.detach()
    return scale_intruders_lora(weight, 3 * x[:2], x[:20, :2].contiguous(), scaling=2.0, k=4)


def of_quantized_coordinates(model, x):
    from lowdim.diagnose import quantize_subspace

    return quantize_subspace(x.flatten(), bits=4)


def of_matryoshka_heads(model, x):
    from lowdim.represent import MatryoshkaCrossEntropy, MatryoshkaHead

    found = []
    for efficient in (False, True):
        torch.manual_seed(4)
        head = MatryoshkaHead(12, 5, (3, 6, 12), efficient=efficient).to(x.device)
        target = torch.arange(len(x), device=x.device) % 5
        loss = MatryoshkaCrossEntropy([1.0, 0.5, 2.0])(head(x), target)
        found += [loss, *torch.autograd.grad(loss, head.parameters())]
    return found


def of_matryoshka_embeddings(model, x):
    from lowdim.represent import MatryoshkaEmbeddingLoss

    y = x.detach().requires_grad_()
    loss = MatryoshkaEmbeddingLoss(nn.CosineEmbeddingLoss(), [4, 8, 12])(
        y, x.flip(0), target=torch.ones(len(x), device=x.device)
    )
    return [loss, *torch.autograd.grad(loss, y)]


def of_retrieval(model, x):
    from lowdim.represent import adaptive_retrieve, funnel_retrieve

    two = adaptive_retrieve(x[:9], x, retrieval_dim=4, rerank_dim=12, shortlist=20, k=5)
    many = funnel_retrieve(x[:9], x, retrieval_dim=4, rerank_dims=(8, 12), shortlists=(20, 10))
    return [two.indices, two.distances, many.indices]


def of_stationary_features(model, x):
    from lowdim.represent import DSimplexClassifier, StationaryLoss, compatibility_inequalities, identification_accuracy

    classifier, labels = DSimplexClassifier(13).to(x.device), torch.arange(len(x), device=x.device) % 4
    new = x.detach().requires_grad_()
    loss = StationaryLoss()(classifier(new), classifier.targets(labels), new, x.flip(0))
    old = x.flip(1)
    shares = identification_accuracy(x, labels, old, labels), *compatibility_inequalities(x, old, labels)
    return [loss, *torch.autograd.grad(loss, new), torch.tensor(shares)]


def of_starbucks_scores(model, x):
    from lowdim.represent import nested_whole_word_masks, starbucks_retrieval_loss

    query = torch.stack([x[:4], x[4:8]]).requires_grad_()
    loss = starbucks_retrieval_loss(query, torch.stack([x[8:16], x[16:24]]), (6, 12))
    words = torch.arange(20, device=x.device) // 2
    masks = nested_whole_word_masks(words, order=torch.arange(10, device=x.device).flip(0))
    return [loss, *torch.autograd.grad(loss, query), *(mask.float() for mask in masks)]


def of_cascade(model, x):
    from lowdim.represent import MatryoshkaCascade

    probabilities = x.unflatten(1, (3, 4)).movedim(1, 0).softmax(-1)
    cascade = MatryoshkaCascade((2, 4, 8)).fit(probabilities, torch.arange(len(x), device=x.device) % 4)
    return cascade.predict(probabilities).predictions


def of_episode_features(model, x):
    from lowdim.represent import episode_features

    return list(episode_features(x[:5], x[5:], base_mean=x[0]))


def of_frechet_covariance(model, x):
    from lowdim.represent import FCCovLoss, frechet_cumulative_covariance

    U, y = x[:, :3].detach().requires_grad_(), x[:, 4]
    distances = (y[:, None] - y).abs()
    loss = FCCovLoss()(U, distances)
    return [loss, *torch.autograd.grad(loss, U), frechet_cumulative_covariance(U, distances, return_matrix=True)]


def of_frechet_means(model, x):
    from lowdim.represent import embedding_distances, frechet_one_hot, frechet_predict, frechet_scores

    P = x[:, :6].softmax(1).detach().requires_grad_()
    D = embedding_distances(x[:6])
    found = [D, frechet_scores(P[:, :2], D, [4, 1]), frechet_predict(P, D)]
    for estimator in ("straight_through", "negative", "polytope"):
        one_hot = frechet_one_hot(P, D, estimator=estimator)
        found += [one_hot, *torch.autograd.grad((one_hot * x[:, :6]).sum(), P)]
    return found


def of_label_loci(model, x):
    from lowdim.represent import embedding_distances, label_locus, squared_distance_risk

    D, rows = embedding_distances(x[:8]), torch.arange(3, device=x.device)
    risk = squared_distance_risk(rows, rows.flip(0), D)
    return [*(label_locus(D, rows, method=method) for method in ("lp", "tree")), torch.tensor(risk)]


def of_manifold_linearizing(model, x):
    from lowdim.represent import MLCLoss, TotalCodingRateLoss, membership

    found = []
    for rows in (x, x[:7]):  # more samples than directions, and fewer
        Z = rows.detach().requires_grad_()
        unit = F.normalize(Z, dim=1)
        loss = MLCLoss()(unit, membership(unit)) + TotalCodingRateLoss()(unit, unit.flip(0))
        found += [loss, *torch.autograd.grad(loss, Z)]
    return [*found, membership(F.normalize(x, dim=1), tol=1e-3, iterations=50)]


def of_compressed_factors(model, x):
    from lowdim.linalg import compress_factors

    A, B, error = compress_factors(x[:6], x[:20, :6].contiguous(), 3)
    return [A, B, error]


FUNCTIONS = [value for name, value in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.removeprefix("of_"))
def test_functions_answer_there_as_on_the_cpu(function):
    want = function(net(), rows())
    with second_device():
        got = function(to_lazy(net()), to_lazy(rows()))
    torch.testing.assert_close(numbers(got), want, rtol=1e-4, atol=1e-5)


def test_images_are_certified_there():
    from lowdim.represent import DualRandomizedSmoothing, RandomizedSmoothing, fill_masked

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(24, 3)), torch.rand(2, 1, 4, 6)
    mask = torch.arange(24).view(4, 6) % 3 > 0

    def answers(model, x):
        halves = DualRandomizedSmoothing(model, model, 3, 0.5, masks=(mask, ~mask), fill="maxpool")
        found = [each.certify_all(x, [0, 1], n0=20, n=120) for each in (halves, RandomizedSmoothing(model, 3, 0.5))]
        return [fill_masked(x, mask), *(torch.from_numpy(part) for each in found for part in each)]

    want = answers(model, x)
    with second_device():
        got = answers(to_lazy(model), to_lazy(x))
    torch.testing.assert_close(numbers(got), want)


def test_a_linear_system_is_solved_there():
    from lowdim.solve import DCDNet, as_model, dcd_loss, ritz_dataset, solve_dcd

    torch.manual_seed(0)
    net = DCDNet(2, filters=2, coarse_blocks=1, up_blocks=1)
    line = 2 * torch.eye(4, dtype=torch.float64) - torch.diag(torch.ones(3), 1) - torch.diag(torch.ones(3), -1)
    A = torch.kron(line, torch.eye(4)) + torch.kron(torch.eye(4), line)
    b = torch.arange(16.0, dtype=torch.float64)
    mask = torch.arange(16).view(4, 4) != 5

    def answers(net, A, b):
        masked = as_model(net, (4, 4), mask=mask)(b)
        found = solve_dcd(A, b, as_model(net, (4, 4)), maxiter=3, orth=1)
        return [masked, found.x, torch.tensor(found.residuals), dcd_loss(A, b[None], b.flip(0)[None]), ritz_dataset(A, 6, 2)]

    want = answers(net, A, b)
    with second_device():
        got = answers(to_lazy(net), to_lazy(A), to_lazy(b))
    torch.testing.assert_close(numbers(got), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["srht", "gaussian", "ams", "pooled", "count"])
def test_sketches_are_applied_there(kind):
    from lowdim.linalg import make_sketch

    sketch, x, y = make_sketch(kind, 8, 20), torch.randn(20, 3), torch.randn(8)
    want = [sketch.apply(x), sketch.apply_transposed(y)]
    with second_device():
        got = [sketch.apply(to_lazy(x)), sketch.apply_transposed(to_lazy(y))]
        assert all(isinstance(part, LazyTensor) for part in got)
    torch.testing.assert_close(numbers(got), want)


def test_regression_says_that_it_uses_the_cpu():
    from lowdim.solve import linf_lstsq

    with second_device(), pytest.raises(ValueError, match=r"A must be on the CPU; got lazy:0"):
        linf_lstsq(to_lazy(torch.ones(6, 2)), torch.ones(6))


def test_matrix_completion_says_that_it_uses_the_cpu():
    from lowdim.solve import complete_matrix

    index = torch.arange(6)
    with second_device(), pytest.raises(ValueError, match=r"values must .* on the CPU; got lazy:0"):
        complete_matrix(index % 3, index % 2, to_lazy(torch.ones(6)), (3, 2), 1)


@pytest.mark.skip(reason="torch asks for a module named after the device, torch.lazy, which does not exist")
def test_gradient_checkpointing(): ...


@pytest.mark.skip(reason="tensors of torchao and layers of bitsandbytes need the kernels of a real device")
def test_adapters_over_quantized_weights(): ...


@pytest.mark.skip(reason="FSDP2 shards over processes with a backend for their device; tests/test_two_processes.py has gloo")
def test_sharded_parameters(): ...


# The device itself


def test_it_refuses_what_a_gpu_refuses():
    with second_device():
        there, here = torch.ones(3, 3, device=LAZY), torch.ones(3, 3)
        for mix in (
            lambda: there @ here,
            lambda: torch.cat([there, here]),
            lambda: torch.equal(there, here),
            lambda: torch.where(here > 0, there, 0.0),
            lambda: there.masked_select(here > 0),
            lambda: here.add_(there),
            lambda: torch.zeros(()).add_(there.sum()),
            lambda: F.embedding(torch.tensor([0, 1]), there),
            lambda: setattr(nn.Parameter(there), "data", here),
            lambda: torch.randn(3, device=LAZY, generator=torch.Generator()),
            lambda: here.normal_(generator=torch.Generator(LAZY)),
        ):
            with pytest.raises(FakeTensorDeviceMismatchError):
                mix()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()


def test_it_takes_what_a_gpu_takes():
    with second_device():
        there, here = torch.ones(3, 3, device=LAZY), torch.arange(9.0).view(3, 3)
        assert (there * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 3, "one number on the CPU"
        assert there.copy_(here).tolist() == here.tolist(), "copies across"
        assert there[torch.tensor([2, 0])].tolist() == here[[2, 0]].tolist(), "an index on the CPU"
        assert type(there.cpu()) is torch.Tensor
        assert torch.equal(there.cpu(), here)
        there[0].zero_()  # a view
        assert there.tolist() == [[0.0] * 3, *here[1:].tolist()]
        drawn = [
            torch.randn(3, device=place, generator=torch.Generator(place).manual_seed(1)).tolist() for place in (LAZY, "cpu")
        ]
        assert drawn[0] == drawn[1]


class TestATensorLeftOnTheCPUIsFound:
    """Faults planted in a method, one at a time: the comparison above must fail with each."""

    def run(self, name):
        """The names of tensors left on the CPU, if the run gets that far."""
        model, head, batch = subject("mixed")
        with second_device():
            run = trained(small(METHODS[name], model, head), to_lazy(model), head, to_lazy(batch))
            return [found for _, tensors in kept(run) for found in left_on_the_cpu(tensors)]

    def test_nothing_is_found_without_a_fault(self):
        assert self.run("lora") == self.run("galore") == []

    def test_a_parameter_of_an_adapter(self, monkeypatch):
        blank = LoRA.blank
        monkeypatch.setattr(LoRA, "blank", lambda *args, device, **keywords: blank(*args, device="cpu", **keywords))
        with pytest.raises(FakeTensorDeviceMismatchError):
            self.run("lora")

    def test_a_buffer_that_is_drawn_without_a_device(self, monkeypatch):
        def initialise(method, update, weight, stats, generator):
            update.register_buffer("noise", torch.randn(4))
            update.A.normal_()
            update.B.zero_()

        monkeypatch.setattr(LoRA, "initialise", initialise)
        assert {".words.update.noise", ".conv.update.noise", ".first.update.noise"} <= set(self.run("lora"))

    def test_a_generator_of_the_cpu(self, monkeypatch):
        monkeypatch.setattr(
            LoRA, "initialise", lambda method, update, weight, stats, generator: update.A.normal_(generator=generator)
        )
        with pytest.raises(FakeTensorDeviceMismatchError):
            self.run("lora")

    def test_what_acts_between_the_steps(self, monkeypatch):
        def step(adapted, optimizer=None):
            for p in adapted.trainable().values():
                p.data.mul_(torch.full(p.shape, 0.5))

        monkeypatch.setattr(Adapted, "step", step)
        with pytest.raises(FakeTensorDeviceMismatchError):
            self.run("lora")

    def test_the_state_of_an_optimizer(self, monkeypatch):
        step = GaLore.step

        def forgetful(optimizer, closure=None):
            step(optimizer, closure)
            for state in optimizer.state.values():
                state["mean"] = torch.zeros(3)

        monkeypatch.setattr(GaLore, "step", forgetful)
        assert len(self.run("galore")) == len(list(Mixed().parameters()))
