// ---- The search tree ----------------------------------------------------------------------------------------------

/** Rungs are columns, candidates are lines, grouped by method; a line ends where its candidate left. */
function tree(host) {
  const { rungs, lanes } = DATA.search;
  const paths = lanes.flatMap((lane) => lane.paths.map((path) => ({ ...path, lane })));
  const plot = el("div"), tip = tooltip(host);
  let at = null;
  host.prepend(plot);
  const column = new Map(rungs.map((rung, i) => [rung.rung, i]));
  const nameOf = (p) => [p.lane.label, p.size === null ? "" : `size ${p.size}`, `lr ${FORMAT.rate(p.lr)}${p.origin ? ` (${p.origin})` : ""}`].filter(Boolean).join(", ");
  const endOf = (p) => (p.on ? "Went to the end." : `Left after ${FORMAT.step(rungs[column.get(p.visits.at(-1)[0])].steps)} steps${p.reason ? `: ${p.reason}` : ""}.`);

  function draw(full) {
    tip.hide();
    const inner = full - parseFloat(getComputedStyle(host).paddingLeft) - parseFloat(getComputedStyle(host).paddingRight);
    const beside = inner > 620; // names stand beside the lanes, or above them on a phone
    const pitch = paths.length > 60 ? 6 : 8, gap = beside ? 8 : 24, head = 46;
    const left = beside ? Math.min(200, 24 + 7 * Math.max(...lanes.map((lane) => lane.label.length))) : 8;
    const x = scale(0, rungs.length, left, inner - 8);
    let y = head + (beside ? 4 : 16);
    for (const lane of lanes) {
      lane.top = y;
      const height = Math.max(lane.paths.length * pitch, beside ? 14 : 0);
      paths.filter((p) => p.lane === lane).forEach((p, i) => { p.y = y + (i + 0.5) * pitch; });
      lane.bottom = y + height;
      y += height + gap;
    }
    const svg = canvas(inner, y, {
      tabindex: 0, role: "slider", "aria-label": "Candidates of the search; arrow keys move between them", "aria-valuemin": 1,
      "aria-valuemax": paths.length, "aria-valuenow": 1, "aria-valuetext": "no candidate chosen",
    });
    rungs.forEach((rung, i) => {
      const middle = (x(i) + x(i + 1)) / 2, steps = `${FORMAT.step(rung.steps)}${i && !beside ? "" : " steps"}`;
      svg.append(el("text", { class: "title", x: middle, y: 14, "text-anchor": "middle" }, steps),
        el("text", { x: middle, y: 30, "text-anchor": "middle" }, beside ? `${rung.count} ${rung.count === 1 ? "candidate" : "candidates"}` : `${rung.count}`),
        el("line", { class: "grid", x1: x(i), x2: x(i), y1: head - 6, y2: y - gap / 2 }));
    });
    svg.append(el("line", { class: "grid", x1: left, x2: inner - 8, y1: head - 6, y2: head - 6 }));
    for (const lane of lanes) {
      svg.append(beside ? el("text", { class: "lane", x: 0, y: (lane.top + lane.bottom) / 2 + 4 }, lane.label)
        : el("text", { class: "lane", x: left, y: lane.top - 5 }, lane.label));
    }
    for (const p of paths) svg.append(line(p, x));
    const nearest = (event) => {
      const box = svg.getBoundingClientRect(), py = event.clientY - box.top;
      if (py < head) return leave();
      go(paths.reduce((best, p, i) => (Math.abs(p.y - py) < Math.abs(paths[best].y - py) ? i : best), 0));
    };
    const drawn = [...svg.querySelectorAll(".path")];
    function go(index) {
      at = Math.max(0, Math.min(paths.length - 1, index));
      const p = paths[at];
      drawn.forEach((node, i) => node.classList.toggle("lit", i === at));
      svg.classList.add("dim-paths");
      svg.setAttribute("aria-valuenow", at + 1);
      svg.setAttribute("aria-valuetext", `${nameOf(p)}. ${endOf(p)}`);
      const rows = p.visits.map(([rung, score]) => [`${FORMAT.step(rungs[column.get(rung)].steps)} steps`, score === null ? "failed" : FORMAT.score(score)]);
      tip.show(plot.offsetLeft + x(column.get(p.visits.at(-1)[0]) + 1), plot.offsetTop + p.y, nameOf(p), rows, `${p.chosen ? "The pick. " : ""}${endOf(p)}`);
    }
    function leave() {
      at = null;
      svg.classList.remove("dim-paths");
      drawn.forEach((node) => node.classList.remove("lit"));
      tip.hide();
    }
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") leave();
      if (move === undefined) return;
      event.preventDefault();
      go(at === null ? (move < 0 ? paths.length - 1 : 0) : at + move);
    });
    plot.replaceChildren(svg);
  }

  /** From the first rung to the column of the last one that the candidate reached: a bar across where it left, a dot at the end. */
  function line(p, x) {
    const from = x(column.get(p.visits[0][0])) + 4, to = x(column.get(p.visits.at(-1)[0]) + 1) - (p.on ? 8 : 14);
    const kind = `path ${p.lane.colour}${p.on ? " on" : ""}${p.chosen ? " chosen" : ""}`;
    const end = p.on ? el("circle", { cx: to, cy: p.y, r: p.chosen ? 4.5 : 3 })
      : el("line", { x1: to, x2: to, y1: p.y - 2.5, y2: p.y + 2.5 });
    return el("g", { class: kind }, el("line", { x1: from, x2: to, y1: p.y, y2: p.y }), end);
  }

  responsive(host, draw);
}
