"""Models that PST prunes while they are tuned: what is trained, reports, runs, and checkpoints on the way."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lowdim.compress import PSTConfig, SparseTraining, finalize, last_report, pst, step

SIX = {"weight_U", "weight_V", "mask_scores_A", "mask_scores_B", "mask_scores_R", "mask_scores_C"}


def test_what_is_trained():
    """U and A have no gradient at the first step, since V and B are 0; afterwards all six do, and nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    bias, x = model[0].bias, torch.randn(16, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pst(model, PSTConfig(total_steps=4, target_modules=["0"]))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"0.{name}" for name in SIX}
    assert model[0].bias is bias
    assert torch.equal(model(x), F.linear(torch.tanh(F.linear(x, before["0.weight"], bias)), model[2].weight, model[2].bias))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for later in (False, True):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        moved = {name for name in SIX if bool(model[0].get_parameter(name).grad.any())}
        assert moved == (SIX if later else SIX - {"weight_U", "mask_scores_A"})
        optimizer.step()
        step(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if name in before)


def test_layers_are_prepared_one_after_the_other():
    """A second call leaves the first one's layers training; a layer is not prepared twice."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    pst(model, PSTConfig(total_steps=4, target_modules=["0"]))
    pst(model, PSTConfig(total_steps=4, sparsity=0.5, target_modules=["1"]))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{i}.{name}" for i in (0, 1) for name in SIX}
    for how in ({"target_modules": ["2", "1"]}, {}):
        with pytest.raises(ValueError, match=r"layer [01] is a PST layer already; call lowdim.compress.finalize"):
            pst(model, PSTConfig(total_steps=4, **how))
    assert type(model[2]) is nn.Linear


def test_the_report_has_the_zeros_and_what_was_dropped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    with torch.no_grad():
        model[0].weight[:5] = 0
    pst(model, PSTConfig(total_steps=1, sparsity=0.6, initial_sparsity=0.5))
    with torch.no_grad():
        model[2].weight_V.normal_()
    whole = model[2].weight.detach() + model[2].weight_U.detach() @ model[2].weight_V.detach()
    final = finalize(model)[2].weight.detach()
    report = last_report(model)
    assert [(row.name, row.before, row.after, row.what) for row in report.layers] == [
        ("0", 50, 60, "60 % zeros"),
        ("2", 0, 24, "60 % zeros"),
    ]
    assert report.layers[1].relative_error == pytest.approx(float((whole - final).norm() / whole.norm()))
    assert "PST: 2 layers replaced" in report.summary
    assert "50 -> 84 zeros" in report.summary


def test_a_pruned_model_stays_pruned():
    """Plain fine-tuning fills the zeros in, PST keeps as many: what `initial_sparsity` is for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    with torch.no_grad():
        weight = model[0].weight
        weight *= (weight.abs() >= weight.abs().flatten().sort().values[128]).float()
    pst(model, PSTConfig(total_steps=6, sparsity=0.5, initial_sparsity=0.5, target_modules=["0"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    companion = SparseTraining(model, optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
        companion.step(optimizer)
        assert int((model[0].dense_weight() == 0).sum()) == 128
    companion.finish()
    assert int((model[0].weight == 0).sum()) == 128


def test_a_run_prunes_and_trains_the_head(tmp_path):
    """The length of the schedule is that of the training; the six tensors and the new head are trained."""
    from lowdim import models
    from lowdim.surgery import find_layers, is_linear
    from lowdim.train.recipes import Recipe
    from lowdim.train.run import run_recipe

    (tmp_path / "text.txt").write_text((models.assets() / "shakespeare" / "sample.txt").read_text()[:4000])
    how = {"steps": 6, "batch_size": 4, "max_length": 16, "limit": 48, "method": "pst", "lr": 1e-3}
    how["options"] = {"sparsity": 0.5, "weight_rank": 2, "mask_rank": 2}
    run = run_recipe(
        Recipe(model="stories260k", task="causal-lm", data=[str(tmp_path / "text.txt")], out=str(tmp_path / "out"), **how)
    )
    before = models.load_model("stories260k", "causal-lm")
    layers = find_layers(before, accept=is_linear)
    assert run["trained_parameters"] == sum(5 * sum(layer.weight.shape) for layer in layers.values())
    after = models.load_model(str(tmp_path / "out" / "model"), "causal-lm")
    for name, layer in layers.items():
        new = after.get_submodule(name)
        assert type(new) is nn.Linear
        assert int((new.weight == 0).sum()) == layer.weight.numel() // 2, name
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {f"{name}.weight" for name in layers}


def test_a_checkpoint_of_an_unfinished_model_trains_the_same(tmp_path):
    """Through transformers: the same outputs, and the same parameters trained."""
    pytest.importorskip("transformers")
    import tiny
    from lowdim.pretrained import save_compressed

    model = tiny.llama()
    pst(model, PSTConfig(total_steps=4, sparsity=0.5, weight_rank=2, mask_rank=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("weight_V"):
                p.normal_(std=0.1)
    for _ in range(2):
        step(model)
    save_compressed(model, tmp_path / "half")
    again = type(model).from_pretrained(tmp_path / "half")
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    trained = [{name for name, p in net.named_parameters() if p.requires_grad} for net in (model, again)]
    assert trained[0] == trained[1]
    assert trained[0]
    layer = again.model.layers[0].self_attn.q_proj
    assert (layer.finished, layer.sparsity) == (2, model.model.layers[0].self_attn.q_proj.sparsity)
