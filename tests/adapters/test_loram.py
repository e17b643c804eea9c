import copy
import json

import pytest
import torch
from torch import nn

import lowdim
import tiny
import vectors
from lowdim import methods
from lowdim.adapters import (
    ChannelGroup,
    LoRAM,
    gqa_channels,
    recover_lora,
    select_channels,
)
from lowdim.adapters.loram.channels import channel_scores
from lowdim.catalogue import variant
from lowdim.errors import CheckpointError
from lowdim.files import read_tensors
from lowdim.surgery import weight_matrix
from lowdim.testing.adapter_case import AdapterCase
from lowdim.testing.closeness import relative_error
from lowdim.testing.new_process import run_in_new_process
from lowdim.testing.sample_layers import make_input, make_layer, moved_output
from lowdim.testing.small_model import output_of_saved, sample_input, small_model


class TestLoRAM(AdapterCase):
    rank, alpha = 2, 5

    def method(self, **changes):
        return LoRAM(**{"rank": self.rank, "alpha": self.alpha, "dropout": 0.0, **changes})

    def dense(self, update):
        return self.alpha / self.rank * update.B @ update.A

    def start(self, weight, stats):
        return {"B": 0.0}

    def max_delta_rank(self, out_features, in_features):
        return 2


class TestLoRAMByRatio(TestLoRAM):
    # The layer is the whole model's in evaluation mode only: there it starts unchanged and merges to what it computes.
    ratio = 0.4

    def method(self, **changes):
        return super().method(**{"ratio": self.ratio, **changes})

    def pruned(self, weight):
        """The smallest magnitudes, zero elsewhere."""
        count = round(self.ratio * weight.numel())
        smallest = weight.abs().flatten().argsort()[:count]
        return torch.zeros_like(weight).flatten().index_copy(0, smallest, weight.flatten()[smallest]).view_as(weight)

    def start(self, weight, stats):
        return {"B": 0.0, "pruned": self.pruned(weight)}

    def taken(self, weight, stats):
        return self.pruned(weight)

    def attach(self, layer, **kwargs):
        return super().attach(layer, **kwargs).eval()

    def adapt(self, model, **kwargs):
        return super().adapt(model.eval(), **kwargs)

    def test_training_leaves_the_pruned_weights_out(self, layer_name):
        layer = make_layer(layer_name)
        adapted = self.attach(layer).train()
        x = make_input(layer)
        small = self.change(adapted) - self.pruned(weight_matrix(layer).detach())
        assert relative_error(adapted(x), moved_output(layer, small, x)) <= 1e-12

    def test_another_process_loads_the_same_bits(self, tmp_path):  # the other process answers in training mode
        model = small_model()
        self.adapt(model).save(tmp_path)
        file = run_in_new_process(output_of_saved, str(tmp_path), LoRAM.__module__)
        assert torch.equal(read_tensors(file)[0]["y"], model.train()(sample_input()))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_save_and_load_keep_dtype_state_and_training(self, tmp_path, dtype):  # the shared one loads in training mode
        model, twin = small_model(dtype=dtype), small_model(dtype=dtype)
        adapted = self.adapt(model)
        self.train(adapted, steps=2, dtype=dtype)
        adapted.save(tmp_path)
        loaded = lowdim.load_adapter(twin, tmp_path)
        assert loaded.method == adapted.method
        for mode in (True, False):
            assert torch.equal(twin.train(mode)(sample_input(dtype=dtype)), model.train(mode)(sample_input(dtype=dtype)))
        assert self.train(loaded, steps=2, dtype=dtype) == self.train(adapted, steps=2, dtype=dtype)


# --- vectors --------------------------------------------------------------------------------------------------------------


def test_vectors_recover():
    case = vectors.load("loram", "recover")
    full, rank, kept = case.hyperparameters["full"], case.hyperparameters["rank"], case["kept"]
    A, _ = recover_lora(case["down_A"], torch.zeros(5, rank), full, 5, kept_in=kept)
    assert torch.equal(A, case["down_A_R"])
    for name in ("gate", "up"):
        _, B = recover_lora(torch.zeros(rank, 5), case[f"{name}_B"], 5, full, kept_out=kept)
        assert torch.equal(B, case[f"{name}_B_R"])
    assert sorted([*kept.tolist(), *case["pruned_idx"].tolist()]) == list(range(full))


