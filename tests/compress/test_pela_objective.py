"""The intermediate stage of PELA: what the objective is, and what it does to the two models."""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tiny
import vectors
from lowdim.compress import LowRankLinear, PELAConfig, PELAObjective, load_compressed, pela, perturbation_loss
from lowdim.linalg import stream

objective_module = importlib.import_module("lowdim.compress.pela.objective")


class Block(nn.Sequential):
    """`x + W2 gelu(W1 x)`."""

    def forward(self, x):
        return x + super().forward(x)


class Net(nn.Module):
    def __init__(self, in_features=6, hidden=12, classes=11, depth=2, dtype=torch.float64):
        super().__init__()
        self.stem = nn.Linear(in_features, hidden, dtype=dtype)
        self.blocks = nn.ModuleList(
            Block(nn.Linear(hidden, 2 * hidden, dtype=dtype), nn.GELU(), nn.Linear(2 * hidden, hidden, dtype=dtype))
            for _ in range(depth)
        )
        self.head = nn.Linear(hidden, classes, dtype=dtype)
        for name, p in self.named_parameters():
            p.data.copy_(torch.randn(p.shape, dtype=dtype, generator=stream(0, name)) * p.shape[-1] ** -0.5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def couple(config=None, **options):
    """A teacher, its factorized copy, and the objective."""
    config = config or PELAConfig(**options)
    teacher = Net()
    student = pela(copy.deepcopy(teacher), config)
    return teacher, student, PELAObjective(teacher, student, config)


def samples(rows=5):
    return torch.randn(rows, 6, dtype=torch.float64, generator=stream(1, "x"))


# The formula


def test_reference_objective():
    v = vectors.load("pela", "objective")
    how = v.hyperparameters
    teacher, student = Net(), Net()
    teacher.load_state_dict({n.removeprefix("teacher."): t for n, t in v.tensors.items() if n.startswith("teacher.")})
    load_compressed(student, {n.removeprefix("student."): t for n, t in v.tensors.items() if n.startswith("student.")})
    assert [n for n, m in student.named_modules() if isinstance(m, LowRankLinear)] == how["compressed"]
    weights = {name: how[name] for name in ("feature_weight", "logit_weight", "perturbation_weight", "perturbation_eps")}
    objective = PELAObjective(teacher, student, PELAConfig(compression_ratio=how["compression_ratio"], **weights))
    assert objective.feature_modules == ("blocks.0", "blocks.1")
    loss = objective(v["x"], lambda logits: F.cross_entropy(logits, v["target"]))
    for name in ("task", "feature", "logit", "perturbation", "total"):
        v.close(getattr(loss, name), name)
    assert loss.to_dict() == pytest.approx({n: float(v[n]) for n in ("total", "task", "feature", "logit", "perturbation")})
    loss.total.backward()
    for name in how["compressed"]:
        for factor in "AB":
            v.close(student.get_submodule(name).get_parameter(factor).grad, f"grad.{name}.{factor}")


def test_the_terms_on_numbers_of_its_own():
    teacher, student, objective = couple(
        compression_ratio=3, feature_weight=0.7, logit_weight=0.3, perturbation_weight=2.0, perturbation_eps=0.05
    )
    x, target = samples(), torch.arange(5)

    def stream_of(model):
        h, outputs = model.stem(x), []
        for block in model.blocks:
            h = h + block[2](F.gelu(block[0](h)))
            outputs.append(h)
        return outputs, model.head(h)

    (ours, logits), (theirs, aim) = stream_of(student), stream_of(teacher)
    feature = sum((a - b).square().mean() for a, b in zip(ours, theirs)) / 2
    layers = ["stem", "blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    changes = [
        (student.get_submodule(n).B @ student.get_submodule(n).A - teacher.get_submodule(n).weight).abs().max() for n in layers
    ]
    perturbation = sum((change - 0.05) ** 2 for change in changes) / 5
    logit, task = (logits - aim).square().mean(), F.cross_entropy(logits, target)
    loss = objective(x, lambda out: F.cross_entropy(out, target))
    for got, want in (
        (loss.feature, feature),
        (loss.logit, logit),
        (loss.perturbation, perturbation),
        (loss.task, task),
        (loss.total, task + 0.7 * feature + 0.3 * logit + 2.0 * perturbation),
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(loss.output, student(x))


def test_terms_of_weight_zero_are_zero_and_not_computed(monkeypatch):
    teacher, _, objective = couple(feature_weight=0.0, perturbation_weight=0.0)

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(objective_module, "perturbation_loss", never)
    monkeypatch.setattr(teacher, "forward", never)
    loss = objective(samples(), lambda logits: logits.sum())
    assert loss.to_dict() | {"total": 0, "task": 0} == dict.fromkeys(loss.to_dict(), 0.0)
    assert loss.total == loss.task
    assert objective(samples()).total == 0


# The largest change of a weight


def low_rank(out=7, inn=5, rank=2, alpha=None, seed=0):
    draw = stream(seed, "pair")
    A, B = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in ((rank, inn), (out, rank)))
    return LowRankLinear.from_factors(A, B, alpha=alpha), torch.randn(out, inn, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("entries", [1, 11, 2**22])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_in_blocks_of_rows_as_from_the_whole_product(entries, alpha, monkeypatch):
    monkeypatch.setattr(objective_module, "_ENTRIES", entries)
    pairs = [low_rank(alpha=alpha, seed=i, out=5 + i) for i in range(4)]
    got = perturbation_loss(pairs, 0.3)
    scale = 1.0 if alpha is None else alpha / 2
    want = sum(((scale * layer.B @ layer.A - weight).abs().max() - 0.3) ** 2 for layer, weight in pairs) / 4
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    factors = [p for layer, _ in pairs for p in (layer.A, layer.B)]
    for one, two in zip(torch.autograd.grad(got, factors), torch.autograd.grad(want, factors)):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_the_gradient_goes_through_one_entry():
    layer, weight = low_rank()
    change = (layer.B @ layer.A - weight).detach()
    row, column = divmod(int(change.abs().argmax()), 5)
    perturbation_loss([(layer, weight)], 0.0).backward()
    assert layer.B.grad.abs().sum(1).nonzero().tolist() == [[row]]
    assert layer.A.grad.abs().sum(0).nonzero().tolist() == [[column]]
    assert not weight.requires_grad


@pytest.mark.parametrize(("eps", "direction"), [(0.0, -1), (100.0, 1)])
def test_the_largest_change_is_pulled_towards_eps_from_both_sides(eps, direction):
    layer, weight = low_rank()
    before = (layer.B @ layer.A - weight).detach().abs().max()
    perturbation_loss([(layer, weight)], eps).backward()
    with torch.no_grad():
        for p in (layer.A, layer.B):
            p.sub_(1e-4 * p.grad)
    assert ((layer.B @ layer.A - weight).abs().max() - before) * direction > 0


def test_half_precision_is_compared_in_float32():
    layer, weight = low_rank()
    half = copy.deepcopy(layer).bfloat16()
    got = perturbation_loss([(half, weight.bfloat16())], 0.1)
    want = ((half.B.double() @ half.A.double() - weight.bfloat16().double()).abs().max() - 0.1) ** 2
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(want.item(), rel=1e-5)


# What it does to the two models


def test_the_teacher_is_frozen_and_the_student_left_alone():
    teacher, student = Net().train(), Net().train()
    pela(student, PELAConfig())
    objective = PELAObjective(teacher, student)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert all(module.training for module in student.modules())
    keys = set(student.state_dict())
    objective(samples()).total.backward()
    assert set(student.state_dict()) == keys
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (teacher, student) for m in model.modules())


def test_the_stage_brings_the_student_nearer_to_the_teacher():
    teacher, student, objective = couple(compression_ratio=2)
    x = torch.randn(256, 6, dtype=torch.float64, generator=stream(2, "x"))

    def distance():
        return float((student(x) - teacher(x)).square().mean().detach())

    before = distance()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for _ in range(60):
        objective(x).total.backward()  # no labels
        optimizer.step()
        optimizer.zero_grad()
    assert distance() < 0.7 * before


def test_hooks_are_gone_after_an_error():
    teacher, student, objective = couple()
    with pytest.raises(ValueError, match="6 features"):
        objective(torch.zeros(2, 9, dtype=torch.float64))
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (teacher, student) for m in model.modules())


