"""The command line as a whole: its frozen options, and one clear message with exit code 2 for whatever is wrong."""

import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

import lowdim
from lowdim.cli import app
from lowdim.cli.main import main
from lowdim.cli.once import is_number

COMMANDS = {
    "list": {"name", "--available", "--can", "--json"},
    "plan": {
        "--model", "--budget", "--methods", "--task", "--batch-size", "--length", "--dtype", "--gradient-checkpointing",
        "--rank", "--layerwise", "--accumulate", "--tokenizer", "--classes", "--layers", "--json", "--master-weights",
        "--quantize", "--optimizer", "--devices", "--fit", "--write-recipes", "--data", "--ffn", "--mixer", "--rates",
        "--ranks", "--bf16",
    },
    "compare": {
        "--model", "--data", "--eval", "--task", "--tokenizer", "--text", "--label", "--methods", "--budget", "--metric",
        "--label-separator", "--seeds",
        "--rates", "--sizes", "--equal", "--search", "--prefer", "--validation", "--answer-pattern", "--keep", "--report-to",
        "--steps", "--batch-size", "--max-length", "--time-limit", "--seed", "--out", "--resume",
        "--workers", "--threads", "--ray", "--quantize", "--optimizer", "--compress", "--ranks", "--bf16", "--group-by-length",
    },
    "run": {
        "recipe", "--out", "--resume", "--steps", "--check", "--master-weights", "--quantize", "--optimizer",
        "--task", "--model", "--data", "--method", "--ffn", "--mixer", "--watch", "--ranks",
    },
    "export": {"adapter", "out", "--model", "--format", "--rank", "--task", "--for", "--max-error", "--keep-mask"},
    "compress": {
        "--model", "--out", "--data", "--text", "--method", "--option", "--param-ratio", "--target", "--threshold",
        "--tune-steps", "--ratios",
        "--lr", "--samples", "--max-length", "--dense", "--stage", "--budget", "--steps", "--resume", "--check",
    },
    "diagnose": {
        "diagnostic", "model", "--base", "--tuned", "--data", "--option", "--k", "--threshold", "--batch-size", "--optimizer",
        "--layer", "--dims", "--search", "--seeds", "--out",
    },
    "sizes": {
        "model", "--data", "--beside", "--text", "--label", "--layers", "--dims", "--limit", "--within", "--vectors",
        "--repeats", "--seed", "--out",
    },
    "index-check": {"old", "new", "--labels", "--query", "--k", "--seed", "--out"},
    "report": {"source", "--out"},
    "reproduce": {"slug", "--data", "--quick", "--out"},
}  # fmt: skip


def test_commands_and_options_are_frozen():
    """A new option is a promise: it is added here on purpose."""
    found = {
        name: {p.opts[0] if p.param_type_name == "option" else p.name for p in command.params} - {"--help"}
        for name, command in typer.main.get_command(app).commands.items()
    }
    assert found == COMMANDS


