"""Blocks that are run one by one, on what the ones before gave."""

import copy
import sys

import pytest
import torch
from torch import nn

import tiny
import zoo
from lowdim.calibrate import collect, walk_blocks
from lowdim.compress import LoRDConfig, last_report, lord, lord_spectra
from lowdim.linalg import Memory
from lowdim.surgery import blocks_of, find_layers, is_linear

NEEDS = {"output_covariance", "covariance"}
IDS = [torch.randint(3, 30, (2, 7), generator=torch.Generator().manual_seed(i)) for i in range(3)]
MASKED = [{"input_ids": ids, "attention_mask": torch.arange(7).expand(2, 7) < torch.tensor([[7], [5]])} for ids in IDS]


class Block(nn.Sequential):
    """Layers, and at the end one of another part of the model where there is one."""

    last = ()

    def forward(self, x, extra=None):
        x = super().forward(x)
        for layer in self.last:
            x = layer(x)
        return x


class Net(nn.Module):
    """Blocks in a list; `how` says what is odd about them. Of the `samples`, the last alone begins with more than -1.1."""

    def __init__(self, how="", blocks=3, width=6):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.blocks = nn.ModuleList(Block(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(blocks))
        self.head = nn.Linear(width, 9)
        if how == "an outer layer inside":
            self.outer = nn.Linear(width, width)
            for block in self.blocks:
                block.last = (self.outer,)

    def forward(self, x):
        if "in place" in self.how:
            x = x.clone()
        begin, same = x, torch.zeros(())
        for block in reversed(self.blocks) if self.how == "order of the data" and x[0, 0] > -1.1 else self.blocks:
            if self.how == "same input":
                same = same + block(begin)
                continue
            x = block(x, object()) if self.how == "object" else block(x)
            if self.how == "twice":
                x = block(x)
            if self.how == "in place":
                x.mul_(2.0)
            if self.how == "between":
                x = x * 2.0
        if self.how == "input in place":
            begin.mul_(2.0)
        if self.how == "from outside":
            x = self.blocks[1][2](self.blocks[1][0](x))
        return self.head(same + x)


def linears(model):
    return find_layers(model, None, exclude=(), accept=is_linear)


def samples(count=3, width=6):
    return [torch.randn(5, width, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def walked(model, batches):
    """What every block's layers get, with each block zeroed once it is left."""
    layers = linears(model)
    walk = walk_blocks(model, layers, batches, max_bytes=2**20)
    assert walk is not None
    found = {}
    for block in walk.blocks:
        inside = {name: layer for name, layer in layers.items() if name.startswith(f"{block}.")}
        first = dict(list(inside.items())[:1])
        found |= walk.collect(block, first, NEEDS, leave=False)
        found |= walk.collect(block, {name: layer for name, layer in inside.items() if name not in first}, NEEDS)
        with torch.no_grad():
            for layer in inside.values():
                layer.weight.zero_()
    return found


def check_same(model, batches):
    layers = {name: layer for name, layer in linears(model).items() if any(name.startswith(f"{b}.") for b in blocks_of(model))}
    want = collect(model, layers, NEEDS, batches)
    got = walked(model, batches)
    assert got.keys() == want.keys()
    for name, stats in want.items():
        for key, value in stats.items():
            assert torch.equal(torch.as_tensor(got[name][key]), torch.as_tensor(value)), (name, key)


def test_each_block_sees_what_the_original_model_computes():
    check_same(Net(), samples())
    for how in ("between", "same input"):  # what each block gets is then kept
        check_same(Net(how), samples())


@pytest.mark.parametrize("batches", [IDS, MASKED], ids=["tensors", "masked"])
def test_a_llama(batches):
    model = tiny.llama(3)
    check_same(model, batches)
    assert model.config.use_cache


@pytest.mark.parametrize("name", ["bart", "bert-classifier", "clip", "gemma3", "gpt2", "qwen3-moe", "t5", "wav2vec2-ctc"])
def test_models_of_transformers(name):
    model, batch = zoo.MODELS[name].build(), zoo.MODELS[name].batch()
    check_same(model, [batch, batch])


def test_a_block_that_is_skipped_runs_in_evaluation_mode():
    model = Net()
    model.blocks[0].append(nn.Dropout(0.5))
    layers = {name: layer for name, layer in linears(model).items() if name.startswith("blocks.1.")}
    want = collect(model, layers, NEEDS, samples())
    walk = walk_blocks(model, layers, samples(), max_bytes=2**20)
    walk.skip("blocks.0")
    assert model.blocks[0].training
    got = walk.collect("blocks.1", layers, NEEDS)
    assert all(torch.equal(got[name][key], want[name][key]) for name in layers for key in ("covariance", "output_covariance"))


def test_inputs_that_do_not_tell_when_they_change_are_not_kept():
    with torch.inference_mode():
        batches = samples()
    model = Net()
    assert walk_blocks(model, linears(model), batches, max_bytes=2**20) is None


@pytest.mark.parametrize("how", ["twice", "in place", "input in place", "from outside", "order of the data", "object"])
def test_what_cannot_be_walked(how):
    model, batches = Net(how), samples()
    before = copy.deepcopy(model.state_dict())
    assert walk_blocks(model, linears(model), batches, max_bytes=2**20) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    want = lord(copy.deepcopy(model), LoRDConfig(rank=2), batches).state_dict()
    got = lord(model, LoRDConfig(rank=2), batches, max_bytes=8 * 8**2).state_dict()  # a layer at a time, in several passes
    assert all(torch.equal(value, want[name]) for name, value in got.items())


def test_blocks_that_are_shared_are_not_walked():
    model, batch = zoo.MODELS["albert-classifier"].build(), zoo.MODELS["albert-classifier"].batch()
    assert walk_blocks(model, linears(model), [batch], max_bytes=2**20) is None


def test_what_is_kept_is_bounded():
    """Three batches of 5 x 6 numbers in float32: what the first block gets; the others get what the one before gave."""
    model, batches = Net(), samples()
    assert walk_blocks(model, linears(model), batches, max_bytes=3 * 4 * 5 * 6) is not None
    assert walk_blocks(model, linears(model), batches, max_bytes=3 * 4 * 5 * 6 - 1) is None
    assert walk_blocks(Net("between"), linears(model), batches, max_bytes=3 * 3 * 4 * 5 * 6 - 1) is None


def test_what_is_kept_counts_once_and_with_all_of_its_storage():
    wide = [torch.randn(5, 12, generator=torch.Generator().manual_seed(i))[:, :6] for i in range(3)]
    for how, batches, bound in (("same input", samples(), 3 * 4 * 5 * 6), ("", wide, 3 * 4 * 5 * 12)):
        model = Net(how)
        assert walk_blocks(model, linears(model), batches, max_bytes=bound) is not None
        assert walk_blocks(model, linears(model), batches, max_bytes=bound - 1) is None


def test_layers_outside_of_blocks_are_no_walk():
    model = Net()
    assert walk_blocks(model, {"head": model.head}, samples(), max_bytes=2**20) is None


def test_errors_before_anything_is_kept():
    model = Net()
    with pytest.raises(ValueError, match="batches is empty"):
        walk_blocks(model, linears(model), [], max_bytes=2**20)
    with torch.no_grad():
        model.blocks[1][0].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layer blocks\.1\.0: its output_norms .* NaN"):
        walk_blocks(model, linears(model), samples(), max_bytes=2**20)


# LoRD, block by block


@pytest.fixture
def small_sums(monkeypatch):
    """Sums of one block's largest layer: that of a whole model takes more."""
    monkeypatch.setattr(sys.modules["lowdim.compress.lord.statistics"], "_LEAST", 8 * 64**2)


class Counted:
    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize("batches", [IDS, MASKED], ids=["tensors", "masked"])
@pytest.mark.parametrize("options", [{}, {"exclude": ()}, {"target_modules": ["layers.1.mlp.up_proj", "layers.2.mlp.up_proj"]}])
@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_the_factors_are_the_same(batches, options, small_sums):
    torch.manual_seed(0)
    model = tiny.llama(3)
    config = LoRDConfig(rank=5, **options)
    whole = lord(copy.deepcopy(model), config, batches, max_bytes=2**30)
    counted = Counted(batches)
    spectra = lord_spectra(model, batches)
    assert all(torch.equal(value, spectra[name]) for name, value in lord_spectra(model, iter(batches)).items())
    got = lord(model, config, counted)
    assert 1 <= counted.passes <= 3, "one that records; and where the head is meant, those for it"
    assert str(last_report(got)) == str(last_report(whole))
    state = got.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_a_layer_that_blocks_use_is_replaced_after_them():
    model, config = Net("an outer layer inside"), LoRDConfig(rank=2, exclude=())
    want = lord(copy.deepcopy(model), config, samples()).state_dict()
    assert "outer.A" in want
    got = lord(model, config, samples(), max_bytes=8 * 9**2).state_dict()  # a layer at a time
    assert all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_a_block_is_freed_before_the_next(small_sums, monkeypatch):
    """When the second block is looked at, no dense weight of the first is left."""
    import gc
    import weakref

    model = tiny.llama(3)
    weights = {name: weakref.ref(layer) for name, layer in find_layers(model, None, accept=is_linear).items()}
    alive = []
    statistics = sys.modules["lowdim.compress.lord.statistics"]
    plain = statistics.walk_blocks

    def watched(*args, **kwargs):
        walk = plain(*args, **kwargs)
        collect_one = walk.collect

        def collect(block, *rest, **how):
            gc.collect()
            alive.append(sum(ref() is not None for name, ref in weights.items() if ".layers." in name))
            return collect_one(block, *rest, **how)

        walk.collect = collect
        return walk

    monkeypatch.setattr(statistics, "walk_blocks", watched)
    lord(model, LoRDConfig(rank=5), IDS)
    assert len(alive) >= 3
    assert alive[0] == 21
    assert alive[-1] == 7


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_an_error_leaves_the_model_as_it_was(small_sums):
    model = tiny.llama(3)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    before = model.state_dict()
    with pytest.raises(ValueError, match=r"layer model\.layers\.2\.mlp\.down_proj"):
        lord(model, LoRDConfig(rank=5), IDS)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.filterwarnings("ignore:few calibration tokens")
def test_in_a_comparison_the_sums_are_remembered(small_sums):
    model, memory = tiny.llama(2), Memory()
    with memory.active():
        lord(copy.deepcopy(model), LoRDConfig(rank=4), IDS)
        assert memory.hits == 0
        lord(copy.deepcopy(model), LoRDConfig(rank=5), IDS)
    assert memory.hits > 0
