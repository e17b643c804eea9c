"""Who reads compressed checkpoints: programs that import lowdim in either order, and those that do not import it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compressed_models import compressed, gpt2, ids, load, logits
from safetensors.torch import save_file

import lowdim
import tiny
from lowdim.after_import import after_import
from lowdim.modules import MaskedLinear
from lowdim.pretrained import save_compressed

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


ORDERS = {
    "lowdim first": "import lowdim, transformers",
    "transformers first": "import transformers; transformers.AutoModelForCausalLM; import transformers.modeling_utils, lowdim",
    "transformers named first": "import transformers, lowdim",
}


@pytest.mark.parametrize("order", ORDERS)
def test_either_order_of_imports(order, tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "small")
    save_file({"logits": logits(model), "ids": ids()}, tmp_path / "want.safetensors")
    code = (
        f"{ORDERS[order]}\n"
        "import sys\n"
        "assert 'lowdim.compress' not in sys.modules and 'lowdim.adapters' not in sys.modules\n"
        "from safetensors.torch import load_file\n"
        "want = load_file('want.safetensors')\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained('small')\n"
        "assert (model(want['ids']).logits == want['logits']).all()\n"
        "assert not any('lowdim' in type(finder).__module__ for finder in sys.meta_path)\n"
        "assert 'lowdim' not in type(sys.modules['transformers.quantizers'].__loader__).__module__\n"
    )
    path = str(Path(lowdim.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_registering_twice_changes_nothing():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    before, finders = AUTO_QUANTIZER_MAPPING["lowdim"], list(sys.meta_path)
    lowdim.pretrained.register()
    after_import("transformers.quantizers", "lowdim.pretrained:register")
    assert AUTO_QUANTIZER_MAPPING["lowdim"] is before
    assert sys.meta_path == finders


@pytest.mark.parametrize("kind", [transformers.AutoModelForCausalLM, transformers.AutoModel])
def test_without_lowdim_it_is_an_error_and_never_random_weights(kind, tmp_path, forget_lowdim):
    save_compressed(compressed(), tmp_path / "small")
    forget_lowdim()
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        kind.from_pretrained(tmp_path / "small")


class OnlyPositive(MaskedLinear):
    def mask(self):
        return (self.matrix > 0).to(self.weight.dtype)

    def description(self):
        return {}


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_layers_that_keep_their_weight(make, tmp_path, forget_lowdim):
    model = make().eval()
    dense = logits(model)
    for name, layer in list(model.named_modules()):
        if name.endswith(("up_proj", "c_fc")):
            lowdim.surgery.replace_layer(model, name, OnlyPositive(layer))
    save_compressed(model, tmp_path / "small")
    again = load(tmp_path / "small")
    assert any(type(m) is OnlyPositive for m in again.modules())
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(again), dense)
    forget_lowdim()
    assert torch.equal(logits(load(tmp_path / "small")), dense)