def test_every_option_says_what_it_is():
    for name, command in typer.main.get_command(app).commands.items():
        assert command.help, name
        assert not [p.opts[0] for p in command.params if not getattr(p, "help", None)], name


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "list", "list adapters --available", "list --json", "compare --help", "lisst"],
)
def test_what_must_be_quick_imports_nothing_large(arguments):
    code = (
        "import sys\nfrom lowdim.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "large = {'torch', 'transformers', 'numpy', 'scipy', 'sklearn', 'pandas', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported {large}' if large else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-300:]


def test_version_and_help(call):
    assert call("--version")[:2] == (0, f"lowdim {lowdim.__version__}\n")
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in COMMANDS)


def test_usage_errors_of_the_command_line_itself():
    for arguments in (["compare", "--stepz", "3"], ["compare", "--steps", "many"], ["nothing"], ["plan"], ["run"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2, arguments


def options(kind):
    """The options of all commands: those with one value, or those that may be repeated."""
    return [
        (name, option)
        for name, command in typer.main.get_command(app).commands.items()
        for option in command.params
        if option.param_type_name == "option" and not option.is_flag and option.multiple == (kind == "repeatable")
    ]


@pytest.mark.parametrize("spelling", ["{0} 1 {0} 2", "{0}=1 {0}=1", "{0} 1 {0}=2 {0} 3"])
def test_an_option_with_one_value_is_refused_a_second_time(spelling):
    """The first value would be lost without a word."""
    single = [(command, option) for command, option in options("single") if not is_number(option)]
    assert len(single) > 25
    for command, option in single:
        result = CliRunner().invoke(app, [command, *spelling.format(option.opts[0]).split()], env={"COLUMNS": "200"})
        assert result.exit_code == 2, (command, option.opts)
        assert f"{option.opts[0]} is given {spelling.count('{0}')} times; it takes one value" in result.output


def test_of_a_number_given_again_the_last_counts_and_this_is_said():
    arguments = ["plan", "--model", "stories260k", "--methods", "lora", "--methods", "full", "--length", "8", "--length", "16"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "note: --length is given 2 times; the last value counts" in result.output
    assert "of 16 tokens" in " ".join(result.output.split())
    assert "LoRA" in result.output
    assert "Full fine-tuning" in result.output


@pytest.mark.parametrize("name", ["--rates", "--trials"])
def test_the_number_of_rates_may_be_given_again(name):
    """The option also takes a word, and one with another name, which is its former one."""
    arguments = ["compare", "--model", "minilm", "--data", "missing.csv", "--rates", "1", name, "2"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert "note: --rates is given 2 times; the last value counts" in result.output


def test_what_adds_up_is_repeatable():
    """`--text` twice is a pair of texts; flags say the same twice."""
    assert {(command, option.opts[0]) for command, option in options("repeatable")} == {
        ("compare", "--data"), ("compare", "--text"), ("compress", "--data"), ("compress", "--option"),
        ("diagnose", "--option"), ("diagnose", "--data"), ("sizes", "--data"),
        ("compare", "--methods"), ("plan", "--methods"), ("plan", "--data"), ("run", "--data"),
    }  # fmt: skip
    assert CliRunner().invoke(app, ["list", "--json", "--json"]).exit_code == 0


def test_interrupted_and_bugs(call, monkeypatch):
    from lowdim import catalogue

    def raise_(error):
        def entries():
            raise error

        monkeypatch.setattr(catalogue, "entries", entries)

    raise_(KeyboardInterrupt())
    code, _, err = call("list")
    assert code == 130
    assert "interrupted" in err
    raise_(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        main(["list"])
    raise_(PermissionError(13, "Permission denied", "/root/x"))
    assert call("list")[0] == 2


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(call, monkeypatch):
    import warnings

    from lowdim import catalogue

    rows = catalogue.entries()

    def entries():
        warnings.warn("mind the step", stacklevel=2)
        return rows

    monkeypatch.setattr(catalogue, "entries", entries)
    assert call("list")[2] == "note: mind the step\n"


def test_debug_shows_the_whole(monkeypatch):
    monkeypatch.setenv("LOWDIM_DEBUG", "1")
    with pytest.raises(ValueError, match="no family, system or method is called"):
        main(["list", "nothing"])


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("torch", "lowdim needs the package torch, which is not installed: pip install torch"),
        ("yaml", "lowdim needs the package pyyaml, which is not installed: pip install pyyaml"),
        ("transformers", "lowdim needs the package transformers, which is not installed: pip install 'lowdim[train]'"),
        ("sklearn.metrics", "lowdim needs the package scikit-learn, which is not installed: pip install 'lowdim[science]'"),
    ],
)
def test_a_missing_package_is_named_with_how_to_install_it(call, monkeypatch, module, message):
    from lowdim import catalogue

    def entries():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(catalogue, "entries", entries)
    assert call("list")[::2] == (2, f"error: {message}\n")


def test_a_module_of_our_own_that_is_missing_is_a_bug(monkeypatch):
    from lowdim import catalogue

    def entries():
        raise ModuleNotFoundError("No module named 'lowdim.nothing'", name="lowdim.nothing")

    monkeypatch.setattr(catalogue, "entries", entries)
    with pytest.raises(ModuleNotFoundError):
        main(["list"])


def test_a_message_is_short_and_cannot_move_the_cursor(call, monkeypatch):
    from lowdim import catalogue
    from lowdim.errors import DataError

    def entries():
        raise DataError("\x1b[2Jcolumn " + "a" * 100_000 + " end")

    monkeypatch.setattr(catalogue, "entries", entries)
    code, _, err = call("list")
    assert code == 2
    assert err.startswith("error: \\x1b[2Jcolumn aaa")
    assert err.endswith("aaa end\n")
    assert len(err) <= 2010
