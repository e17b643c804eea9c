"""A model that FSDP2 has spread over two processes is written whole."""

import torch

from lowdim.errors import LowdimError
from lowdim.testing.processes import in_processes


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def spread(rank, world, folder):
    from pathlib import Path

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from lowdim.layers import LowRankLinear, swap_linear
    from lowdim.train.run import save_plain, whole_state
    from lowdim.train.tokenizers import byte_tokenizer

    mesh = init_device_mesh("cpu", (world,))
    model = small_llama()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    whole = whole_state(model)
    if rank == 0:
        save_plain(model, Path(folder) / "model", byte_tokenizer(), whole)
    other = fully_shard(swap_linear(small_llama(), LowRankLinear, rank=4), mesh=mesh)
    whole = whole_state(other)
    try:
        save_plain(other, Path(folder) / "never", byte_tokenizer(), whole)
    except LowdimError as error:
        return str(error)
    return ""


def test_it_is_written_whole(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lowdim.train.run import whole_state

    message = in_processes(spread, 2, str(tmp_path))
    assert "is structured and sharded over processes" in message
    assert not (tmp_path / "never").exists()
    again, want = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), small_llama()
    assert type(again) is type(want)
    for (name, a), b in zip(again.named_parameters(), want.parameters()):
        assert torch.equal(a, b), name
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 258
    assert whole_state(want) is None
