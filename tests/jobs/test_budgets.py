"""A budget becomes ranks, sparsities and cache ranks; what the model then takes is counted by the test itself."""

import itertools

import pytest
import torch
from torch import nn

import tiny
from lowdim.compress import LowRankLinear, LR2VQLinear, MatryoshkaProjection, WINALinear, last_report
from lowdim.errors import BudgetError, UnknownNameError
from lowdim.jobs import CompressSettings, compress, compressor
from lowdim.jobs.budgets import Budget, fit_budget
from lowdim.ranks import Choices, by_error_per_byte

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:few calibration tokens")


def model(seed=0):
    """A Llama whose layers differ in how fast their singular values fall."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = tiny.llama(2)
    decay = itertools.cycle([0.3, 0.02, 0.1])
    for layer in made.model.layers.modules():
        if isinstance(layer, nn.Linear):
            U, S, V = torch.linalg.svd(layer.weight.data, full_matrices=False)
            falling = (-next(decay) * torch.arange(len(S))).exp()
            layer.weight.data = U @ torch.diag(falling * S.norm() / falling.norm()) @ V
    return made.eval()


def batches():
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, 48, (4, 16), generator=draw)} for _ in range(12)]


def numbers(module):
    """Bytes of all tensors in the state dict, each once."""
    kept = {tensor.data_ptr(): tensor for tensor in module.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def fitted(name, budget, given=None, made=None):
    made = model() if made is None else made
    method = compressor(name)
    found = fit_budget(method, given or {}, made, batches(), Budget.parse(budget))
    again = method.function(made, found.config, *([batches()] if method.needs_batches else []))
    return found, again


class TestByErrorPerByte:
    def test_no_smaller_combination_loses_less(self):
        """On convex tables nothing that is smaller by a step or more loses less."""
        draw = torch.Generator().manual_seed(0)
        for _ in range(20):
            tables = {}
            for name in "abc":
                slopes = torch.rand(4, generator=draw).sort().values  # error for each byte, rising
                saved = torch.randint(1, 9, (4,), generator=draw)
                sizes = torch.cat([torch.tensor([40]), 40 - saved.cumsum(0)])
                tables[name] = Choices(sizes, torch.cat([torch.zeros(1), (slopes * saved).cumsum(0)]))
            allowed = 85
            found = by_error_per_byte(tables, allowed)
            size = sum(int(tables[name].sizes[i]) for name, i in found.items())
            error = sum(float(tables[name].errors[i]) for name, i in found.items())
            assert size <= allowed
            lists = (zip(table.sizes.tolist(), table.errors.tolist()) for table in tables.values())
            options = [tuple(map(sum, zip(*some))) for some in itertools.product(*lists)]
            assert all(e >= error - 1e-6 for s, e in options if s <= allowed - 8), "a smaller combination loses less"

    def test_a_bump_is_jumped_over(self):
        """Factors of a high rank lose something and save next to nothing: no layer stops there."""
        table = Choices(torch.tensor([100, 99, 50]), torch.tensor([0.0, 0.4, 0.5]))
        assert by_error_per_byte({"a": table}, 70) == {"a": 2}
        assert by_error_per_byte({"a": table}, 99) == {"a": 1}, "what is left over is used"

    @pytest.mark.parametrize(
        ("tables", "allowed", "part"),
        [
            ({}, 5, "at least one layer"),
            ({"a": Choices(torch.tensor([3, 2]), torch.tensor([0.0, 1.0]))}, 1, "allowed must be at least 2"),
            ({"a": Choices(torch.tensor([3, 3]), torch.tensor([0.0, 1.0]))}, 5, "layer a: choices must be sizes that fall"),
            ({"a": Choices(torch.tensor([3, 2]), torch.tensor([0.0, float("nan")]))}, 2, "layer a: an error is not finite"),
        ],
    )
    def test_bad_input(self, tables, allowed, part):
        with pytest.raises(ValueError, match=part):
            by_error_per_byte(tables, allowed)


@pytest.mark.parametrize("text", ["half", "0x", "1x", "-1x", "2x", "", None, "0.5y"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="--budget"):
        Budget.parse(text)


@pytest.mark.parametrize("name", ["lord", "pela", "welore", "lr2vq"])
def test_what_is_stored_is_at_most_the_budget_and_close_to_it(name):
    given = {"codebook_size": 16, "clustering_dim": 8} if name == "lr2vq" else {}
    dense = numbers(model())
    found, small = fitted(name, "0.7x", given)
    assert (found.dense, found.allowed) == (dense, int(0.7 * dense))
    assert 0.9 * found.allowed < numbers(small) <= found.allowed
    kinds = LR2VQLinear if name == "lr2vq" else LowRankLinear
    assert any(isinstance(layer, kinds) for layer in small.modules())
    assert found.least < found.allowed


def test_layers_that_fall_fast_get_the_smaller_ranks():
    """Of layers of one shape, that with the steeper spectrum loses less for each byte."""
    found, _ = fitted("pela", "0.7x")
    spectra = {name: layer for name, layer in model().named_modules() if isinstance(layer, nn.Linear)}
    decays = dict(zip((n for n in spectra if n != "lm_head"), itertools.cycle([0.3, 0.02, 0.1])))
    same = [n for n in decays if spectra[n].weight.shape == (64, 32)]
    ranks = {decays[n]: found.config.rank.get(n, 99) for n in same}
    assert len(ranks) > 1
    assert [ranks[d] for d in sorted(ranks)] == sorted(ranks.values(), reverse=True)


def test_lord_takes_no_energy_from_where_another_layer_has_less_to_lose():
    """The choice loses no more, summed over layers, than one ratio for all that is as large."""
    found, small = fitted("lord", "0.75x")
    greedy = sum(row.relative_error**2 for row in last_report(small).replaced)
    method = compressor("lord")
    ratio = max(
        r / 100
        for r in range(20, 100, 5)
        if numbers(method.function(model(), method.build({"param_ratio": r / 100}), batches())) <= numbers(small)
    )
    uniform = method.function(model(), method.build({"param_ratio": ratio}), batches())
    assert greedy < sum(row.relative_error**2 for row in last_report(uniform).replaced)
    assert all(
        isinstance(small.get_submodule(n), LowRankLinear) and small.get_submodule(n).rank == r
        for n, r in found.config.rank.items()
    )


def test_wina_reads_at_most_the_budget():
    found, small = fitted("wina", "0.6x")
    layers = [layer for layer in small.modules() if isinstance(layer, WINALinear)]
    read = sum(int(layer.in_features * (1 - layer.sparsity)) * layer.out_features * 4 for layer in layers)
    assert found.dense == sum(layer.in_features * layer.out_features * 4 for layer in layers)
    assert 0.85 * found.allowed < read <= found.allowed == int(0.6 * found.dense)
    assert len({layer.sparsity for layer in layers}) > 2


def test_the_cache_holds_at_most_the_budget():
    found, small = fitted("matryoshka-kv", "0.5x")
    ranks = [part.ranks for part in small.modules() if isinstance(part, MatryoshkaProjection)]
    held = 4 * sum(sum(side) for layer in ranks for side in layer)
    assert found.dense == 4 * 2 * 2 * 2 * 8  # float32, two layers, keys and values, two heads of 8
    assert 0.8 * found.allowed <= held <= found.allowed == found.dense // 2


@pytest.mark.parametrize("name", ["lord", "pela", "welore", "lr2vq", "wina", "matryoshka-kv"])
def test_what_no_layer_can_meet_names_the_smallest(name):
    given = {"codebook_size": 16, "clustering_dim": 8} if name == "lr2vq" else {}
    with pytest.raises(BudgetError, match=rf"no layer can meet: {name} reaches .* at the smallest"):
        fitted(name, "4B", given)


def test_the_smallest_that_is_named_can_be_reached():
    with pytest.raises(BudgetError) as caught:
        fitted("lord", "4B")
    found, _ = fitted("lord", "0.9x")
    assert f"{found.least / found.dense:.3f}x" in str(caught.value)
    again, small = fitted("lord", f"{found.least}B")
    assert numbers(small) == again.allowed == found.least


def test_bad_requests():
    with pytest.raises(ValueError, match="a budget determines param_ratio of lord; give one or the other"):
        fitted("lord", "0.5x", {"param_ratio": 0.5})
    with pytest.raises(ValueError, match="is not below what the dense model takes"):
        fitted("pela", "1GiB")
    with pytest.raises(UnknownNameError, match="nm-decay acts while a model trains"):
        fitted("nm-decay", "0.5x")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertModel(transformers.BertConfig(vocab_size=48, **sizes))
    with pytest.raises(TypeError, match="not causal"):
        fitted("matryoshka-kv", "0.5x", made=encoder)


def test_the_job_says_what_each_layer_got(tmp_path):
    common = {"model": "stories260k", "data": ("lowdim:shakespeare",), "max_length": 32, "samples": 32}
    said = []
    done = compress(CompressSettings(**common, out=tmp_path / "small", budget="0.8x"), say=said.append)
    table = said[0].splitlines()
    assert table[0].startswith("LoRD: ")
    assert len(table) == 1 + len(done.report.layers)
    record = done.to_dict()
    assert record["fitted"]["budget"] == "0.8x"
    assert (tmp_path / "small" / "model.safetensors").stat().st_size < 1.02 * record["fitted"]["allowed"]
    assert record["rank"] == {name: rank for name, rank in record["ranks"].items() if rank is not None}
    with pytest.raises(ValueError, match="a budget determines rank_ratio of lord"):
        compress(CompressSettings(**common, out=tmp_path / "x", budget="0.8x", options={"rank_ratio": 0.5}))
    with pytest.raises(ValueError, match="--budget must be a share such as"):
        CompressSettings(**common, out=tmp_path / "x", budget="half")
    assert not (tmp_path / "x").exists()
