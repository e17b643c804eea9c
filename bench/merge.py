"""Merging a LoRA into a model's files against copying them: seconds, and the memory that each needs at its peak.

Both are done in processes of their own, in turns, and synced to the disk, so both wait for the same disk. Both have torch's own
number of threads, as users have: OMP_NUM_THREADS is not handed on. The model is random, of 1 GB in bfloat16 unless `--bytes`
says otherwise; every linear layer is adapted.

Run: `python bench/merge.py [--runs 3] [--bytes 1e9] [--out results/merge.json]`
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TARGET = 2.0  # times the seconds of copying
#: What a process does: `{work}`, between two looks at its clock and at the memory that it has, or had at its peak.
MEASURED = """
import json, re, resource, sys, time
from pathlib import Path
{before}
def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
base, adapter, out = map(Path, sys.argv[1:])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
start, begun, used = kilobytes("VmRSS"), time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
{work}
spent, used = time.perf_counter() - begun, sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used
print(json.dumps({{"seconds": spent, "cpu": used, "megabytes": (kilobytes("VmHWM") - start) / 1024}}))
"""
COPY = MEASURED.format(
    before="import os, shutil, torch, transformers",
    work="""
out.mkdir()
for file in sorted(base.iterdir()):
    shutil.copyfile(file, out / file.name)
    with open(out / file.name, "rb") as stream:
        os.fsync(stream.fileno())
""",
)
MERGE = MEASURED.format(
    before="""
import lowdim.adapters, lowdim.export, lowdim.models, peft, torch, transformers
from transformers import LlamaForCausalLM
from lowdim.jobs import ExportSettings, export
""",
    work='export(ExportSettings(adapter=adapter, out=out, model=str(base), format="merged"))',
)


def write_base(folder: Path, size: float, shard: str) -> None:
    """A random Llama of about `size` bytes in bfloat16, as wide as a model of a billion parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, words = 2048, 5632, 32000
    layer = 4 * hidden * hidden + 3 * hidden * inner
    layers = max(1, round((size / 2 - 2 * words * hidden) / layer))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=words,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(folder, max_shard_size=shard)


def write_adapter(folder: Path, base: Path, rank: int) -> None:
    """A LoRA of every linear layer, as PEFT writes it."""
    import torch
    from safetensors.torch import save_file

    from lowdim.models import resolve, skeleton
    from lowdim.surgery import find_layers

    model = skeleton(resolve(str(base)), "LlamaForCausalLM")
    assert model is not None
    tensors = {}
    for i, (name, layer) in enumerate(find_layers(model).items()):
        generator = torch.Generator().manual_seed(i)
        rows, columns = layer.weight.shape
        tensors[f"base_model.model.{name}.lora_A.weight"] = 0.02 * torch.randn(rank, columns, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
    about["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(about))


def measured(code: str, *arguments: Path) -> dict[str, float]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--bytes", type=float, default=1e9)
    parser.add_argument("--shard", default="300MB")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import torch
    import transformers

    found: dict[str, list[dict[str, float]]] = {"copy": [], "merge": []}
    with tempfile.TemporaryDirectory() as place:
        base, adapter = Path(place) / "base", Path(place) / "adapter"
        write_base(base, options.bytes, options.shard)
        write_adapter(adapter, base, options.rank)
        files = sorted(base.glob("*.safetensors"))
        sizes = [file.stat().st_size / 1e6 for file in files]
        for turn in range(options.runs + 1):  # the first turn fills the disk cache and is not counted
            for name, code in (("copy", COPY), ("merge", MERGE)):
                out = Path(place) / f"{name}-{turn}"
                one = measured(code, base, adapter, out)
                if turn:
                    found[name].append(one)
                subprocess.run(["rm", "-rf", str(out)], check=True)
    seconds = {name: round(statistics.median(one["seconds"] for one in each), 2) for name, each in found.items()}
    peak = {name: round(max(one["megabytes"] for one in each)) for name, each in found.items()}
    record = {
        "command": f"python bench/merge.py --runs {options.runs}",
        "model": {"megabytes": round(sum(sizes)), "files": len(sizes), "largest_file": round(max(sizes)), "dtype": "bfloat16"},
        "adapter": f"LoRA of rank {options.rank} on every linear layer",
        "runs": options.runs,
        "median_seconds": seconds,
        "all_seconds": {name: [round(one["seconds"], 2) for one in each] for name, each in found.items()},
        "median_cpu_seconds": {name: round(statistics.median(one["cpu"] for one in each), 2) for name, each in found.items()},
        "times_copying": round(seconds["merge"] / seconds["copy"], 2),
        "targets": {"times_copying": TARGET, "peak_megabytes_above_start": round(max(sizes) + 200)},
        "peak_megabytes_above_start": peak,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cores": os.cpu_count(),
            "threads": "all",
        },
    }
    print(json.dumps(record, indent=1))
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
