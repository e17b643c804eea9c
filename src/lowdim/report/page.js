// ---- The table, the code block, saving, printing ------------------------------------------------------------------

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const label = head.querySelector(".th"), text = head.dataset.sort === "text";
    const button = el("button", { type: "button", onclick: () => {
      const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : text;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v;
      const rows = [...body.rows].sort((a, b) => {
        if (key(a) === "" || key(b) === "") return (key(a) === "") - (key(b) === ""); // what is unknown comes last, always
        return (up ? 1 : -1) * (text ? key(a).localeCompare(key(b)) : key(a) - key(b));
      });
      body.append(...rows);
    } });
    label.replaceWith(button);
    button.append(label);
  });
}

function copyable(block) {
  const button = el("button", { type: "button", class: "copy", onclick: async () => {
    const text = block.querySelector("pre").textContent;
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; } catch {
      getSelection().selectAllChildren(block.querySelector("pre")); // no clipboard, as in some file viewers: select it instead
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  } }, "Copy");
  block.append(button);
}

function save(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function asCsv() {
  // A leading = + - @ would be run as a formula by a spreadsheet.
  const cell = (v) => (typeof v === "string" ? `"${(/^[=+\-@\t]/.test(v) ? `'${v}` : v).replaceAll('"', '""')}"` : v ?? "");
  const rows = [["method", "label", "family", METRIC, "low", "high", "seeds", "behind_the_best", "half_width", "may_be_best", "peak_memory_bytes", "memory_is_forecast", "seconds_per_step", "trained_parameters", "file_bytes", "lr"]];
  for (const m of DATA.methods) {
    rows.push([m.name, m.label, m.family, m.mean, m.interval?.[0], m.interval?.[1], m.seeds, m.behind, m.half, m.may === null ? "" : `${m.may}`, m.costs.memory, `${m.forecast}`, m.costs.time, m.costs.parameters, m.costs.file, m.lr]);
  }
  return rows.map((row) => row.map(cell).join(",")).join("\r\n");
}

const DRAW = { scatter, tree, rates, curves };
for (const host of document.querySelectorAll(".chart")) DRAW[host.dataset.chart](host);
document.querySelectorAll("table.methods").forEach(sortable);
document.querySelectorAll(".code").forEach(copyable);
const saving = document.getElementById("save");
if (DATA.kind === "comparison" && DATA.methods.length) {
  saving.append(el("button", { type: "button", onclick: () => save("comparison.csv", "text/csv", asCsv()) }, "Save the table (CSV)"));
}
saving.append(el("button", { type: "button", onclick: () => save("report-data.json", "application/json", JSON.stringify(DATA, null, 1)) }, "Save the data (JSON)"));

let folded = [];
addEventListener("beforeprint", () => { folded = [...document.querySelectorAll("details:not([open], .chart + *)")]; folded.forEach((d) => { d.open = true; }); });
addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));
document.documentElement.dataset.drawn = "yes";
