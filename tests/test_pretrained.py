"""Compressed models as transformers checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowdim
import tiny
from lowdim.after_import import after_import
from lowdim.compress import (
    LoRDConfig,
    LowRankLinear,
    LR2VQConfig,
    LR2VQLinear,
    PELAConfig,
    Scheduled,
    WeLoreConfig,
    WeLoreLinear,
    WINAConfig,
    WINALinear,
    finalize,
    last_report,
    lord,
    lr2vq,
    pela,
    step,
    welore,
    wina,
)
from lowdim.errors import CheckpointError, LowdimError
from lowdim.layers import Monarch, swap_linear
from lowdim.modules import MaskedLinear
from lowdim.pretrained import save_compressed, stored_bytes

transformers = pytest.importorskip("transformers")
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


def ids(rows=4, length=12):
    return torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(1))


def gpt2():
    config = transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def bert():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=48, num_labels=3, **sizes))


MODELS = {"llama": tiny.llama, "tied llama": lambda: tiny.llama(tie_word_embeddings=True), "gpt2": gpt2, "bert": bert}


def by_lord(model, **options):
    return lord(model, LoRDConfig(**({"param_ratio": 0.7} | options)), [{"input_ids": ids()}])


def by_welore(model):
    return welore(model, WeLoreConfig(threshold=0.5, min_reduction=0.0))


def by_pela(model):
    return pela(model, PELAConfig(compression_ratio=1.7))


def by_lr2vq(model):
    return lr2vq(model, LR2VQConfig(codebook_size=16, subvector_size=4, clustering_dim=2))


def by_wina(model):
    return wina(model, WINAConfig(sparsity=0.4))


METHODS = {
    "lord": (by_lord, LowRankLinear),
    "lr2vq": (by_lr2vq, LR2VQLinear),
    "pela": (by_pela, LowRankLinear),
    "welore": (by_welore, WeLoreLinear),
    "wina": (by_wina, WINALinear),
}
FACTORED = [name for name in METHODS if name != "wina"]  # what they are as plain models has the same outputs


def compressed(make=tiny.llama, method="lord"):
    return METHODS[method][0](make().eval())


def logits(model):
    with torch.no_grad():
        return model.eval()(ids()).logits


def load(folder, kind=AutoModelForCausalLM, **options):
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


@pytest.fixture
def forget_lowdim(monkeypatch):
    """Makes transformers what it is where lowdim was never imported."""
    from transformers.quantizers import auto

    def forget():
        monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lowdim")
        monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lowdim")

    return forget


# The same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_to_the_bit(name, method, dtype, tmp_path):
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    MODELS[name]().save_pretrained(tmp_path / "dense")
    compress, layer_class = METHODS[method]
    # Read in its dtype: `.to(bfloat16)` would round rotary tables, which transformers keeps in float32.
    model = compress(kind.from_pretrained(tmp_path / "dense", dtype=dtype))
    replaced = {row.name for row in last_report(model).replaced}
    assert replaced
    save_compressed(model, tmp_path / "small")
    again = load(tmp_path / "small", kind, dtype=dtype)
    assert {n for n, m in again.named_modules() if type(m) is layer_class} == replaced
    assert torch.equal(logits(again), logits(model))
    assert not again.training
    assert {p.dtype for p in again.parameters()} == {dtype}
    if name == "tied llama":
        assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_the_folder_is_as_small_as_its_shapes_say(name, method, tmp_path):
    dense = MODELS[name]()
    sizes = {n: 4 * p.numel() for n, p in dense.named_parameters()}  # a tied one counts once
    model = METHODS[method][0](dense)
    for row in last_report(model).replaced:
        bias = row.out_features if getattr(model.get_submodule(row.name), "bias", None) is not None else 0
        sizes = {n: size for n, size in sizes.items() if not n.startswith(f"{row.name}.")}
        if method == "lr2vq":  # a code of four bits for four weights, 16 codewords and 4 basis vectors in two dimensions
            sizes[row.name] = row.in_features * row.out_features // 8 + 4 * (16 * 2 + 4 * 2 + bias)
        elif method == "wina":  # every weight; the norms of its columns are buffers
            sizes[row.name] = 4 * (row.in_features * row.out_features + bias)
        else:
            sizes[row.name] = 4 * (row.rank * (row.in_features + row.out_features) + bias)
    own = [(n, b) for n, b in model.named_buffers() if n in model.state_dict() and not n.endswith(".codes")]
    buffers = sum(b.numel() * b.element_size() for _, b in own)
    forecast = sum(sizes.values()) + buffers
    assert stored_bytes(model) == forecast
    assert save_compressed(model, tmp_path / "small") == forecast
    written = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "small" / "model.safetensors").values())
    assert written == forecast


def test_shards(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "small", max_shard_size="16KB")
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(tmp_path / "small")), logits(model))


def test_a_body_and_a_whole_model_load_from_each_other(tmp_path):
    model = compressed()
    save_compressed(model, tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(body.layers[0].mlp.up_proj) is LowRankLinear
    want = model.model(ids()).last_hidden_state
    assert torch.equal(body(ids()).last_hidden_state, want)
    save_compressed(body, tmp_path / "body")
    head = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    assert type(head.model.layers[0].mlp.up_proj) is LowRankLinear
    assert torch.equal(head.model(ids()).last_hidden_state, want)


# Readers


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


@pytest.mark.parametrize("kind", [AutoModelForCausalLM, AutoModel])
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


# Plain again


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("name", MODELS)
def test_dequantize_gives_a_plain_model_that_saves_and_loads(name, method, tmp_path):
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model = compressed(MODELS[name], method)
    save_compressed(model, tmp_path / "small")
    plain = load(tmp_path / "small", kind).dequantize()
    assert {n: type(m) for n, m in plain.named_modules()} == {n: type(m) for n, m in MODELS[name]().named_modules()}
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain", kind)), logits(plain))


@pytest.mark.parametrize("method", FACTORED)
@pytest.mark.parametrize("name", MODELS)
def test_dense_checkpoints_need_no_lowdim(name, method, tmp_path, forget_lowdim):
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model = compressed(MODELS[name], method)
    want, classes = logits(model), [type(m) for m in model.modules()]
    size = save_compressed(model, tmp_path / "dense", dense=True)
    assert [type(m) for m in model.modules()] == classes  # it stays compressed
    assert size > stored_bytes(model)
    factors = load_file(tmp_path / "dense" / "factors.safetensors")
    own = ("basis", "codebook", "codes") if method == "lr2vq" else "AB"
    assert factors.keys() == {f"{row.name}.{factor}" for row in last_report(model).replaced for factor in own}
    forget_lowdim()
    torch.testing.assert_close(logits(load(tmp_path / "dense", kind)), want, rtol=1e-4, atol=1e-5)


def test_sparse_inputs_gone_the_model_is_the_one_before(tmp_path):
    model = tiny.llama().eval()
    want = logits(model)
    save_compressed(by_wina(model), tmp_path / "small")
    assert torch.equal(logits(load(tmp_path / "small").dequantize()), want)
    save_compressed(model, tmp_path / "dense", dense=True)
    assert torch.equal(logits(load(tmp_path / "dense")), want)


def test_a_dense_checkpoint_that_would_lose_a_bias_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 48}
    config = transformers.Qwen2Config(num_key_value_heads=2, **sizes)  # has no switch for the bias of o_proj
    with pytest.raises(LowdimError, match=r"cannot hold .*bias.*centered=False"):
        save_compressed(by_lord(transformers.Qwen2ForCausalLM(config)), tmp_path / "dense", dense=True)
    assert not (tmp_path / "dense").exists()
    save_compressed(by_lord(transformers.Qwen2ForCausalLM(config), centered=False), tmp_path / "dense", dense=True)
    save_compressed(by_lord(transformers.Qwen2ForCausalLM(config)), tmp_path / "small")


# Training


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


# What is damaged, and what does not fit


def flip(path, tensor):
    """One bit of one tensor."""
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    start, _ = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    data[8 + size + start] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.up_proj.A", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found(tensor, tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    flip(tmp_path / "small" / "model.safetensors", tensor)
    with pytest.raises(CheckpointError, match=f"model.safetensors is damaged: tensor {tensor} differs from what was written"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_tensor_that_was_left_out_is_missed(tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.B"]
    save_file(tensors, file, header)
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.B"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_truncated_file_is_refused(tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is damaged or not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.update(version=2), "in version 2; this lowdim reads version 1; update it"),
        (
            lambda q: q["layers"].popitem(),
            "config.json is damaged: its layers are not those that model",
        ),
        (lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update(alpha=2.0), "config.json is damaged"),
        (lambda q: q.update(depth=2), "version 1 with 'depth'"),
        (lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update({"class": "LowRankLinera"}), "layer class 'LowRankLinera'"),
        (
            lambda q: q["layers"]["model.layers.0.mlp.up_proj"].update({"rank": 99}),
            r"up_proj: rank must be an int in \[1, 32\]",
        ),
        (
            lambda q: q["layers"].update({"model.layers.0.mlp.sideways": {"class": "LowRankLinear"}}),
            "'model.layers.0.mlp.sideways'",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(change, match, tmp_path):
    save_compressed(compressed(), tmp_path / "small")
    file = tmp_path / "small" / "config.json"
    config = json.loads(file.read_text())
    change(config["quantization_config"])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_what_does_not_read_back_is_not_left_behind(tmp_path, monkeypatch):
    from lowdim.pretrained.quantizer import LowdimQuantizer

    model, honest = compressed(), LowdimQuantizer.get_state_dict_and_metadata

    def rounded(self, model):
        state, _ = honest(self, model)
        return {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in state.items()}, {}

    monkeypatch.setattr(LowdimQuantizer, "get_state_dict_and_metadata", rounded)
    with pytest.raises(LowdimError, match=r"does not read back as it was written: model\."):
        save_compressed(model, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_the_record_and_the_tokenizer_are_written_too(tmp_path):
    tiny.save_tokenizer(tmp_path / "tokenizer", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    save_compressed(compressed(), tmp_path / "small", tokenizer, record={"method": "lord", "perplexity": [1.0, float("inf")]})
    assert json.loads((tmp_path / "small" / "compression.json").read_text()) == {"method": "lord", "perplexity": [1.0, None]}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "small").get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]["system"] == "LoRD"


def test_a_model_without_compressed_layers_is_saved_as_ever(tmp_path):
    model = tiny.llama().eval()
    save_compressed(model, tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path / "plain")), logits(model))
    model = by_lord(model)
    save_compressed(model, tmp_path / "small")
    lowdim.layers.densify(model)
    with pytest.raises(LowdimError, match="does not read back"):  # a Llama drops the biases that LoRD made
        save_compressed(model, tmp_path / "lost")
    save_compressed(model, tmp_path / "dense", dense=True)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match=r"must be a transformers model; got Sequential.*load_compressed"):
        save_compressed(nn.Sequential(LowRankLinear(4, 4, rank=1)), tmp_path / "x")
    model = swap_linear(tiny.llama(), Monarch, ["up_proj"], nblocks=2)
    with pytest.raises(LowdimError, match=r"layer model\.layers\.0\.mlp\.up_proj is a Monarch, which a file cannot describe"):
        save_compressed(model, tmp_path / "x")
    save_compressed(model, tmp_path / "dense", dense=True)
    torch.testing.assert_close(logits(load(tmp_path / "dense")), logits(model), rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "x").exists()


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
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
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
