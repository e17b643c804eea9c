// ---- Training loss ------------------------------------------------------------------------------------------------

/** Mean and range over seeds at each step that any seed has. */
function overSeeds(curves) {
  const at = new Map();
  for (const { step, loss } of curves) step.forEach((s, i) => { if (loss[i] !== null) at.set(s, [...(at.get(s) ?? []), loss[i]]); });
  return [...at].sort((a, b) => a[0] - b[0]).map(([step, values]) => ({
    step, mean: values.reduce((a, b) => a + b) / values.length, low: Math.min(...values), high: Math.max(...values),
  }));
}

/** Centred moving mean over `width` points; it starts at the first value and has half the width at the end. */
function smoothed(points, width) {
  const half = Math.floor(width / 2);
  return points.map((p, i) => {
    const part = points.slice(i - Math.min(half, i), i + Math.min(half, i) + 1);
    const mean = (key) => part.reduce((sum, q) => sum + q[key], 0) / part.length;
    return { step: p.step, mean: mean("mean"), low: mean("low"), high: mean("high") };
  });
}

function curves(host) {
  const all = DATA.methods.map((m) => ({ ...m, points: overSeeds(m.curves) })).filter((m) => m.points.length);
  if (!all.length) return;
  const longest = Math.max(...all.map((m) => m.points.length));
  const width = 2 * Math.max(1, Math.round(longest / 24)) + 1;
  let smooth = longest >= 20, log = false, logSteps = false, lit = null, at = null;
  const leaders = [...all].sort((a, b) => weight(b) - weight(a)).slice(0, 5);
  const on = new Set(all.length > 6 ? leaders : all); // in colour; the others are grey
  const plot = el("div"), tip = tooltip(host), legend = el("ul", { class: "legend", "aria-label": "Methods in colour" });
  const positive = all.every((m) => m.points.every((p) => p.mean > 0));
  const firstStep = Math.min(...all.map((m) => m.points[0].step)), lastStep = Math.max(...all.map((m) => m.points.at(-1).step));
  const sets = all.length > 3 ? [
    el("button", { type: "button", onclick: () => choose(() => true) }, "All"),
    el("button", { type: "button", onclick: () => choose((m) => leaders.includes(m)) }, "Leaders"),
    el("button", { type: "button", onclick: () => choose(() => false) }, "None")] : [];
  host.prepend(el("div", { class: "controls" },
    longest >= 8 ? checkbox(`Smoothed: mean of ${width} neighbouring points`, smooth, (v) => { smooth = v; redraw(); }) : null,
    positive ? checkbox("Logarithmic loss", log, (v) => { log = v; redraw(); }) : null,
    firstStep > 0 && lastStep >= 10 * firstStep ? checkbox("Logarithmic steps", logSteps, (v) => { logSteps = v; redraw(); }) : null, sets.length ? el("span", { class: "sets" }, "In colour", ...sets) : null), legend, plot);
  if (all.length > 1) for (const m of all) {
    const button = el("button", {
      type: "button", "aria-pressed": `${on.has(m)}`, class: m.colour,
      onclick: () => { if (on.has(m)) on.delete(m); else on.add(m); sync(); },
      onpointerenter: () => highlight(m), onpointerleave: () => highlight(null), onfocus: () => highlight(m), onblur: () => highlight(null),
    }, el("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, el("line", { class: `line d${m.dash}`, x1: 1, x2: 21, y1: 5, y2: 5 })), m.label);
    m.button = button;
    legend.append(el("li", {}, button));
  } else legend.remove();

  function weight(m) { return 8 * m.chosen + 4 * (m.behind === 0) + 2 * m.baseline + (m.may === true); }
  function choose(keep) { on.clear(); all.forEach((m, i) => { if (keep(m, i)) on.add(m); }); sync(); }
  function sync() { all.forEach((m) => m.button?.setAttribute("aria-pressed", `${on.has(m)}`)); redraw(); }
  function highlight(m) {
    lit = m && on.has(m) ? m : null;
    plot.classList.toggle("dim", lit !== null);
    for (const node of plot.querySelectorAll(".series")) node.classList.toggle("lit", lit !== null && node.dataset.name === lit.name);
    for (const node of plot.querySelectorAll(".band-area")) node.toggleAttribute("hidden", !(all.length === 1 || (lit && node.dataset.name === lit.name)));
  }

  function draw(full) {
    tip.hide();
    const inner = full - parseFloat(getComputedStyle(host).paddingLeft) - parseFloat(getComputedStyle(host).paddingRight);
    const shown = all.filter((m) => on.has(m));
    for (const m of all) m.drawn = smooth ? smoothed(m.points, width) : m.points;
    const grey = all.filter((m) => !on.has(m));
    const named_ends = inner > 640 && shown.length > 1 && shown.length <= 16;
    const room = named_ends ? Math.min(190, 26 + 6.8 * Math.max(...shown.map((m) => m.label.length))) : 14;
    const height = Math.max(280, Math.min(430, inner * 0.46));
    const values = all.flatMap((m) => (all.length > 1 ? m.drawn : m.points).map((p) => p.mean));
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) { low /= 1.05; high *= 1.05; } else { [low, high] = extent([low, high], 0.05); if (Math.min(...values) >= 0 && low < 0.15 * high) low = 0; }
    const yTicks = log ? logTicks(low, high, 7) : linearTicks(low, high, 6);
    const yFormat = log ? (v) => `${+v.toPrecision(3)}` : tickFormat(yTicks, "loss");
    const box = { left: leftOf(yTicks, yFormat, 48), right: inner - room, top: 26, bottom: height - 46 };
    const x = scale(firstStep, lastStep, box.left, box.right, logSteps), y = scale(low, high, box.bottom, box.top, log);
    const wanted = Math.max(4, Math.floor((box.right - box.left) / 85));
    const xTicks = (logSteps ? logTicks(firstStep, lastStep, wanted) : linearTicks(firstStep, lastStep, wanted)).filter(Number.isInteger);
    const svg = canvas(inner, height, {
      tabindex: 0, role: "slider", "aria-label": "Training loss by step; arrow keys move along the steps", "aria-valuemin": firstStep,
      "aria-valuemax": lastStep, "aria-valuenow": firstStep, "aria-valuetext": "no step chosen",
    });
    svg.append(axes(box, { at: x, ticks: xTicks, format: FORMAT.step, title: logSteps ? "Step (logarithmic)" : "Step" },
      { at: y, ticks: yTicks, format: yFormat, title: log ? "Loss (logarithmic)" : "Loss" }));
    const clamp = (v) => Math.max(box.top, Math.min(box.bottom, y(v)));
    const path = (points, key) => points.map((p, i) => `${i ? "L" : "M"}${round(x(p.step))} ${round(clamp(p[key]))}`).join("");
    for (const m of grey) svg.append(el("path", { class: "context", d: path(m.drawn, "mean") }));
    for (const m of [...shown].reverse()) {
      const group = el("g", { class: `series ${m.colour}`, "data-name": m.name });
      if (m.curves.length > 1) {
        const area = `${path(m.drawn, "high")}${path([...m.drawn].reverse(), "low").replace("M", "L")}Z`;
        group.append(el("path", { class: "band-area", "data-name": m.name, d: area, hidden: all.length > 1 }));
      }
      if (smooth && all.length === 1) group.append(el("path", { class: "line raw", d: path(m.points, "mean") }));
      group.append(el("path", { class: `line d${m.dash}`, d: path(m.drawn, "mean") }));
      svg.append(group);
    }
    if (named_ends) svg.append(endNames(shown, x, clamp, box));
    const cross = el("line", { class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden" });
    svg.append(cross);
    // The steps that the pointer and the arrow keys stop at: those of the longest curve.
    const stops = (shown.length ? shown : all).reduce((a, b) => (b.points.length > a.points.length ? b : a)).points.map((p) => p.step);

    function go(index) {
      at = Math.max(0, Math.min(stops.length - 1, index));
      const step = stops[at], rows = [];
      for (const m of shown) {
        const p = m.drawn.find((q) => q.step === step);
        if (p) rows.push([m.label, FORMAT.loss(p.mean), m.colour, p.mean]);
      }
      rows.sort((a, b) => a[3] - b[3]);
      const px = x(step);
      cross.setAttribute("x1", px); cross.setAttribute("x2", px); cross.setAttribute("visibility", "visible");
      svg.setAttribute("aria-valuenow", step);
      svg.setAttribute("aria-valuetext", `step ${FORMAT.step(step)}: ${rows.slice(0, 6).map((r) => `${r[0]} ${r[1]}`).join(", ")}`);
      tip.show(plot.offsetLeft + px, plot.offsetTop + (box.top + box.bottom) / 2, `Step ${FORMAT.step(step)}`, rows.slice(0, 12),
        rows.length > 12 ? `and ${rows.length - 12} more` : "");
    }
    function leave() { at = null; cross.setAttribute("visibility", "hidden"); tip.hide(); }
    const nearest = (event) => {
      const step = x.invert(event.clientX - svg.getBoundingClientRect().left);
      let best = 0;
      stops.forEach((s, i) => { if (Math.abs(s - step) < Math.abs(stops[best] - step)) best = i; });
      go(best);
    };
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") leave(); });
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const big = Math.max(1, Math.round(stops.length / 10));
      const move = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: big, PageDown: -big, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") leave();
      if (move === undefined) return;
      event.preventDefault();
      go(at === null ? (move < 0 ? stops.length - 1 : 0) : at + move);
    });
    plot.replaceChildren(svg);
    highlight(lit);
  }
  const redraw = responsive(host, draw);
}

/** Names at the right ends of the lines, moved apart so that none overlap. */
function endNames(shown, x, y, box) {
  const group = el("g", { "aria-hidden": "true" });
  const ends = shown.map((m) => { const p = m.drawn.at(-1); return { m, px: x(p.step), py: y(p.mean), ty: y(p.mean) }; }).sort((a, b) => a.py - b.py);
  const gap = Math.min(15, (box.bottom - box.top + 10) / ends.length);
  for (let i = 1; i < ends.length; i += 1) ends[i].ty = Math.max(ends[i].ty, ends[i - 1].ty + gap);
  let floor = box.bottom + 4;
  for (const e of [...ends].reverse()) { e.ty = Math.min(e.ty, floor); floor = e.ty - gap; }
  for (const { m, px, py, ty } of ends) {
    const series = el("g", { class: `series ${m.colour}`, "data-name": m.name });
    series.append(el("path", { class: "leader", d: `M${round(px + 2)} ${round(py)}L${box.right + 12} ${round(ty)}` }),
      el("text", { class: "end", x: box.right + 16, y: round(ty + 4) }, m.label));
    group.append(series);
  }
  return group;
}