def test_vectors_gqa():
    case = vectors.load("loram", "gqa")
    kv, qo = gqa_channels(case["kept_kv_heads"], **case.hyperparameters)
    assert torch.equal(kv, case["kv"])
    assert torch.equal(qo, case["qo"])
    names = "qkvo"
    model = nn.ModuleDict({n: _linear(case[f"W_{n}"]) for n in names})
    small = LoRAM(rank=1, groups=[ChannelGroup(["k", "v"], [], kv), ChannelGroup(["q"], ["o"], qo)]).shrink(model)
    for n in names:
        assert torch.equal(small[n].weight, case[f"P_{n}"])
        assert torch.equal(model[n].weight, case[f"W_{n}"])
        assert (small[n].out_features, small[n].in_features) == case[f"P_{n}"].shape


def test_vectors_pipeline():
    case = vectors.load("loram", "pipeline")
    how = case.hyperparameters
    large = nn.Sequential(_linear(case["W1"], case["b1"]), nn.ReLU(), _linear(case["W2"], case["b2"]))
    before = copy.deepcopy(large.state_dict())
    method = LoRAM(how["rank"], how["alpha"], dropout=0.0, groups=[ChannelGroup(["0"], ["2"], case["kept"])])
    small = method.shrink(large)
    adapted = lowdim.adapt(small, method)
    with torch.no_grad():
        for name, number in (("0", 1), ("2", 2)):
            update = adapted.layers[name].update
            update.A.copy_(case[f"A{number}"])
            update.B.copy_(case[f"B{number}"])
    case.close(small(case["x"]), "small_out")
    case.close(adapted.recover(large)(case["x"]), "large_out")
    assert all(torch.equal(large.state_dict()[key], value) for key, value in before.items())
    data = {"batches": [(case["x"], case["target"])], "loss_fn": lambda m, b: (m(b[0]) - b[1]).square().mean()}
    for criterion in ("magnitude", "taylor"):
        given = data if criterion == "taylor" else {}
        case.close(channel_scores(large, ["0"], ["2"], criterion, **given), f"scores_{criterion}")
        kept = select_channels(large, ["0"], ["2"], how["ratio"], criterion, **given)
        assert torch.equal(kept, case[f"kept_{criterion}"])


def _linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], len(weight), bias is not None, dtype=torch.float64)
    layer.weight.data = weight.clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


# --- pruning and the way back ---------------------------------------------------------------------------------------------


