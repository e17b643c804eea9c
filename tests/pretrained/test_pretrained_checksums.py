"""Checksums of checkpoints: each flipped bit is found, and files of earlier versions are read."""

import hashlib
import json
import zlib

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from lowdim.compress import WeLoreConfig, welore
from lowdim.errors import CheckpointError
from lowdim.pretrained import save_compressed
from lowdim.pretrained.checksums import checksums, header, verify

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64])
def test_every_bit_counts(dtype):
    tensor = torch.arange(6).view(2, 3).to(dtype)
    seen = {checksums({"a": tensor})["a"], checksums({"a": tensor.view(3, 2)})["a"], checksums({"a": tensor[:0]})["a"]}
    raw = tensor.clone().view(torch.uint8).view(-1) if dtype != torch.bool else None
    if raw is not None:
        for bit in range(8 * len(raw)):
            raw[bit // 8] ^= 1 << bit % 8
            seen.add(checksums({"a": raw.view(dtype).view(2, 3)})["a"])
            raw[bit // 8] ^= 1 << bit % 8
        assert len(seen) == 3 + 8 * len(raw)
    assert checksums({"a": tensor})["a"] == checksums({"b": tensor.clone()})["b"]


def test_damage_is_found(tmp_path):
    tensors = {"layer.A": torch.randn(4, 3), "rest": torch.ones(2)}
    save_file(tensors, tmp_path / "m.safetensors", metadata=header(tensors, {"layer": {"rank": 4}}))
    verify([tmp_path / "m.safetensors"], {"layer": {"rank": 4}})
    content = bytearray((tmp_path / "m.safetensors").read_bytes())
    content[-9] ^= 4
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.safetensors is damaged: tensor"):
        verify([tmp_path / "bad.safetensors"], {"layer": {"rank": 4}})
    with pytest.raises(CheckpointError, match=r"its layers are not those"):
        verify([tmp_path / "m.safetensors"], {"layer": {"rank": 5}})


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8]
    + [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64],
)
def test_checksums_of_a_file_are_those_of_its_tensors(tmp_path, dtype):
    tensors = {"a": torch.arange(6).view(2, 3), "scalar": torch.tensor(1), "empty": torch.ones(0, 3)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    path = tmp_path / "m.safetensors"
    save_file(tensors, path, metadata=header(tensors, {}))
    verify([path], {})
    meta = json.loads(header(tensors, {})["lowdim"])
    for name in tensors:
        wrong = {"lowdim": json.dumps({**meta, "checksums": {**meta["checksums"], name: "xxh3:6:0"}})}
        save_file(tensors, path, metadata=wrong)
        with pytest.raises(CheckpointError, match=f"tensor {name} differs"):
            verify([path], {})


def test_a_file_of_empty_tensors(tmp_path):
    tensors = {"empty": torch.ones(0, 3)}
    save_file(tensors, tmp_path / "m.safetensors", metadata=header(tensors, {}))
    verify([tmp_path / "m.safetensors"], {})


def _blake(tensor):
    """Of the first version: eight bytes of BLAKE2b over dtype, shape and bytes."""
    kind, raw = _kind_and_bytes(tensor)
    return hashlib.blake2b(kind + raw, digest_size=8).hexdigest()


def _crc(tensor):
    """Afterwards: CRC-32 of the same, and the number of bytes."""
    kind, raw = _kind_and_bytes(tensor)
    return f"crc32:{len(raw):x}:{zlib.crc32(kind + raw):08x}"


def _xxh3(tensor):
    """Now: XXH3 of the same, in 64 bits."""
    kind, raw = _kind_and_bytes(tensor)
    return f"xxh3:{len(raw):x}:{xxhash.xxh3_64_hexdigest(kind + raw)}"


def _kind_and_bytes(tensor):
    return f"{tensor.dtype}{tuple(tensor.shape)}".encode(), tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("checksum", [_blake, _crc, _xxh3])
def test_files_of_each_version(tmp_path, checksum, flip):
    model = welore(tiny.llama(), WeLoreConfig(threshold=0.6))
    save_compressed(model, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    record = json.loads(meta["lowdim"])
    ours = dict(record["checksums"])
    record["checksums"] |= {name: checksum(tensor) for name, tensor in tensors.items()}
    assert (record["checksums"] == ours) == (checksum is _xxh3)
    if flip:
        next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, metadata={**meta, "lowdim": json.dumps(record)})
    if flip:
        with pytest.raises(CheckpointError, match="damaged"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_file_with_checksums_of_two_kinds_is_damaged(tmp_path):
    tensors = {"layer.A": torch.ones(4, 3), "rest": torch.ones(2)}
    meta = header(tensors, {"layer": {"rank": 4}})
    record = json.loads(meta["lowdim"])
    record["checksums"]["rest"] = _crc(tensors["rest"])
    save_file(tensors, tmp_path / "m.safetensors", metadata={"lowdim": json.dumps(record)})
    with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged: tensor rest"):
        verify([tmp_path / "m.safetensors"], {"layer": {"rank": 4}})
