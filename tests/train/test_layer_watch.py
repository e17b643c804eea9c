"""What a watch measures of layers while they train: the formulas, what it watches, resume, and the trainer's callback."""

import copy
import json

import pytest
import torch
from torch import nn

import lowdim
from lowdim.adapters import LoRA
from lowdim.diagnose import farms, intruder_dimensions
from lowdim.errors import CheckpointError, NoMatchingModuleError
from lowdim.testing.agreement import refuses
from lowdim.train import LayerWatch
from lowdim.train.layer_watch import NothingToWatchError


def decaying(out, size, seed=0):
    """A weight with singular values 1, 1/2, 1/3, …: its directions are well apart."""
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(out, min(out, size), generator=g)).Q
    v = torch.linalg.qr(torch.randn(size, min(out, size), generator=g)).Q
    return u / torch.arange(1, min(out, size) + 1) @ v.T


def net():
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 4))
    with torch.no_grad():
        for i, layer in enumerate((model[0], model[2])):
            layer.weight.copy_(decaying(*layer.weight.shape, seed=i))
    return model


def trained(model, watch, steps, optimizer=None):
    g = torch.Generator().manual_seed(watch.count)
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(steps):
        x = torch.randn(16, 24, generator=g)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        watch.step(optimizer)


def test_a_planted_direction_is_one_intruder():
    model = net()
    watch = LayerWatch(model, k=5, interval=1)
    weight = model[0].weight.detach().clone()
    base = torch.linalg.svd(weight, full_matrices=True)
    outside = base.U[:, 30:31]  # orthogonal to all 24 directions of the start
    with torch.no_grad():
        model[0].weight += 10 * outside @ base.Vh[:1]
    row = watch.step()
    assert row["layers"]["0"]["intruders"] == 1
    assert row["layers"]["2"] == {**watch.history[0]["layers"]["2"], "overlap": pytest.approx(1.0, abs=1e-6)}
    assert row["intruders"] == 0.5
    assert row["layers"]["0"]["overlap"] == pytest.approx(0.8, abs=0.05), "the four strongest directions are still among five"


def test_a_direction_of_the_start_that_becomes_the_strongest_is_no_intruder():
    model = net()
    watch, few = LayerWatch(model, k=3, interval=1), LayerWatch(model, k=3, kept=3, interval=1)
    u, _, vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    with torch.no_grad():
        model[0].weight += 5 * u[:, 9:10] @ vh[9:10]
    assert watch.step()["layers"]["0"]["intruders"] == 0
    assert few.step()["layers"]["0"]["intruders"] == 1, "as documented: it is not among the three that are kept"


def test_overlap_is_the_mean_squared_cosine():
    model = nn.Sequential(nn.Linear(6, 8))
    angles = torch.tensor([0.3, 1.1])
    frame, s = torch.eye(8), torch.tensor([9.0, 4.0, 0.5, 0.4, 0.3, 0.2])
    with torch.no_grad():
        model[0].weight.copy_(frame[:, :6] * s)
    watch = LayerWatch(model, k=2, interval=1, min_eigs=2)
    turned = frame.clone()
    for j, angle in enumerate(angles):  # u_j turns towards a direction that the start lacks
        turned[:, j] = angle.cos() * frame[:, j] + angle.sin() * frame[:, 6 + j]
    with torch.no_grad():
        model[0].weight.copy_(turned[:, :6] * s)
    found = watch.step()["layers"]["0"]
    assert found["overlap"] == pytest.approx(float(angles.cos().square().mean()), abs=1e-5)
    assert found["intruders"] == int((angles.cos() < 0.5).sum()) == 1


def test_numbers_are_those_of_the_diagnostics():
    model = net()
    start = copy.deepcopy(model)
    watch = LayerWatch(model, k=6, interval=3, threshold=0.9, rows=12, windows=3, layers=["0", "2"])
    trained(model, watch, 3)
    alphas = farms(model, rows=12, windows=3, exclude=()).alphas
    compared = intruder_dimensions(start, model, k=6, threshold=0.9).layers
    assert sum(compared[f"{name}.weight"].count for name in watch.layers) > 0
    for name, found in watch.history[-1]["layers"].items():
        same = compared[f"{name}.weight"]
        assert found["alpha"] == alphas[f"{name}.weight"]
        assert found["intruders"] == same.count
        assert found["overlap"] == pytest.approx(float(same.overlap[:6, :6].square().sum()) / 6, abs=1e-5)
    row = watch.history[-1]
    for key in ("alpha", "intruders", "overlap"):
        assert row[key] == pytest.approx(sum(each[key] for each in row["layers"].values()) / 2)


