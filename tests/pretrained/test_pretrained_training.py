"""Compressed models are trained after loading, and their schedules continue."""

import json

import pytest
import torch
from compressed_models import compressed, ids, load, logits

import lowdim
import tiny
from lowdim.compress import Scheduled, finalize, step
from lowdim.modules import MaskedLinear
from lowdim.pretrained import save_compressed

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


def test_trainer_tunes_saves_and_resumes_it(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "small")
    model = load(tmp_path / "small")
    start = model.model.layers[0].mlp.up_proj.A.detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in ids(8)]
    options = {"per_device_train_batch_size": 4, "max_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True}
    args = transformers.TrainingArguments(str(tmp_path / "out"), learning_rate=1e-2, disable_tqdm=True, **options)
    transformers.Trainer(model, args, train_dataset=rows).train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.A, start)
    again = load(tmp_path / "out" / "checkpoint-2")
    assert torch.equal(logits(again), logits(model))
    model.save_pretrained(tmp_path / "tuned")  # by its own method: checksums are of the tuned numbers
    assert torch.equal(logits(load(tmp_path / "tuned")), logits(model))


class Fading(MaskedLinear, Scheduled):
    """Half of the weight goes at every step."""

    def __init__(self, layer):
        super().__init__(layer)
        self.start_counting()

    def mask(self):
        return self.weight.new_full(self.matrix.shape, 0.5**self.finished)

    def description(self):
        return {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_schedule_continues_after_loading(dtype, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "dense")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    name = "model.layers.0.mlp.up_proj"
    lowdim.surgery.replace_layer(model, name, Fading(model.get_submodule(name)))
    step(model)
    step(model)
    save_compressed(model, tmp_path / "partway")
    again = load(tmp_path / "partway", dtype=dtype)
    for net in (model, again):
        step(net)
    assert again.get_submodule(name).finished == 3
    assert torch.equal(logits(again), logits(model))
    finalize(model)
    save_compressed(model, tmp_path / "plain")  # without a layer that needs lowdim: saved as ever
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain", dtype=dtype)), logits(again))
