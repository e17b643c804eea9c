"""Compression, layers, diagnostics and products of matrices answer on a device other than the CPU."""

import copy

import pytest
import torch
from torch import nn

from second_device import LazyTensor, numbers, second_device, to_lazy
from second_device_answers import answers_there_as_on_the_cpu


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


def of_compressed_factors(model, x):
    from lowdim.linalg import compress_factors

    A, B, error = compress_factors(x[:6], x[:20, :6].contiguous(), 3)
    return [A, B, error]


FUNCTIONS = [value for name, value in list(globals().items()) if name.startswith("of_")]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__.removeprefix("of_"))
def test_functions_answer_there_as_on_the_cpu(function):
    answers_there_as_on_the_cpu(function)


@pytest.mark.parametrize("kind", ["srht", "gaussian", "ams", "pooled", "count"])
def test_sketches_are_applied_there(kind):
    from lowdim.linalg import make_sketch

    sketch, x, y = make_sketch(kind, 8, 20), torch.randn(20, 3), torch.randn(8)
    want = [sketch.apply(x), sketch.apply_transposed(y)]
    with second_device():
        got = [sketch.apply(to_lazy(x)), sketch.apply_transposed(to_lazy(y))]
        assert all(isinstance(part, LazyTensor) for part in got)
    torch.testing.assert_close(numbers(got), want)
