"""Models that torch has wrapped: compiled, checkpointed, or for several processes."""

import pytest
import torch
from torch import nn
from unusual_models import SIZES, disturb, made, net

import lowdim
from lowdim.adapters import LoRA


def part_compiled():
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    return model


def leaf_compiled():
    model = net()
    model[0] = torch.compile(model[0], backend="eager")
    return model


def checkpointed():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net()
    model[2] = checkpoint_wrapper(model[2])
    return model


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPED = {
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "part compiled": part_compiled,
    "leaf compiled": leaf_compiled,
    "checkpointed": checkpointed,
    "DataParallel": lambda: nn.DataParallel(net()),
    "DDP": lambda: nn.parallel.DistributedDataParallel(net()),
    "compiled DDP": lambda: torch.compile(nn.parallel.DistributedDataParallel(net()), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_what_is_saved_has_the_plain_models_names(name, tmp_path, one_process):
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    wrapped = WRAPPED[name]()
    adapted = lowdim.adapt(wrapped, LoRA(rank=2, target_modules=["0", "2.0"]), modules_to_save=["2.1"])
    assert list(adapted.layers) == ["0", "2.0"]
    assert set(adapted.trainable()) == {*(f"{n}.update.{f}" for n in ("0", "2.0") for f in "AB"), "2.1.weight", "2.1.bias"}
    disturb(adapted)
    want = wrapped(x)
    adapted.save(tmp_path / "a")
    plain = net()
    lowdim.load_adapter(plain, tmp_path / "a")
    torch.testing.assert_close(plain(x), want)
    again = WRAPPED[name]()
    lowdim.load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(x), want)
    merged = adapted.merge()
    torch.testing.assert_close(wrapped(x), want)
    torch.testing.assert_close(merged(x), want)
    adapted.unmerge()
    torch.testing.assert_close(wrapped(x), want)


def test_base_name_and_task_type_of_a_wrapped_model_are_kept(tmp_path):
    T = pytest.importorskip("transformers")
    import json

    model = made(T.LlamaForCausalLM, T.LlamaConfig(**SIZES))
    model.config._name_or_path = "somewhere/base"
    adapted = lowdim.adapt(torch.compile(model, backend="eager"), LoRA(rank=2, target_modules=["q_proj"]))
    assert adapted.description()["base_model"] == {"class": "LlamaForCausalLM", "name_or_path": "somewhere/base"}
    adapted.export(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("somewhere/base", "CAUSAL_LM")


def test_models_wrapped_for_several_processes_are_refused(monkeypatch, one_process):
    wrapped = nn.parallel.DistributedDataParallel(net())
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match=r"adapt model\.module first, then wrap it"):
        lowdim.adapt(wrapped, LoRA(rank=2))

    class FullyShardedDataParallel(nn.Module):
        pass

    with pytest.raises(ValueError, match="adapt the plain model first"):
        lowdim.adapt(nn.Sequential(FullyShardedDataParallel()), LoRA(rank=2))
