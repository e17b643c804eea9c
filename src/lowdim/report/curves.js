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
  let smooth = longest >= 20, log = false, lit = null, at = null;
  const on = new Set(all);
  const plot = el("div"), tip = tooltip(host), legend = el("ul", { class: "legend", "aria-label": "Methods shown" });
  const positive = all.every((m) => m.points.every((p) => p.mean > 0));
  const sets = all.length > 3 ? [
    el("button", { type: "button", onclick: () => choose(() => true) }, "All"),
    el("button", { type: "button", onclick: () => choose((m, i) => i < 2 || m.chosen || m.baseline) }, "Leaders and baseline"),
    el("button", { type: "button", onclick: () => choose(() => false) }, "None")] : [];
  host.prepend(el("div", { class: "controls" },
    longest >= 8 ? checkbox(`Smooth over ${width} points`, smooth, (v) => { smooth = v; redraw(); }) : null,
    positive ? checkbox("Logarithmic", log, (v) => { log = v; redraw(); }) : null, sets.length ? el("span", { class: "sets" }, "Show", ...sets) : null), legend, plot);
  if (all.length > 1) for (const m of all) {
    const button = el("button", {
      type: "button", "aria-pressed": "true", class: m.colour,
      onclick: () => { if (on.has(m)) on.delete(m); else on.add(m); sync(); },
      onpointerenter: () => highlight(m), onpointerleave: () => highlight(null), onfocus: () => highlight(m), onblur: () => highlight(null),
    }, el("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" }, el("line", { class: `line d${m.dash}`, x1: 1, x2: 21, y1: 5, y2: 5 })), m.label);
    m.button = button;
    legend.append(el("li", {}, button));
  } else legend.remove();

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
    for (const m of shown) m.drawn = smooth ? smoothed(m.points, width) : m.points;
    const named_ends = inner > 640 && shown.length > 1 && shown.length <= 16;
    const room = named_ends ? Math.min(190, 26 + 6.8 * Math.max(...shown.map((m) => m.label.length))) : 14;
    const height = Math.max(280, Math.min(430, inner * 0.46));
    const steps = all.flatMap((m) => [m.points[0].step, m.points.at(-1).step]);
    const values = (shown.length ? shown : all).flatMap((m) => (all.length > 1 && m.drawn || m.points).map((p) => p.mean));
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (log) { low /= 1.05; high *= 1.05; } else { [low, high] = extent([low, high], 0.05); if (Math.min(...values) >= 0 && low < 0.15 * high) low = 0; }
    const yTicks = log ? logTicks(low, high, 7) : linearTicks(low, high, 6);
    const yFormat = log ? (v) => `${+v.toPrecision(3)}` : tickFormat(yTicks, "loss");
    const box = { left: leftOf(yTicks, yFormat, 48), right: inner - room, top: 26, bottom: height - 46 };
    const x = scale(Math.min(...steps), Math.max(...steps), box.left, box.right), y = scale(low, high, box.bottom, box.top, log);
    const xTicks = linearTicks(Math.min(...steps), Math.max(...steps), Math.max(4, Math.floor((box.right - box.left) / 85))).filter(Number.isInteger);
    const svg = canvas(inner, height, {
      tabindex: 0, role: "slider", "aria-label": "Training loss by step; arrow keys move along the steps", "aria-valuemin": Math.min(...steps),
      "aria-valuemax": Math.max(...steps), "aria-valuenow": Math.min(...steps), "aria-valuetext": "no step chosen",
    });
    svg.append(axes(box, { at: x, ticks: xTicks, format: FORMAT.step, title: "Step" },
      { at: y, ticks: yTicks, format: yFormat, title: log ? "Loss (logarithmic)" : "Loss" }));
    const clamp = (v) => Math.max(box.top, Math.min(box.bottom, y(v)));
    const path = (points, key) => points.map((p, i) => `${i ? "L" : "M"}${round(x(p.step))} ${round(clamp(p[key]))}`).join("");
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

// ---- Learning rates -----------------------------------------------------------------------------------------------

function rates(host) {
  const shown = DATA.methods.filter((m) => m.trials.length > 1);
  const scores = shown.flatMap((m) => m.trials.map((t) => t[1])), lrs = shown.flatMap((m) => m.trials.map((t) => t[0]));
  const log = lrs.every((v) => v > 0);
  const [bottom, top] = extent(scores, 0.1);
  let [low, high] = log ? [Math.min(...lrs) / 1.6, Math.max(...lrs) * 1.6] : extent(lrs);
  const grid = el("div", { class: "panels" });
  host.prepend(grid);
  for (const m of shown) {
    const plot = el("div"), chosen = m.trials.find((t) => t[0] === m.lr);
    grid.append(el("div", { class: `panel ${m.colour}` }, el("h3", {}, m.label), plot,
      el("p", { class: m.edge ? "edge" : "" }, chosen ? `${FORMAT.rate(m.lr)} chosen${m.edge ? ", at the edge of those tried" : ""}` : m.lr !== null ? `${FORMAT.rate(m.lr)} used` : "")));
    responsive(plot, (width) => {
      const yTicks = linearTicks(bottom, top, 3), yFormat = tickFormat(yTicks, "score");
      const box = { left: leftOf(yTicks, yFormat, 44), right: width - 6, top: 8, bottom: 96 };
      const x = scale(low, high, box.left, box.right, log), y = scale(bottom, top, box.bottom, box.top);
      const xTicks = log ? logTicks(low, high, 4) : linearTicks(low, high, 3);
      const svg = canvas(width, 118, { role: "img", "aria-label": `${m.label}: ${m.trials.map((t) => `${FORMAT.rate(t[0])} gives ${FORMAT.score(t[1])}`).join(", ")}` });
      svg.append(axes(box, { at: x, ticks: xTicks, format: FORMAT.rate }, { at: y, ticks: yTicks, format: tickFormat(yTicks, "score") }),
        el("path", { class: "line", d: m.trials.map((t, i) => `${i ? "L" : "M"}${round(x(t[0]))} ${round(y(t[1]))}`).join("") }));
      for (const t of m.trials) {
        svg.append(el("circle", { class: `trial${t === chosen ? " chosen" : ""}`, cx: round(x(t[0])), cy: round(y(t[1])), r: t === chosen ? 5 : 3 },
          el("title", {}, `learning rate ${FORMAT.rate(t[0])}: ${METRIC} ${FORMAT.score(t[1])}`)));
      }
      plot.replaceChildren(svg);
    });
  }
}
