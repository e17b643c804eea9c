"""Write what the docs show from elsewhere; `make tables` runs this.

Tables of the catalogue stand between `<!-- NAME: from the catalogue -->` and `<!-- end of NAME -->`, the files of docs/examples
between `<!-- FILE -->` and `<!-- end of FILE -->`, what the demo prints between `<!-- demo: from results/demo.json -->` and
`<!-- end of demo -->`, forecasts and measurements in the same way; nothing there is written by hand.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowdim.catalogue import FAMILIES, Entry, entries

ROOT = Path(__file__).resolve().parents[1]
WHAT = {
    "adapters": "the update of a frozen weight",
    "optim": "the gradient and the optimizer state",
    "layers": "the weight itself, from the start of training",
    "compress": "trained weights, activations, the KV cache",
    "represent": "features, labels and prediction heads",
    "diagnose": "what is measured: spectra, landscapes, dynamics",
    "solve": "linear systems, regression, matrix completion",
    "train": "the training loop",
}


def families(place: str) -> str:
    """One row for each family: what it makes low-dimensional, and its systems that work today."""
    lines = ["| family | what is made low-dimensional | systems that work today |", "| --- | --- | --- |"]
    for family in FAMILIES:
        names = ", ".join(_link(row, place) for row in entries() if row.family == family and row.available)
        if names:
            lines.append(f"| `lowdim.{family}` | {WHAT[family]} | {names} |")
    return "\n".join(lines)


def systems(place: str) -> str:
    """One row for each system that works today: its page, what to type, and what its paper claims; then the others by name."""
    lines = ["| system | family | what to type | what its paper claims |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        for row in entries():
            if row.family == family and row.available:
                claim = row.claim.replace("|", r"\|")
                lines.append(f"| {_link(row, place)} | {family} | {_typed(row)} | {claim} |")
    waiting = [row.name for row in entries() if not row.available]
    return "\n".join([*lines, "", f"Not built yet: {', '.join(waiting)}." if waiting else "All sixty are built."])


def _link(row: Entry, place: str) -> str:
    return f"[{row.name}]({place}{row.slug}.md)"


def _typed(row: Entry) -> str:
    """Method names where it can be trained by name, else the command or the public name."""
    if row.variants:
        return ", ".join(f"`{variant.name}`" for variant in row.variants)
    if row.family == "compress" and not row.python_only:
        return f"`lowdim compress --method {row.slug}`"
    if row.family == "diagnose":
        return f"`lowdim diagnose {row.slug}`"
    return f"`{row.target.replace(':', '.')}`"


#: Page, name of the table, how it is made, and where the systems' pages lie from there.
TABLES: tuple[tuple[Path, str, Callable[[str], str], str], ...] = (
    (ROOT / "README.md", "families", families, "docs/systems/"),
    (ROOT / "docs" / "choosing.md", "systems", systems, "systems/"),
)


#: The pages that show files of docs/examples, which files, and how their code is fenced: `py` is not run by itself.
EXAMPLES = (
    (ROOT / "docs" / "adding-a-system.md", "adding_a*.py", "python"),
    (ROOT / "docs" / "scaling.md", "scaling_*.py", "py"),
)


#: What `make demo` has found, and the columns of the terminal in which the README shows it.
DEMO = ROOT / "results" / "demo.json"
WIDTH = 100


def demo() -> str:
    """What the demo prints at its end."""
    from rich.console import Console

    from lowdim.report import summary

    page = Console(file=io.StringIO(), width=WIDTH, color_system=None)
    page.print(summary(json.loads(DEMO.read_text(encoding="utf-8")), WIDTH))
    lines = page.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


#: What a card of 24 GB leaves for tensors, in bytes.
BUDGET = 22 * 2**30


def planned(forecasts: list[dict[str, Any]]) -> str:
    """Forecasts as a table, least memory first, in GiB."""
    lines = [
        "| method | trained | weights | gradients | optimizer state | activations | workspace | peak | fits |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(forecasts, key=lambda row: row["total"]):
        parts = ("weights", "gradients", "optimizer_state", "activations", "workspace", "total")
        shown = " | ".join(f"{row[part] / 2**30:.2f}" for part in parts)
        fits = "yes" if row["total"] <= BUDGET else "no"
        lines.append(f"| {row['label']} | {row['trained_parameters'] / 1e6:,.1f} M | {shown} | {fits} |")
    return "\n".join(lines)


def sharded(rows: list[dict[str, Any]]) -> str:
    """Forecasts for each of several devices, and what was measured in so many processes, in MiB."""
    lines = [
        "| model | method | one device | two devices: forecast | measured | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        sizes = row["alone"]["total"], row["forecast"]["total"], row["measured_bytes"]
        shown = " | ".join(f"{size / 2**20:.1f}" for size in sizes)
        lines.append(f"| {row['model']} | {row['label']} | {shown} | {row['ratio']:.3f} |")
    return "\n".join(lines)


def recipes(record: dict[str, Any]) -> str:
    """One row for each shipped recipe: model, method, cost, and its score before and after."""
    from lowdim.units import format_bytes

    lines = [
        f"{record['environment']['cpu']}, one thread, torch {record['environment']['torch']}.",
        "",
        "| recipe | model, method, steps | CPU time | peak | process | score, before -> after |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in record["rows"]:
        name, metric = row["recipe"], row["metric"].replace("-", " ")
        what = f"{row['model'].removeprefix('lowdim-data/')}, {row['label']}, {row['steps']} of {row['batch_size']}"
        test = _before_and_after(row["before_test"], row["test"])
        scores = f"{metric}: validation {_before_and_after(row['before'], row['validation'])}, test {test}"
        scores += f"; the old index: *{row['verdict']}*" if "verdict" in row else ""
        peak, process = format_bytes(row["peak_bytes"]), format_bytes(row["process_bytes"])
        other = row.get("cpu", record["environment"]["cpu"])
        time = f"{row['cpu_seconds']:.0f} s" + (f" ({other})" if other != record["environment"]["cpu"] else "")
        lines.append(f"| `{name}.yaml` | {what} | {time} | {peak} | {process} | {scores} |")
    return "\n".join(lines)


def pipelines(rows: list[dict[str, Any]]) -> str:
    """The steps of each shipped pipeline: score, change against the dense model, and bytes."""
    from lowdim.units import format_bytes

    lines = [
        "| recipe, step | score | change | on disk | in memory | cache per token |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        metric = row["metric"]
        for step in row["steps"]:
            value, low, high = step["change"]
            change = "" if step["step"] == "dense" else f"{value:.3g} [{low:.3g}, {high:.3g}]"
            sizes = [format_bytes(step["disk_bytes"]), format_bytes(step["memory_bytes"])]
            cache = "" if step["cache_bytes"] is None else format_bytes(step["cache_bytes"])
            name = f"`{row['recipe']}.yaml`, {step['step']}"
            lines.append(f"| {name} | {metric} {step['score']:.4g} | {change} | {' | '.join(sizes)} | {cache} |")
    return "\n".join(lines)


def _before_and_after(before: float | None, after: float) -> str:
    return f"{after:.4g}" if before is None else f"{before:.4g} -> {after:.4g}"


def _results(name: str) -> Any:
    return json.loads((ROOT / "results" / name).read_text(encoding="utf-8"))


def measured() -> list[tuple[Path, str, str, str]]:
    """What pages show of results: the page, the name of the table, its file, and the table."""
    page, scratch = ROOT / "docs" / "in-24-gb.md", "bench-pretraining-memory.json"
    found = [
        (page, "long texts", "plan.json", planned(_results("plan.json")["seven_billion"]["rows"])),
        (page, "layer by layer", scratch, planned([row for row in _results(scratch)["llama-7b"] if "total" in row])),
    ]
    return [
        *found,
        (ROOT / "recipes" / "README.md", "recipes", "recipes.json", recipes(_results("recipes.json"))),
        (ROOT / "docs" / "compression.md", "pipelines", "pipelines.json", pipelines(_results("pipelines.json")["rows"])),
        (ROOT / "docs" / "memory.md", "devices", "plan-devices.json", sharded(_results("plan-devices.json")["rows"])),
    ]


def pages() -> dict[Path, str]:
    """Each page with its tables and examples as they should be.

    Raises:
        ValueError: a page lacks the lines that a table or an example stands between.
    """
    found: dict[Path, str] = {}
    for path, name, make, place in TABLES:
        text = found.get(path) or path.read_text(encoding="utf-8")
        found[path] = _filled(path, text, f"{name}: from the catalogue", name, make(place))
    readme = ROOT / "README.md"
    found[readme] = _filled(readme, found[readme], "demo: from results/demo.json", "demo", demo())
    for path, name, file, content in measured():
        text = found.get(path) or path.read_text(encoding="utf-8")
        found[path] = _filled(path, text, f"{name}: from results/{file}", name, content)
    for path, pattern, fence in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        for file in sorted((ROOT / "docs" / "examples").glob(pattern)):
            code, link = file.read_text(encoding="utf-8"), f"[examples/{file.name}](examples/{file.name})"
            text = _filled(path, text, file.name, file.name, f"{link}\n\n```{fence}\n{code}```")
        found[path] = text
    return found


def _filled(path: Path, text: str, begin: str, end: str, content: str) -> str:
    begin, end = f"<!-- {begin} -->", f"<!-- end of {end} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path} must have one line {begin} and one line {end}")
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda match: f"{begin}\n{content}\n{end}", text, flags=re.DOTALL)


def outdated() -> list[Path]:
    """Pages whose tables or examples are not as they should be."""
    return [path for path, text in pages().items() if path.read_text(encoding="utf-8") != text]


if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content, encoding="utf-8")
