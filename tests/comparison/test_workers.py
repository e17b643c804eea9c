"""Runs of a comparison that several workers train: the same tree, numbers and files as in one process, whoever is lost."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

from comparing import dies, numbers, own, quadrants, records, run, same
from lowdim.catalogue import variants
from lowdim.comparison import hiring, runner
from lowdim.comparison.crew import Alone
from lowdim.comparison.live import LiveTable
from lowdim.comparison.runs import Run
from lowdim.errors import LowdimError, MissingExtraError


@pytest.fixture
def started():
    """The processes that the test has started and that still run; other tests of this process may keep one."""
    before = set(multiprocessing.active_children())
    return lambda: [each for each in multiprocessing.active_children() if each not in before]


class Disorderly(Alone):
    """Three runs at once, of which the last that was started ends first."""

    size = 3

    def begin(self, bench):
        super().begin(bench)
        self.queue, self.most = [], 0

    def start(self, run, on_step):
        self.queue.append(run)
        self.most = max(self.most, len(self.queue))

    def ended(self, on_step):
        super().start(self.queue.pop(), on_step)
        return super().ended(on_step)


def test_the_order_in_which_runs_end_changes_nothing(whole, make, tmp_path, monkeypatch):
    crew = Disorderly()
    monkeypatch.setattr(runner, "hired", lambda settings: contextlib.nullcontext(crew))
    result, said = run(make(), tmp_path / "out")
    assert crew.most == 3
    same(tmp_path / "out", whole[0], result, whole[1])
    assert said.count("(5 steps) [") == len(records(whole[0], "rung-5"))


def test_a_run_can_be_sent_to_another_process():
    for chosen in variants().values():
        sent = Run(chosen, "trial", 1, 1e-3, 0, 6, 4, 50)
        assert ForkingPickler.loads(ForkingPickler.dumps(sent)) == sent


def test_an_error_can_be_sent_from_another_process():
    error = MissingExtraError("ray", "ray", "--ray")
    assert str(ForkingPickler.loads(ForkingPickler.dumps(error))) == str(error)


@pytest.mark.parametrize(
    ("asked", "threads"),
    [
        ({}, 8),
        ({"workers": 1}, 8),
        ({"workers": 3}, 2),
        ({"workers": 20}, 1),
        ({"workers": 2, "threads": 5}, 5),
        ({"ray": "auto"}, 1),
    ],
)
def test_the_threads_of_a_training(asked, threads, make, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert hiring.threads_of(make(**asked)) == threads


def test_threads_are_those_of_before_afterwards():
    before = torch.get_num_threads()
    with hiring.limited_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert hiring.environment()["cores"] == before + 1
    assert torch.get_num_threads() == hiring.environment()["cores"] == before


@pytest.mark.parametrize("asked", [{"workers": 0}, {"workers": "2"}, {"threads": -1}])
def test_settings_that_make_no_sense(asked, make):
    (name,) = asked
    with pytest.raises(ValueError, match=f"--{name} must be an int >= 1"):
        make(**asked)


def test_a_run_that_is_lost_twice_ends_the_comparison():
    crew, run = Alone(), Run(next(iter(variants().values())), "seed", 0, 1e-3, 0, 6)
    with pytest.warns(UserWarning, match=rf"lost while it trained {run.name} \(no memory\); another one trains it again"):
        crew.lost(run, "no memory")
    with pytest.raises(LowdimError, match=rf"lost twice while it trained {run.name} \(no memory\).*--resume.*fewer --workers"):
        crew.lost(run, "no memory")


# --- real processes --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes(whole, make, tmp_path, started):
    out = tmp_path / "out"
    result, _ = run(make(workers=2), out)
    same(out, whole[0], result, whole[1])
    assert not started()
    again, said = run(make(), out, resume=True)
    assert said.count("(finished before)") == len(records(whole[0])), "and one process goes on with what two began"
    assert numbers(again["search"]) == numbers(whole[1]["search"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a worker was lost")
@pytest.mark.parametrize("tick", [3, 12])
def test_one_of_two_processes_is_killed(tick, whole, make, tmp_path, monkeypatch, started):
    ticks, original, killed = [0], LiveTable.tick, []

    def kill(self):
        ticks[0] += 1
        if ticks[0] == tick:
            victim = started()[0]
            victim.kill()
            killed.append(victim.pid)
        original(self)

    monkeypatch.setattr(LiveTable, "tick", kill)
    result, _ = run(make(workers=2), tmp_path / "out")
    assert killed
    same(tmp_path / "out", whole[0], result, whole[1])


@pytest.mark.slow
def test_a_run_whose_process_dies_once_is_taken_up(tmp_path):
    expected = own(tmp_path / "one", quadrants())
    with pytest.warns(UserWarning, match="ended by SIGKILL, as the system does when memory is short"):
        found = own(tmp_path / "two", quadrants(dies(tmp_path / "died")), workers=2)
    assert (tmp_path / "died").exists()
    for part in ("methods", "search", "judgement"):
        assert numbers(found.to_dict()[part]) == numbers(expected.to_dict()[part])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:a worker was lost")
def test_a_run_whose_process_dies_twice(tmp_path, started):
    with pytest.raises(LowdimError, match=r"lost twice while it trained \w+/lr-\S+ \(its process was ended by SIGKILL"):
        own(tmp_path / "out", quadrants(dies()), workers=2)
    assert not started()
    assert not [path for path in tmp_path.rglob("*") if path.name in ("run.json", "comparison.json") or path.suffix == ".tmp"]
    found = own(tmp_path / "out", quadrants(), resume=True)
    assert found.winner


@pytest.mark.slow
def test_what_cannot_be_sent(tmp_path, started):
    task = quadrants()
    task.unsendable = (each for each in ())
    with pytest.raises(LowdimError, match=r"--workers: the model or the task cannot be sent .*generator"):
        own(tmp_path / "out", task, workers=2)
    assert not (tmp_path / "out").exists()
    assert not started()


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = (
        "import time\n"
        "from lowdim.comparison.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    crew = Processes(2, 1)\n"
        "    crew.call()\n"
        "    print(*[member._ready.result() for member in crew._members], flush=True)\n"
        "    time.sleep(600)\n"
    )
    file = tmp_path / "first.py"
    file.write_text(code)
    first = subprocess.Popen([sys.executable, file], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    workers = [int(word) for word in first.stdout.readline().split()]
    assert len(workers) == 2
    first.kill()
    first.wait()
    assert ends(lambda: not any(_runs(pid) for pid in workers))


def ends(condition, seconds=20):
    """Whether a condition comes true in some seconds."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


def _group(pid):
    try:
        return os.getpgid(int(pid))
    except OSError:
        return None


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_script_without_a_guard(tmp_path):
    file = tmp_path / "script.py"
    file.write_text(
        "import lowdim\n"
        "lowdim.compare(model='stories260k', task='causal-lm', data='lowdim:shakespeare', limit=40, methods='lora', steps=3,\n"
        f"               out={str(tmp_path / 'out')!r}, workers=2)\n"
    )
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "must do so under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_interrupted_command_leaves_no_process(number, code, make, tmp_path):
    settings, out = make(), tmp_path / "out"
    options = ["--model", settings.model, "--data", settings.data[0], "--steps", "5", "--batch-size", "8", "--out", str(out)]
    command = [sys.executable, "-m", "lowdim", "compare", *options, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not list(out.rglob("run.json")):
        time.sleep(0.05)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == code
    assert [line for line in said.splitlines() if not line.startswith("note: ")] == [said.splitlines()[-1]], said
    assert "interrupted; finished work is kept. To resume: lowdim compare" in said
    mine = [each for each in os.listdir("/proc") if each.isdigit() and _group(each) == process.pid]
    assert ends(lambda: not any(map(_runs, mine)))
    assert not list(out.rglob("*.tmp"))
