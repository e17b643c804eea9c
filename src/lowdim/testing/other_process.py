"""A second Python process that loads saved adapters, so that a test sees what a user's next session sees.

One process serves all tests of a run: importing torch takes seconds.
"""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import traceback
from pathlib import Path

import torch

__all__ = ["load_elsewhere", "sample_input", "small_model"]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Two linear layers of different shape and a head, the same numbers for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second, head = torch.nn.Linear(8, 12), torch.nn.Linear(12, 6), torch.nn.Linear(6, 3)
    body = torch.nn.ModuleDict({"first": first, "second": second})
    model = _Small(body, head)
    return model if dtype == torch.float32 else model.to(dtype)


def sample_input(rows: int = 5, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows for `small_model`."""
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def load_elsewhere(folder: Path, module: str, seed: int = 0) -> torch.Tensor:
    """The output of `small_model(seed)` with the adapter in `folder`, computed in another process.

    Args:
        module: imported there first, so that the method is registered.

    Raises:
        RuntimeError: with the other process's traceback.
    """
    from safetensors.torch import load_file

    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    result = folder / "output.safetensors"
    job = {"folder": str(folder), "module": module, "seed": seed, "result": str(result)}
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if answer != "done\n":
        raise RuntimeError(f"the other process failed:\n{json.loads(answer) if answer else 'it ended'}")
    return load_file(result)["y"]


class _Small(torch.nn.Module):
    def __init__(self, body: torch.nn.ModuleDict, score: torch.nn.Module):
        super().__init__()
        self.body, self.score = body, score

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(torch.tanh(self.body["second"](torch.tanh(self.body["first"](x)))))


@functools.cache
def _process() -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lowdim.testing.other_process"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    process.communicate()


def _serve() -> None:
    import importlib

    from safetensors.torch import save_file

    import lowdim

    for line in sys.stdin:
        try:
            job = json.loads(line)
            importlib.import_module(job["module"])
            model = small_model(job["seed"])
            lowdim.load_adapter(model, job["folder"])
            with torch.no_grad():
                save_file({"y": model(sample_input())}, job["result"])
            print("done", flush=True)
        except Exception:
            print(json.dumps(traceback.format_exc()), flush=True)


if __name__ == "__main__":
    _serve()