def test_an_adapters_effective_weight_is_measured():
    model = net()
    adapted = lowdim.adapt(model, LoRA(rank=2, target_modules=["2"]))
    watch = LayerWatch(model, k=5, interval=4, rows=12)
    assert watch.layers == ["2"]
    trained(model, watch, 4)
    merged = {"2": adapted.merge()[2].weight.detach()}
    assert watch.history[-1]["layers"]["2"]["alpha"] == pytest.approx(farms(merged, rows=12).layers[0].alpha, abs=1e-5)
    assert watch.history[-1]["overlap"] < 1.0


def test_an_adapter_of_peft_is_measured():
    peft = pytest.importorskip("peft", reason="adapters of PEFT are tested where it is installed")
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["2"]))
    watch = LayerWatch(model, k=5, interval=4, rows=12)
    assert watch.layers == ["2"]
    trained(model, watch, 4)
    merged = {"2": model.merge_and_unload()[2].weight.detach()}
    assert watch.history[-1]["layers"]["2"]["alpha"] == pytest.approx(farms(merged, rows=12).layers[0].alpha, abs=1e-5)


@pytest.mark.parametrize("large", [False, True])
def test_an_unchanged_layer_has_not_turned(large):
    """Above 512 directions are sketched: with the same draws each time."""
    model = nn.Sequential(nn.Linear(*((520, 600) if large else (24, 32))))
    watch = LayerWatch(model, interval=1, windows=1, rows=16)
    torch.randn(3)
    row = watch.step()
    assert row == {**watch.history[0], "step": 1, "overlap": row["overlap"], "layers": row["layers"]}
    assert row["overlap"] == pytest.approx(1.0, abs=1e-5)


def test_a_weight_of_low_rank_has_no_exponent_and_no_arbitrary_directions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(32, 4) @ torch.randn(4, 24))
    watch = LayerWatch(model, interval=1, k=10)
    assert watch.history[0]["alpha"] is None
    with torch.no_grad():
        model[0].weight += 1e-7 * torch.randn(32, 24)  # turns what is no direction of the weight
    row = watch.step()
    assert row["intruders"] == 0
    assert row["overlap"] == pytest.approx(1.0, abs=1e-4)
    json.dumps(watch.history, allow_nan=False)


def test_what_is_watched_and_what_is_left_out():
    model = net()
    watch = LayerWatch(model, k=5)
    assert watch.layers == ["0", "2"]
    assert watch.left_out == {"4": "its smaller side is 4, and k=5 directions need more"}
    model[0].weight.requires_grad_(False)
    assert LayerWatch(model, k=5).layers == ["2"], "a bias alone does not change the weight"
    assert LayerWatch(model, k=5, layers=["0"]).layers == ["0"]
    many = nn.Sequential(*(nn.Linear(16, 16) for _ in range(9)))
    some = LayerWatch(many, k=5, max_layers=3)
    assert some.layers == ["0", "4", "8"]
    assert some.left_out["1"] == "3 of 9 layers are measured (max_layers)"
    with torch.no_grad():
        many[3].weight.zero_()
    assert LayerWatch(many, k=5).left_out == {"3": "every entry is 0"}


def test_what_a_watch_refuses():
    model = net()
    broken = net()
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    frozen = net().requires_grad_(False)
    refuses(
        [
            (ValueError, "interval must be an int >= 1; got 0", lambda: LayerWatch(model, interval=0)),
            (ValueError, "max_layers must be an int >= 1", lambda: LayerWatch(model, max_layers=0)),
            (ValueError, "kept must be an int >= 10; got 4", lambda: LayerWatch(model, kept=4)),
            (ValueError, "threshold", lambda: LayerWatch(model, threshold=0.0)),
            (NoMatchingModuleError, "'body' matches no module", lambda: LayerWatch(model, layers=["body"])),
            (TypeError, "LayerWatch has no option 'row' (nearest: rows", lambda: LayerWatch(model, row=3)),
            (ValueError, "layer 2: the weight has NaN or infinite entries", lambda: LayerWatch(broken, k=5)),
            (NothingToWatchError, "no layer to watch: no linear layer besides", lambda: LayerWatch(frozen, k=5)),
            (
                NothingToWatchError,
                "0: 24 eigenvalues, fewer than min_eigs=30",
                lambda: LayerWatch(model, k=5, min_eigs=30, windows=1),
            ),
            (NothingToWatchError, "0: its smaller side is 24, and k=30", lambda: LayerWatch(model, k=30)),
        ]
    )
    watch = LayerWatch(model, k=5, interval=2)
    watch.step()
    with torch.no_grad():
        model[0].weight[1, 1] = float("inf")
    with pytest.raises(FloatingPointError, match="layer 0: the weight has NaN or infinite entries after step 2"):
        watch.step()