def deep(dtype=torch.float32):
    """The middle layer is a consumer in one group and a producer in the other."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)


GROUPS = (ChannelGroup(["0"], ["2"], [0, 3, 4, 9, 15]), ChannelGroup(["2"], ["4"], [1, 2, 7, 11]))


def trained(model, method, seed=3):
    adapted = lowdim.adapt(method.shrink(model), method)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in adapted.layers.values():
            layer.update.B.copy_(torch.randn(layer.update.B.shape, generator=generator))
    return adapted


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_layer_may_be_pruned_on_both_sides(dtype):
    model = deep(dtype)
    adapted = trained(model, LoRAM(rank=2, dropout=0.0, groups=GROUPS))
    assert [tuple(adapted.layers[n].base.weight.shape) for n in ("0", "2", "4")] == [(5, 6), (4, 5), (3, 4)]
    rows, columns = torch.tensor([1, 2, 7, 11]), torch.tensor([0, 3, 4, 9, 15])
    assert torch.equal(adapted.layers["2"].base.weight, model[2].weight[rows][:, columns])
    whole = adapted.recover(model)
    update = adapted.layers["2"].update
    want = model[2].weight.detach().double()
    want[rows[:, None], columns] += 8.0 * update.B.detach().double() @ update.A.detach().double()
    assert relative_error(whole[2].weight, want) <= {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert whole[2].weight.dtype == dtype
    assert torch.equal(whole[2].bias, model[2].bias)
    assert whole[2].bias is not model[2].bias
    assert all(change.relative_change > 0 for change in adapted.merge_report.layers)


def test_an_untrained_update_gives_the_whole_model_bit_for_bit():
    model = deep()
    method = LoRAM(rank=2, groups=GROUPS)
    whole = lowdim.adapt(method.shrink(model), method).recover(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.state_dict().items())


def test_the_whole_model_gets_its_own_weights_and_not_the_aligned_ones():
    model, method = deep(), LoRAM(rank=2, groups=GROUPS)
    small = method.shrink(model)
    with torch.no_grad():
        for p in small.parameters():
            p.add_(1.0)  # what a publisher's alignment would do
    whole = lowdim.adapt(small, method).recover(model)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in whole.state_dict().items())


def test_shrinking_leaves_the_model_and_shares_nothing():
    model = deep().eval()
    model[2].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    masked = LoRAM(rank=2, groups=GROUPS[:1], masks={"4": torch.ones(3, 12, dtype=torch.bool)})
    small = masked.shrink(model)
    with torch.no_grad():
        for p in small.parameters():
            p.zero_()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not small[0].training
    assert not small[2].weight.requires_grad
    assert small[4].weight.requires_grad


def test_masks_zero_weights_and_keep_factors_as_they_are():
    model = deep()
    mask = torch.rand(12, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    adapted = trained(model, LoRAM(rank=2, masks={"2": mask}))
    assert torch.equal(adapted.layers["2"].base.weight, model[2].weight * mask)
    update = adapted.layers["2"].update
    A, B = adapted.recovered(model)["2"]
    assert torch.equal(A, update.A)
    assert torch.equal(B, update.B)
    whole = adapted.recover(model)
    assert relative_error(whole[2].weight, model[2].weight + 8.0 * update.B @ update.A) < 1e-6


def test_channels_and_a_mask_on_one_layer():
    model, mask = deep(), torch.zeros(16, 6, dtype=torch.bool)
    small = LoRAM(rank=2, groups=GROUPS[:1], masks={"0": mask}).shrink(model)
    assert small[0].weight.shape == (5, 6)
    assert not small[0].weight.any()


def test_the_small_adapter_continues_after_a_save(tmp_path):
    model = deep()
    mask = torch.rand(3, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    method = LoRAM(rank=2, groups=GROUPS[:1], masks={"4": mask})
    adapted = trained(model, method)
    adapted.save(tmp_path)
    loaded = lowdim.load_adapter(method.shrink(model), tmp_path)
    assert loaded.method == method
    assert torch.equal(loaded.method.masks["4"], mask)
    x = torch.randn(4, 6)
    assert torch.equal(loaded.recover(model)(x), adapted.recover(model)(x))


def test_the_recovered_adapter_is_a_plain_one(tmp_path):
    peft = pytest.importorskip("peft")
    model = deep()
    adapted = trained(model, LoRAM(rank=2, groups=GROUPS))
    x = torch.randn(4, 6)
    want = adapted.recover(model)(x)
    whole = adapted.attach_to(copy.deepcopy(model))
    assert relative_error(whole.model(x), want) < 1e-5
    assert whole.export(tmp_path / "peft").exact
    assert relative_error(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft")(x), want) < 1e-5
    whole.save(tmp_path / "own")
    loaded = lowdim.load_adapter(model, tmp_path / "own")
    assert torch.equal(loaded.model(x), whole.model(x))


def test_a_trained_head_goes_along():
    model = deep()
    method = LoRAM(rank=2, groups=GROUPS[:1], target_modules=["0", "2"])
    adapted = lowdim.adapt(method.shrink(model), method, modules_to_save=["4"])
    with torch.no_grad():
        adapted.model[4].weight.fill_(7.0)
    whole = adapted.recover(model)
    assert bool((whole[4].weight == 7.0).all())
    other = deep()
    other[4] = nn.Linear(12, 5)
    with pytest.raises(ValueError, match="module 4 has a different shape"):
        adapted.recover(other)


def test_a_tied_head_is_separated_in_the_whole_model():
    model = tiny.llama(tie_word_embeddings=True)
    method = LoRAM(rank=2, target_modules=["lm_head", "q_proj"])
    adapted = trained(model, method)
    whole = adapted.recover(model)
    assert adapted.merge_report.untied == ("lm_head",)
    assert whole.config.tie_word_embeddings is False
    assert torch.equal(whole.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings is True


def test_a_pruned_llama_with_grouped_queries():
    model = tiny.llama(num_attention_heads=4, num_key_value_heads=2)
    config, groups = model.config, []
    d, q = config.hidden_size // 4, 2
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        kept = select_channels(model, [f"{attention}.q_proj"], [f"{attention}.o_proj"], 0.5, block=d * q)
        kv, qo = gqa_channels(kept[:: d * q] // (d * q), 4, 2, d)
        assert torch.equal(kept, qo)
        up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        groups += [
            ChannelGroup([f"{attention}.k_proj", f"{attention}.v_proj"], [], kv),
            ChannelGroup([f"{attention}.q_proj"], [f"{attention}.o_proj"], qo),
            ChannelGroup(up, [f"{mlp}.down_proj"], select_channels(model, up, [f"{mlp}.down_proj"], 0.5)),
        ]
    method = LoRAM(rank=2, groups=groups)
    small = method.shrink(model)
    ids = torch.arange(12).view(2, 6)
    for layer in small.model.layers:
        layer.self_attn.num_key_value_groups = q  # one key head, two query heads: the group size stays
    adapted = lowdim.adapt(small, method)
    loss = small(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(layer.update.B.grad is not None for layer in adapted.layers.values())
    whole = adapted.recover(model)
    assert torch.equal(whole(input_ids=ids).logits, model(input_ids=ids).logits)


# --- by ratio -------------------------------------------------------------------------------------------------------------


def test_by_ratio_training_sees_the_pruned_weight_and_evaluation_the_whole():
    layer = make_layer("linear", torch.float32)
    adapted = LoRAM(rank=2, dropout=0.0, ratio=0.4).attach(layer)
    weight = layer.weight.detach()
    gone = torch.zeros(weight.numel(), dtype=torch.bool)
    gone[weight.abs().flatten().argsort(stable=True)[: round(0.4 * weight.numel())]] = True
    masked = weight.masked_fill(gone.view(weight.shape), 0.0)
    assert torch.equal(weight_matrix(adapted.base), masked)
    x = torch.randn(4, 12)
    assert relative_error(adapted.train()(x), torch.nn.functional.linear(x, masked, layer.bias)) < 1e-6
    assert relative_error(adapted.eval()(x), layer(x)) < 1e-6
    assert torch.equal(adapted.original_weight(), weight)
    with torch.no_grad():
        adapted.update.B.normal_()
    want = weight + 8.0 * adapted.update.B @ adapted.update.A
    for mode in (True, False):
        adapted.train(mode)
        assert relative_error(adapted.effective_weight(), want) < 1e-6
        assert relative_error(adapted.merged().weight, want) < 1e-6
        assert relative_error(adapted.delta(), want - weight) < 1e-5


def test_by_ratio_the_same_weights_go_as_in_a_shrunk_copy():
    model, method = small_model(), LoRAM(rank=2, ratio=0.3)
    small = method.shrink(model)
    adapted = lowdim.adapt(small_model(), method)
    for name, layer in adapted.layers.items():
        assert torch.equal(layer.base.weight, small.get_submodule(name).weight)
    assert torch.equal(small.score.weight, model.score.weight)
    again = lowdim.adapt(small, method)  # prunes what is zero already
    assert not any(bool(layer.update.pruned.any()) for layer in again.layers.values())


def test_by_ratio_equal_magnitudes_go_by_index():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, -1.0, 2.0, 1.0], [1.0, 0.5, 1.0, -1.0]])
    adapted = LoRAM(rank=1, ratio=0.5).attach(layer)
    assert adapted.base.weight.tolist() == [[0.0, 0.0, 2.0, 0.0], [1.0, 0.0, 1.0, -1.0]]


def test_by_ratio_a_checkpoint_holds_the_factors_only(tmp_path):
    adapted = lowdim.adapt(small_model(dtype=torch.bfloat16), LoRAM(rank=2, ratio=0.5), dtype=torch.float32)
    assert {layer.update.pruned.dtype for layer in adapted.layers.values()} == {torch.bfloat16}
    adapted.save(tmp_path)
    assert {key.rpartition(".")[2] for key in read_tensors(tmp_path / "adapter.safetensors")[0]} == {"A", "B"}
    twin = lowdim.load_adapter(small_model(dtype=torch.bfloat16), tmp_path)
    x = sample_input(dtype=torch.bfloat16)
    for mode in (True, False):
        for one in (adapted, twin):
            one.model.train(mode)
            for layer in one.layers.values():
                layer.dropout = 0.0
        assert torch.equal(twin.model(x), adapted.model(x))


def test_by_ratio_in_a_comparison():
    model, ids = tiny.llama(), torch.arange(12).view(2, 6)
    bare = model.eval()(input_ids=ids).logits
    applied = methods.apply(variant("loram"), model, lr=1e-3, steps=2)
    assert applied.adapted.method.ratio > 0
    assert relative_error(applied.model.eval()(input_ids=ids).logits, bare) < 1e-5
    assert relative_error(applied.model.train()(input_ids=ids).logits, bare) > 1e-2


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [[], [2, 1], [1, 1], [-1, 0], [0.5], [[0], [1]], [True, False]])
def test_bad_channels(kept):
    with pytest.raises(ValueError, match="kept must be"):
        ChannelGroup(["0"], ["2"], kept)


def test_bad_groups():
    with pytest.raises(ValueError, match="at least one producer"):
        ChannelGroup([], [], [0])
    with pytest.raises(ValueError, match="list of module names; got '0'"):
        ChannelGroup("0", ["2"], [0])
    with pytest.raises(ValueError, match="layer 0 is among the producers of two groups"):
        LoRAM(groups=[ChannelGroup(["0"], [], [0]), ChannelGroup(["0"], ["2"], [1])])
    with pytest.raises(ValueError, match="ChannelGroup objects"):
        LoRAM(groups=["0"])
    with pytest.raises(ValueError, match="layer 0 has 16 output channels; the group keeps channel 16"):
        LoRAM(groups=[ChannelGroup(["0"], ["2"], [0, 16])]).shrink(deep())
    with pytest.raises(ValueError, match="layer 2 has 16 input channels; the group keeps channel 16"):
        LoRAM(groups=[ChannelGroup([], ["2"], [0, 16])]).shrink(deep())
    with pytest.raises(ValueError, match=r"no module 'fc1' \(nearest: "):
        LoRAM(groups=[ChannelGroup(["fc1"], ["2"], [0])]).shrink(deep())
    with pytest.raises(TypeError, match="1 is ReLU"):
        LoRAM(groups=[ChannelGroup(["1"], ["2"], [0])]).shrink(deep())


def test_bad_masks(tmp_path):
    for bad in (torch.ones(3, 12), torch.ones(3, dtype=torch.bool), [[True]]):
        with pytest.raises(ValueError, match=r"masks\['4'\] must be a bool matrix"):
            LoRAM(masks={"4": bad})
    with pytest.raises(ValueError, match=r"mask of layer 4 has shape \(12, 3\); its weight \(3, 12\)"):
        LoRAM(masks={"4": torch.ones(12, 3, dtype=torch.bool)}).shrink(deep())
    with pytest.raises(ValueError, match="no module 'head'"):
        LoRAM(masks={"head": torch.ones(3, 12, dtype=torch.bool)}).shrink(deep())
    for bits in ("AA==", "?", 3):
        with pytest.raises(CheckpointError, match="packed mask"):
            LoRAM(masks={"4": {"shape": [3, 12], "bits": bits}})
    with pytest.raises(ValueError, match="not both"):
        LoRAM(ratio=0.5, groups=GROUPS)


def test_masks_and_groups_go_through_json():
    masks = {"2": torch.rand(12, 16) < 0.3, "4": torch.rand(3, 12) < 0.3}
    method = LoRAM(groups=GROUPS, masks=masks)
    text = json.dumps(method.config())
    again = LoRAM.from_config(json.loads(text))
    assert again == method
    assert all(torch.equal(again.masks[name], mask) for name, mask in masks.items())
    assert again != LoRAM(groups=GROUPS, masks={**masks, "4": ~masks["4"]})
    assert again != LoRAM(groups=GROUPS[:1], masks=masks)
    assert len(json.dumps(LoRAM(masks={"a": torch.ones(64, 64, dtype=torch.bool)}).config())) < 1000


def test_bad_numbers():
    for bad in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            LoRAM(ratio=bad)
        with pytest.raises(ValueError, match="ratio"):
            select_channels(deep(), ["0"], ["2"], bad)
    with pytest.raises(ValueError, match="alpha"):
        LoRAM(alpha=0)
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 0.*NaN"):
        lowdim.adapt(nn.Sequential(layer), LoRAM(rank=1, ratio=0.5))


def test_bad_selections():
    model = deep()
    with pytest.raises(ValueError, match="prunes all 16 blocks"):
        select_channels(model, ["0"], ["2"], 0.99)
    with pytest.raises(ValueError, match="block must divide the 16 channels; got 5"):
        select_channels(model, ["0"], ["2"], 0.5, block=5)
    with pytest.raises(ValueError, match="equal in number"):
        select_channels(model, ["0"], ["4"], 0.5)
    with pytest.raises(ValueError, match="equal in number"):
        select_channels(model, [], [], 0.5)
    with pytest.raises(ValueError, match="criterion must be one of"):
        select_channels(model, ["0"], ["2"], 0.5, "size")
    for given in ({}, {"batches": [torch.randn(2, 6)]}, {"loss_fn": lambda m, b: m(b).sum()}):
        with pytest.raises(ValueError, match="needs batches and loss_fn"):
            select_channels(model, ["0"], ["2"], 0.5, "taylor", **given)
    with pytest.raises(ValueError, match="no module 'fc'"):
        select_channels(model, ["fc"], ["2"], 0.5)
    with pytest.raises(ValueError, match="num_heads must be a multiple"):
        gqa_channels([0], 6, 4, 2)
    with pytest.raises(ValueError, match="kept_kv_heads must be at least 0 and below the 2"):
        gqa_channels([2], 4, 2, 2)


def test_shapes_that_do_not_fit_when_going_back():
    A, B = torch.ones(2, 3), torch.ones(4, 2)
    for args in (
        (A, torch.ones(4, 3), 3, 4),
        (A, B, 5, 4),
        (A, B, 3, 5),
        (A, B, 5, 4, torch.tensor([0, 1])),
        (A, B, 2, 4, torch.tensor([0, 1, 2])),
        (A, B, 5, 4, torch.tensor([0, 2, 1])),
        (A, B, 3, 6, None, torch.tensor([0, 1, 2])),
        (A[0], B, 3, 4),
    ):
        with pytest.raises(ValueError, match=r"kept|channels|rank"):
            recover_lora(*args)
    adapted = trained(deep(), LoRAM(rank=2, groups=GROUPS))
    other = deep()
    other[2] = nn.Linear(16, 9)
    with pytest.raises(ValueError, match=r"layer 2 \(9, 16\): kept_out"):
        adapted.recover(other)
    with pytest.raises(ValueError, match="the whole model has no layer '4'"):
        adapted.recover(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12)))
    with pytest.raises(ValueError, match="already has an adapter"):
        adapted.recover(lowdim.adapt(deep(), LoRAM(rank=1)).model)
    adapted.merge()
    with pytest.raises(ValueError, match="merged"):
        adapted.recover(deep())


def test_random_and_several_batches():
    model = deep()
    first = select_channels(model, ["0"], ["2"], 0.5, "random", seed=1)
    assert torch.equal(first, select_channels(model, ["0"], ["2"], 0.5, "random", seed=1))
    assert not torch.equal(first, select_channels(model, ["0"], ["2"], 0.5, "random", seed=2))
    x = torch.randn(6, 6)
    loss = lambda model, x: model(x).square().sum()  # noqa: E731
    whole = channel_scores(model, ["0"], ["2"], "taylor", [x], loss)
    parts = channel_scores(model, ["0"], ["2"], "taylor", iter([x[:4], x[4:]]), loss)
    assert relative_error(parts, whole) < 1e-5, "gradients are summed over batches of any size before taking magnitudes"
    assert torch.equal(select_channels(model, ["0"], ["2"], 0.0), torch.arange(16))
