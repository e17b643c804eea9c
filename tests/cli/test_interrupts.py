"""However a command is ended, it says so in one line with the usual code; and no output ends it."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from lowdim.cli.terminal import forgiving_output
from lowdim.interrupts import interruptible, was_interrupted


def wait_for_signal():
    """Not `signal.pause()`, which never ends where the signal is ignored, as under nohup."""
    for _ in range(3000):
        time.sleep(0.01)


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize(("number", "code"), CODES.items(), ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("how", ["raised", "wrapped", "as an exit of typer"])
def test_a_signal_is_one_line_and_its_code(number, code, how, capsys):
    arguments = ["run", "a b.yaml"]

    def work():
        with interruptible(arguments), interruptible(arguments):  # of the entry point, and of `main`
            try:
                os.kill(os.getpid(), number)
                wait_for_signal()
            except KeyboardInterrupt:
                assert was_interrupted()
                if how == "as an exit of typer":
                    raise SystemExit(130) from None
                raise

    before = [signal.getsignal(n) for n in CODES]
    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == code
    assert capsys.readouterr().err == "interrupted; finished work is kept. To resume: lowdim run 'a b.yaml' --resume\n"
    assert [signal.getsignal(n) for n in CODES] == before
    assert not was_interrupted()


def test_a_library_that_turns_an_interruption_into_an_error(call, monkeypatch):
    from lowdim import catalogue

    def entries():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_signal()
        except KeyboardInterrupt:
            raise RuntimeError("worker died") from None

    monkeypatch.setattr(catalogue, "entries", entries)
    code, _, err = call("list")
    assert (code, err) == (143, "interrupted; nothing was written. To try again: lowdim list\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "interrupted"),
        (["compare", "--out", "x", "--resume"], "To resume: lowdim compare --out x --resume"),
        (["export", "a", "b"], "interrupted; nothing was written. To try again: lowdim export a b"),
        (["compare", "--data", "x" * 2000], "To resume: the same command with --resume"),
    ],
)
def test_the_line_says_how_to_go_on(arguments, line, capsys):
    with pytest.raises(SystemExit), interruptible(arguments):
        raise KeyboardInterrupt
    assert capsys.readouterr().err.rstrip("\n").endswith(line)


def test_what_is_ignored_stays_ignored():
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    try:
        with interruptible(["run", "x"]):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_in_another_thread_nothing_is_installed():
    seen = []

    def work():
        with interruptible(["run"]):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, id=n.name, marks=[pytest.mark.slow] * (n.name != "SIGTERM")) for n in CODES],
)
def test_a_command_is_ended(number, tmp_path):
    """As a process, in the middle of the work that the signal interrupts."""
    (tmp_path / "recipe.yaml").write_text("model: stories260k\ntask: causal-lm\ndata: lowdim:shakespeare\nsteps: 5000\n")
    code = (
        "import sys\nfrom lowdim.train import run\nimport lowdim.__main__ as m\nreal = run._train\n"
        "def tell(*words):\n    print('ready', flush=True)\n    return real(*words)\n"
        "run._train = tell\nsys.argv = ['lowdim', 'run', 'recipe.yaml', '--out', 'out']\nm.start()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "ready" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number], err
    assert err.splitlines()[-1].endswith("To resume: lowdim run recipe.yaml --out out --resume")
    assert sorted(p.name for p in tmp_path.iterdir()) in (["out", "recipe.yaml"], ["recipe.yaml"]), "the lock is gone"


def test_a_signal_in_code_that_is_executed():
    """As in every dataclass: Python forgets the exit code where a plain KeyboardInterrupt passes through `exec`."""
    code = (
        "from lowdim.interrupts import interruptible\n"
        "with interruptible(['list']):\n"
        "    exec('import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "interrupted; nothing was written. To try again: lowdim list\n")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_any_encoding_shows_any_text(encoding, monkeypatch):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    text = "★ lora ≈ 0.5 ± 0.1 — “größer” │ ━ 中 \ud800 …"
    with forgiving_output():
        sys.stdout.write(text)
    assert sys.stdout is stream
    got = raw.getvalue().decode(encoding)
    assert len(got) == len(text), "columns stay in line"
    if encoding == "ascii":
        assert got == '* lora ~ 0.5 ~ 0.1 - "groer" | - ? ? .'.replace("groer", "gro?er")
    if encoding == "utf-8":
        assert got == text.replace("\ud800", "?")


@pytest.mark.parametrize("arguments", [["list"], ["plan", "--model", "stories260k", "--methods", "lora", "--json"]])
def test_a_reader_that_goes_away(arguments, tmp_path):
    """As `| head -1`: the command ends as usual."""
    command = [sys.executable, "-m", "lowdim", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read().decode() == ""
    assert process.wait(timeout=60) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_behind_the_output_is_an_error():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "lowdim", "list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")