def test_resume_gives_the_same_numbers():
    def start(moved=0.0):
        torch.manual_seed(0)
        model = net()
        with torch.no_grad():
            model[0].weight += moved * torch.randn(32, 24)
        return model, LayerWatch(model, k=5, interval=2, rows=12)

    model, watch = start()
    trained(model, watch, 3)
    kept = copy.deepcopy((model.state_dict(), watch.state_dict()))
    trained(model, watch, 3)
    watch.finish()
    again, other = start(moved=0.1)  # the stored start counts, not what the new watch has found
    again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    trained(again, other, 3)
    other.finish()
    assert [row["step"] for row in watch.history] == [0, 2, 4, 6]
    assert other.history == watch.history
    with pytest.raises(ValueError, match=r"directions of layer '0' were \(32, 24\) and are \(32, 6\)"):
        LayerWatch(net(), k=5, kept=6).load_state_dict(kept[1])


def test_the_last_step_is_measured_once():
    model = net()
    watch = LayerWatch(model, k=5, interval=2)
    trained(model, watch, 3)
    watch.finish()
    watch.finish()
    assert [row["step"] for row in watch.history] == [0, 2, 3]


def trainer_of(folder, steps=5, **others):
    transformers = pytest.importorskip("transformers", reason="the callback is transformers'")
    pytest.importorskip("accelerate", reason="its trainer needs accelerate")
    from lowdim.train import WatchCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return {"loss": (self.body(x) - x[:, :4]).square().mean()}

    torch.manual_seed(0)
    model = Model()
    args = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_strategy="steps", save_steps=3, report_to=[],
        use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    data = [{"x": row} for row in torch.randn(32, 24, generator=torch.Generator().manual_seed(2))]

    class Tracker(transformers.TrainerCallback):
        """Trackers are callbacks, too, and were there before."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            told.update({(state.global_step, key): value for key, value in logs.items()})

    told = {}
    trainer = transformers.Trainer(model, args, train_dataset=data, callbacks=[Tracker()])
    trainer.told = told
    callback = WatchCallback(trainer, LayerWatch(model, k=5, interval=2, rows=12), **others)
    trainer.add_callback(callback)
    return trainer, callback


def test_the_trainers_callback_logs_and_resumes(tmp_path):
    trainer, callback = trainer_of(tmp_path / "a", by_layer=True)
    trainer.train()
    history = callback.watch.history
    assert [row["step"] for row in history] == [0, 2, 4, 5]
    logged = [entry for entry in trainer.state.log_history if "watch/alpha" in entry]
    assert [entry["step"] for entry in logged] == [0, 2, 4, 5]
    for entry, row in zip(logged, history):
        assert {key: entry[f"watch/{key}"] for key in ("alpha", "intruders", "overlap")} == {
            key: row[key] for key in ("alpha", "intruders", "overlap")
        }
        assert trainer.told[row["step"], "watch/alpha"] == row["alpha"]
        assert entry["watch/overlap/body.2"] == row["layers"]["body.2"]["overlap"]
    assert len([entry for entry in trainer.state.log_history if "loss" in entry]) == 5, "the losses are logged as without it"
    resumed, again = trainer_of(tmp_path / "a")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert again.watch.history == history
    (tmp_path / "a" / "checkpoint-3" / "watch.pt").write_bytes(b"nothing")
    resumed, _ = trainer_of(tmp_path / "a")
    with pytest.raises(CheckpointError, match="checkpoint-3 cannot be read"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    (tmp_path / "a" / "checkpoint-3" / "watch.pt").unlink()
    resumed, _ = trainer_of(tmp_path / "a")
    with pytest.warns(UserWarning, match=r"watch.pt does not exist"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
