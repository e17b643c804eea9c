"""Kill commands at every write and at random moments, resume them, and compare every bit with a run in peace.

`make kill-sweep` runs it all and writes `results/kill-sweep.json`; `tests/test_kill_sweep.py` takes a sample. One process
imports everything once and is forked for each command, which needs a system with `fork`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SMALL = {
    "model": "stories260k", "task": "causal-lm", "method": "lora", "data": "text.txt", "max_length": 32, "limit": 16,
    "steps": 6, "batch_size": 2, "lr": 0.01, "save_steps": 2, "out": "out",
}  # fmt: skip
_RECIPES: dict[str, dict[str, Any]] = {
    "run lora": {},
    "pretrain galore": {"task": "pretrain", "method": "galore", "options": {"rank": 4, "update_interval": 3}},
    "pretrain galore, accumulating": {"task": "pretrain", "method": "galore", "gradient_accumulation": 2, "save_steps": 3},
}
_COMPARE = (
    "compare --model stories260k --task causal-lm --data text.txt --methods lora,full --seeds 2 --rates 2 --sizes 1 --steps 6 "
    "--max-length 32 --batch-size 2 --out out"
)
SCENARIOS = ("compare", *_RECIPES)
#: What a clock decides, or what was typed.
_TIMED = {"seconds_per_step", "measured_peak_bytes", "created", "seconds", "command", "checksum"}


@dataclass
class Outcome:
    """A scenario's kills: how many at writes and at random, and what was wrong afterwards.

    `writes` are all of a run in peace, and `states` those before which the files differ.
    """

    scenario: str
    writes: int
    states: int
    at_writes: int = 0
    at_random: int = 0
    wrong: list[str] = field(default_factory=list)


def sweep(
    scenario: str, place: Path, *, every: int = 1, at_random: int = 25, seed: int = 0, say: Callable[[str], None]
) -> Outcome:
    """Resume from what a kill at each `every`-th write leaves, and from kills at random moments; compare all files.

    What a kill before a write leaves is copied while the run goes on: SIGKILL changes no file.
    """
    begun = time.monotonic()
    states = place / "states"
    states.mkdir()
    _fork(scenario, place / "whole", resume=False, states=states)
    seconds = time.monotonic() - begun
    want = contents(place / "whole")
    left = sorted((path for path in states.iterdir() if path.is_dir()), key=lambda path: int(path.name))
    outcome = Outcome(scenario, int((states / "writes").read_text()), len(left))
    draw = random.Random(f"{scenario}/{seed}")
    for state in left[draw.randrange(every) :: every]:
        outcome.at_writes += 1
        _resume(outcome, state, want, f"write {state.name} of {outcome.writes}", say)
    for number in range(at_random):
        folder, delay = place / f"killed-{number}", draw.uniform(0, seconds)
        _fork(scenario, folder, resume=False, delay=delay)
        outcome.at_random += 1
        _resume(outcome, folder, want, f"{delay:.2f} s", say)
    return outcome


def _resume(outcome: Outcome, folder: Path, want: dict[str, Any], moment: str, say: Callable[[str], None]) -> None:
    """Resume what was killed, compare, and remove it."""
    code = _fork(outcome.scenario, folder, resume=True)
    problem = f"--resume ends with {code}" if code else _difference(contents(folder), want)
    if problem:
        outcome.wrong.append(f"killed at {moment}: {problem}")
    say(f"{outcome.scenario}: {moment}: {problem or 'equal'}")
    shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, Any]:
    """All that matters of the files below a folder, by their names: bytes, or a record without times."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in ("log", "text.txt")):
        name = path.relative_to(folder).as_posix()
        if "checkpoint-" in name and path.suffix != ".safetensors":
            found[name] = None  # its name only: pickles hold addresses
        elif path.name in ("comparison.json", "run.json", "settings.json"):
            found[name] = _timeless(json.loads(path.read_text(encoding="utf-8")))
        else:
            found[name] = None if path.suffix == ".html" else path.read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in _TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _difference(got: dict[str, Any], want: dict[str, Any]) -> str:
    more, less = sorted(got.keys() - want.keys()), sorted(want.keys() - got.keys())
    other = [name for name in want if name in got and got[name] != want[name]]
    parts = (("left over", more), ("missing", less), ("other bits in", other))
    return "; ".join(f"{what} {', '.join(names)}" for what, names in parts if names)


