"""Plant every fault, one at a time, in a copy of the package, and run the tests that should catch it.

    python tests/mutants/run.py [--only TEXT ...] [--jobs 2] [--timeout 60] [--out results/mutants.json]

A fault that no test catches is a survivor. At the end the tests that caught the faults run once without one, and must pass. The
exit code is 1 where there are survivors, or where a fault could not be planted or its tests could not run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lowdim.files import read_json, write_json
from lowdim.train.environment import environment
from mutants import shared
from mutants.faults import adapters, layers, numerics, optim, others
from mutants.planting import BROKEN, CAUGHT, ROOT, SURVIVED, TIMED_OUT, Copy, Fault, Outcome, Tests

FAULTS = [*shared.FAULTS, *adapters.FAULTS, *optim.FAULTS, *layers.FAULTS, *numerics.FAULTS, *others.FAULTS]


class Runner:
    """Runs faults on copies of the sources, one copy for each worker."""

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder, timeout
        self.local = threading.local()
        self.copies: list[Copy] = []

    def copy(self) -> Copy:
        """This worker's copy."""
        if not hasattr(self.local, "copy"):
            self.local.copy = Copy(Path(tempfile.mkdtemp(dir=self.folder)))
            self.copies.append(self.local.copy)
        return self.local.copy

    def close(self) -> None:
        """Close the copies."""
        for copy in self.copies:
            copy.close()

    def one(self, fault: Fault) -> tuple[Fault, Outcome]:
        """Plant one, and run its tests."""
        try:
            with self.copy().planted(fault):
                outcome = self.copy().run(fault.tests, self.timeout)
        except ValueError as error:
            outcome = Outcome(BROKEN, 0.0, str(error))
        print(f"{outcome.status:9} {outcome.seconds:5.1f} s  {fault.file}  {fault.what}", flush=True)
        if outcome.status != CAUGHT:
            print(f"          - {fault.old!r}\n          + {fault.new!r}", flush=True)
        if outcome.status == BROKEN:
            print("\n".join(f"          {text}" for text in outcome.output.splitlines()[-6:]), flush=True)
        return fault, outcome

    def checked(self, found: list[tuple[Fault, Outcome]]) -> list[tuple[Fault, Outcome]]:
        """The same, where a test that also fails without a fault has caught nothing."""
        nodes = [node.removeprefix("tests/") for _, outcome in found if outcome.status == CAUGHT for node in outcome.failed]
        if not nodes:
            return found
        plain = self.copy().run(Tests(tuple(dict.fromkeys(nodes))), 30 * self.timeout, to_the_end=True)
        if plain.status == SURVIVED:
            return found
        print(f"tests that fail without a fault, too:\n{plain.output[-3000:]}", flush=True)
        broken = set(plain.failed) if plain.status == CAUGHT else {f"tests/{node}" for node in nodes}
        return [
            (fault, Outcome(BROKEN, outcome.seconds, outcome.output) if broken & set(outcome.failed) else outcome)
            for fault, outcome in found
        ]


def record(fault: Fault, outcome: Outcome) -> dict[str, object]:
    """What is written of one fault."""
    return {
        "what": fault.what,
        "file": f"src/lowdim/{fault.file}",
        "line": fault.line() if outcome.failed or outcome.status != BROKEN else None,
        "old": fault.old,
        "new": fault.new,
        "tests": [f"tests/{node}" for node in fault.tests.nodes],
        "keyword": fault.tests.keyword,
        "shared_case_alone": fault.tests.shared,
        "status": outcome.status,
        "caught_by": outcome.failed[0] if outcome.status == CAUGHT else None,
        "seconds": round(outcome.seconds, 1),
    }


def main() -> int:
    """Run, report, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="faults whose file or description holds one of these; the record keeps the others",
    )
    parser.add_argument("--jobs", type=int, default=2, help="test runs at a time")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for the tests of one fault")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mutants.json", help="where the record goes")
    given = parser.parse_args()
    chosen = [fault for fault in FAULTS if any(text in fault.file or text in fault.what for text in given.only)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        runner = Runner(Path(folder), given.timeout)
        found = list(pool.map(runner.one, chosen))
        found = runner.checked(found)
        runner.close()
    rows = {row["what"]: row for row in read_json(given.out)["faults"]} if given.out.is_file() and given.only != [""] else {}
    rows.update({fault.what: record(fault, outcome) for fault, outcome in found})
    rows = {fault.what: rows[fault.what] for fault in FAULTS if fault.what in rows}
    counts = Counter(row["status"] for row in rows.values())
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"of {len(rows)}")
    for fault, outcome in found:
        if outcome.status == SURVIVED:
            print(f"survived: src/lowdim/{fault.file}:{fault.line()}  {fault.what}")
    write_json(
        given.out,
        {
            "planted": len(rows),
            **{status.replace(" ", "_"): counts[status] for status in (CAUGHT, SURVIVED, BROKEN, TIMED_OUT)},
            "environment": environment(),
            "faults": list(rows.values()),
        },
    )
    return int(counts[CAUGHT] != len(rows))


if __name__ == "__main__":
    sys.exit(main())