# Models of transformers


def language_models(**options):
    teacher = tiny.llama(2).eval()
    config = PELAConfig(compression_ratio=2, **options)
    student = pela(copy.deepcopy(teacher), config)
    return teacher, student, PELAObjective(teacher, student, config)


def ids(rows=3):
    return torch.randint(3, 40, (rows, 8), generator=torch.Generator().manual_seed(1))


def test_the_blocks_of_a_transformer_are_found():
    _, _, objective = language_models()
    assert objective.feature_modules == ("model.layers.0", "model.layers.1")


def test_labels_and_other_columns_are_not_passed_on():
    teacher, student, objective = language_models(logit_weight=0.5)
    plain = objective({"input_ids": ids()})
    other = objective({"input_ids": ids(), "labels": ids(), "text": ["a", "b", "c"], "score": torch.ones(3)})
    assert other.to_dict() == plain.to_dict()
    assert other.output.loss is None
    difference = (student(ids()).logits - teacher(ids()).logits).square().mean()
    assert float(plain.logit) == pytest.approx(float(difference), rel=1e-6)
    mask = torch.ones_like(ids())
    mask[:, :3] = 0
    assert objective({"input_ids": ids(), "attention_mask": mask}).to_dict() != plain.to_dict()


def test_trainer_with_three_lines(tmp_path):
    transformers = pytest.importorskip("transformers")
    teacher, student, objective = language_models()

    class Stage(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss_of, labels = student.loss_function, inputs["labels"]
            loss = objective(inputs, lambda logits: loss_of(logits, labels, student.config.vocab_size), model=model)
            return (loss.total, loss.output) if return_outputs else loss.total

    rows = [{"input_ids": row, "labels": row, "source": torch.tensor(i)} for i, row in enumerate(ids(8))]
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=6, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, remove_unused_columns=False, save_strategy="no", label_names=["labels"],
    )  # fmt: skip
    weight = teacher.model.embed_tokens.weight.clone()
    trainer = Stage(student, args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert torch.equal(teacher.model.embed_tokens.weight, weight)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_wrapper_that_is_trained_is_the_one_that_is_called():
    _, student, objective = couple()
    calls = []

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            calls.append(len(x))
            return self.module(x)

    want = objective(samples())
    assert objective(samples(), model=Wrapper(student)).to_dict() == want.to_dict()
    assert calls == [5]


def test_half_precision_models():
    torch.manual_seed(0)
    teacher = Net(dtype=torch.float32).bfloat16()
    config = PELAConfig(compression_ratio=2, logit_weight=1.0)
    student = pela(copy.deepcopy(teacher), config)
    loss = PELAObjective(teacher, student, config)(samples().bfloat16())
    assert {getattr(loss, n).dtype for n in ("feature", "logit", "perturbation", "total")} == {torch.float32}
    loss.total.backward()
    assert {p.grad.dtype for p in student.parameters() if p.grad is not None} == {torch.bfloat16}


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_gradient_checkpointing(reentrant):
    """The outputs of whole blocks have gradients; what is inside a reentrant one has none, which is said."""
    grads = []
    for net in (Net, Checkpointed):
        teacher = net()
        teacher.reentrant = reentrant
        student = pela(copy.deepcopy(teacher), PELAConfig())
        PELAObjective(teacher, student)(samples()).total.backward()
        grads.append([p.grad for p in student.parameters() if p.grad is not None])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-12, atol=1e-12)
    inside = PELAObjective(teacher, student, PELAConfig(feature_modules=("blocks.0.1", "blocks.1")))
    if not reentrant:
        inside(samples())
        return
    with pytest.warns(UserWarning, match=r"feature module blocks\.0\.1 of the student gives no gradient.*use_reentrant=False"):
        inside(samples())
    inside(samples())  # said once