def _fork(scenario: str, folder: Path, *, resume: bool, delay: float | None = None, states: Path | None = None) -> int:
    """Run a command in a copy of this process; returns its exit code (-9: killed)."""
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        _command(scenario, folder, resume, states)  # does not come back
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _command(scenario: str, folder: Path, resume: bool, states: Path | None) -> None:
    code: Any = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        arguments = _arguments(scenario)
        writes = None if states is None else _Writes(folder, states)
        from lowdim.cli.main import main

        try:
            main([*arguments, *(["--resume"] if resume else [])])
        except SystemExit as end:
            code = end.code or 0
        if writes is not None:
            writes.finish()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _arguments(scenario: str) -> list[str]:
    """The command line, in a folder with what it reads."""
    from lowdim.models import assets

    if not (text := Path("text.txt")).exists():
        text.write_text((assets() / "shakespeare" / "sample.txt").read_text(encoding="utf-8")[:6000], encoding="utf-8")
    if scenario == "compare":
        return _COMPARE.split()
    recipe = Path("recipe.yaml")
    if not recipe.exists():  # JSON is YAML
        recipe.write_text(json.dumps({**_SMALL, **_RECIPES[scenario]}))
    return ["run", "recipe.yaml"]


class _Writes:
    """Copies a folder, as a kill would leave it, before each of this process's writes into it that finds it changed.

    Compiled code of torch and safetensors opens files unseen; the Python functions that call it are watched instead.
    """

    def __init__(self, folder: Path, states: Path):
        import safetensors.torch
        import torch

        self.folder, self.states = folder, states
        self.count, self._busy, self._last = 0, False, ""
        torch.save = self._watched(torch.save)
        safetensors.torch.serialize_file = self._watched(safetensors.torch.serialize_file)
        sys.addaudithook(self._hook)

    def finish(self) -> None:
        """Keep the number of writes."""
        self._busy = True
        (self.states / "writes").write_text(str(self.count))

    def _hook(self, event: str, words: tuple[Any, ...]) -> None:
        if event == "open":
            wanted = (words[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            wanted = event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.chmod")
        if wanted and not self._busy and isinstance(words[0], (str, bytes, os.PathLike)):
            name = os.path.abspath(os.fsdecode(words[0]))
            if name.startswith(f"{self.folder}{os.sep}"):
                self._before()

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **keywords: Any) -> Any:
            self._before()
            return function(*args, **keywords)

        return call

    def _before(self) -> None:
        self._busy = True
        self.count += 1
        now = _digest(self.folder)
        if now != self._last:
            shutil.copytree(self.folder, self.states / str(self.count))
        self._last, self._busy = now, False


def _digest(folder: Path) -> str:
    rows = [(str(path), path.is_dir() or path.read_bytes()) for path in sorted(folder.rglob("*")) if path.name != "log"]
    return hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()


def prepare(place: Path) -> None:
    """Import everything once, on one thread, so that copies of this process can start at once."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch
    import transformers.trainer  # noqa: F401

    import lowdim.cli.main
    import lowdim.comparison.runner
    import lowdim.plan
    import lowdim.report
    import lowdim.train.run
    import lowdim.train.trainer  # noqa: F401

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/kill-sweep.json"))
    parser.add_argument("--every", type=int, default=1, help="take each so many-th write")
    parser.add_argument("--random", type=int, default=7, help="kills at random moments, for each scenario")
    parser.add_argument("--scenarios", nargs="*", default=SCENARIOS, choices=SCENARIOS)
    given = parser.parse_args()
    from lowdim.files import write_json

    outcomes = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        for number, scenario in enumerate(given.scenarios):
            place = Path(temporary) / str(number)
            place.mkdir()
            say = lambda line: print(line, flush=True)  # noqa: E731
            outcomes.append(sweep(scenario, place, every=given.every, at_random=given.random, say=say))
            write_json(given.out, _record(outcomes, begun))
    record = _record(outcomes, begun)
    print(f"{record['equal']} of {record['kills']} kills gave equal bits; written {given.out}")
    sys.exit(record["equal"] < record["kills"])


def _record(outcomes: list[Outcome], begun: float) -> dict[str, Any]:
    from lowdim.train.environment import environment

    kills = sum(outcome.at_writes + outcome.at_random for outcome in outcomes)
    wrong = sum(len(outcome.wrong) for outcome in outcomes)
    return {
        "what": "commands killed at every write (states of the files) and at random (SIGKILL), then resumed: all bits equal?",
        "kills": kills, "equal": kills - wrong, "scenarios": [vars(outcome) for outcome in outcomes],
        "environment": environment(), "seconds": round(time.monotonic() - begun),
    }  # fmt: skip


if __name__ == "__main__":
    main()