# Wrong input


def test_wrong_models():
    teacher = Net()
    with pytest.raises(ValueError, match="teacher and student are one model; factorize a copy"):
        PELAObjective(teacher, teacher)
    with pytest.raises(ValueError, match=r"student has no low-rank layer that is dense in the teacher \(Net\)"):
        PELAObjective(teacher, Net())
    student = pela(Net(depth=3), PELAConfig())
    with pytest.raises(ValueError, match=r"layer blocks\.2\.0 is low-rank in the student, and the teacher has no such module"):
        PELAObjective(teacher, student)
    other = Net()
    other.stem = nn.Identity()
    with pytest.raises(ValueError, match="layer stem is low-rank in the student, and the teacher has a Identity there"):
        PELAObjective(other, pela(Net(), PELAConfig()))
    thin = pela(Net(), PELAConfig())
    with pytest.raises(ValueError, match="no low-rank layer that is dense in the teacher"):
        PELAObjective(thin, copy.deepcopy(thin))


def test_wrong_feature_modules():
    teacher = Net()
    student = pela(copy.deepcopy(teacher), PELAConfig())
    with pytest.raises(ValueError, match=r"feature_modules: 'block\.0' is not a module of the teacher; nearest: blocks\.0"):
        PELAObjective(teacher, student, PELAConfig(feature_modules=["block.0"]))
    student.extra = nn.Identity()
    with pytest.raises(ValueError, match="'extra' is not a module of the teacher"):
        PELAObjective(teacher, student, PELAConfig(feature_modules=["extra"]))
    flat = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    thin = pela(copy.deepcopy(flat), PELAConfig())
    with pytest.raises(ValueError, match=r"feature_modules must be given: Sequential has no nn\.ModuleList .*feature_weight=0"):
        PELAObjective(flat, thin)
    assert PELAObjective(flat, thin, PELAConfig(feature_weight=0.0)).feature_modules == ()


def test_a_model_without_logits():
    teacher = tiny.llama(1).eval().model
    config = PELAConfig(compression_ratio=2)
    student = pela(copy.deepcopy(teacher), config)
    objective = PELAObjective(teacher, student, config)
    assert float(objective({"input_ids": ids()}).feature) > 0  # features need none
    with pytest.raises(TypeError, match="LlamaModel returns a BaseModelOutputWithPast without logits"):
        objective({"input_ids": ids()}, lambda logits: logits.sum())


def test_wrong_pairs():
    with pytest.raises(ValueError, match="pairs must hold at least one low-rank layer"):
        perturbation_loss([], 0.1)
    layer, weight = low_rank()
    with pytest.raises(ValueError, match=r"the dense weight must have shape \(7, 5\); got \(5, 7\)"):
        perturbation_loss([(layer, weight.T)], 0.1)
    with pytest.raises(ValueError, match="eps must be a finite number"):
        perturbation_loss([(layer, weight)], -1.0)
