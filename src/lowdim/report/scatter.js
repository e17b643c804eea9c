// ---- Score against cost -------------------------------------------------------------------------------------------

function scatter(host) {
  const methods = DATA.methods.filter((m) => m.mean !== null && !m.trivial);
  const references = DATA.methods.filter((m) => m.mean !== null && m.trivial);
  const axesThatVary = DATA.costs.filter((c) => methods.filter((m) => m.costs[c.key] !== null).length > 1);
  if (!axesThatVary.length) { host.closest("section").hidden = true; return; }
  let cost = axesThatVary[0], log = wantsLog(cost), opened = null;
  const plot = el("div"), tip = tooltip(host), outside = el("p", { class: "outside" });
  const logBox = checkbox("Logarithmic", log, (on) => { log = on; redraw(); });
  host.prepend(
    el("div", { class: "controls" },
      switcher("Horizontal axis", axesThatVary.map((c) => [c.key, c.title]), cost.key, (key) => {
        cost = axesThatVary.find((c) => c.key === key);
        log = wantsLog(cost);
        logBox.querySelector("input").checked = log;
        redraw();
      }), logBox),
    plot, outside, familyKey(methods));

  function wantsLog(which) {
    const values = methods.map((m) => m.costs[which.key]).filter((v) => v > 0);
    return Math.max(...values) / Math.min(...values) > 15;
  }

  function draw(width) {
    tip.hide();
    opened = null;
    const inner = width - parseFloat(getComputedStyle(host).paddingLeft) - parseFloat(getComputedStyle(host).paddingRight);
    const shown = methods.filter((m) => m.costs[cost.key] !== null);
    const xs = shown.map((m) => m.costs[cost.key]);
    const positive = xs.filter((v) => v > 0);
    const height = Math.max(300, Math.min(460, inner * 0.5));
    // A score far away is drawn at the edge; the band of noise and references that are near belong into view.
    const near = fences(shown.map((m) => m.mean));
    const reach = 0.6 * (near[1] - near[0]);
    const inView = references.filter((m) => m.mean >= near[0] - reach && m.mean <= near[1] + reach);
    const [bottom, top] = extent([...near, ...(DATA.band ?? []), ...inView.map((m) => m.mean)]);
    // A margin below 0 has no ticks where no score is there: shares are never negative.
    const least = Math.min(0, ...near, ...(DATA.band ?? []));
    const yTicks = linearTicks(bottom, top, 6).filter((tick) => tick >= least), yFormat = tickFormat(yTicks, "score");
    const box = { left: leftOf(yTicks, yFormat, 48), right: inner - 14, top: 26, bottom: height - 46 };
    const useLog = log && positive.length > 0;
    const gutter = useLog && positive.length < xs.length ? 36 : 0;
    let low, high;
    if (useLog) {
      [low, high] = [Math.min(...positive), Math.max(...positive)];
      const pad = Math.max((high / low) ** 0.06, 1.15);
      low /= pad; high *= pad;
    } else {
      [low, high] = extent(xs, 0.08);
      if (Math.min(...xs) < 0.6 * Math.max(...xs)) low = 0;
      low = Math.max(0, low);
    }
    // The budget belongs into view when it is near; far away it would only squeeze the points.
    const budget = cost.key === "memory" && DATA.budget && DATA.budget <= 1.6 * Math.max(...xs) && DATA.budget > low ? DATA.budget : null;
    if (budget) high = Math.max(high, budget * 1.04);
    const x = scale(low, high, box.left, box.right, useLog, gutter), y = scale(bottom, top, box.bottom, box.top);
    const wanted = Math.max(4, Math.floor((box.right - box.left) / 85));
    const xTicks = useLog && cost.unit === "bytes" ? byteLogTicks(low, high, wanted)
      : useLog ? logTicks(low, high, wanted + 2) : linearTicks(low, high, wanted, cost.unit === "bytes" ? byteUnit(high) : 1);
    if (gutter) xTicks.unshift(0);
    const svg = canvas(inner, height, { role: "group", "aria-label": `${METRIC} against ${cost.title.toLowerCase()}, ${shown.length} methods. Arrow keys move between them; the numbers are in the table of all methods.` });
    svg.append(axes(box,
      { at: x, ticks: xTicks, format: useLog && cost.unit === "bytes" ? (v) => (v ? `${v / byteUnit(v)} ${byteName(byteUnit(v))}` : "0") : tickFormat(xTicks, cost.unit), title: cost.title + (cost.unit === "bytes" && !useLog ? `, ${byteName(byteUnit(xTicks.at(-1)))}` : "") },
      { at: y, ticks: yTicks, format: yFormat, title: `${named(METRIC)}, ${DATA.metric.higher ? "higher" : "lower"} is better` }));
    const clamp = (value) => Math.max(bottom, Math.min(top, value));
    svg.append(noiseBand(box, y), ...referenceLines(inView, box, y));
    if (budget) {
      const px = Math.round(x(budget)) + 0.5;
      svg.append(el("line", { class: "budget", x1: px, x2: px, y1: box.top, y2: box.bottom }),
        el("text", { class: "budget-text", x: px - 6, y: box.top + 4, "text-anchor": "end" }, `budget ${FORMAT.bytes(budget)}`));
    }
    const placed = shown.map((m) => ({ m, cx: x(m.costs[cost.key]), cy: y(clamp(m.mean)), off: clamp(m.mean) !== m.mean })).sort((a, b) => a.cx - b.cx || a.cy - b.cy);
    const front = new Set(frontOf(shown, cost.key));
    const onFront = placed.filter((p) => front.has(p.m));
    svg.append(frontLine(onFront, box));
    const points = placed.map((p, i) => point(p, (value) => y(clamp(value)), front.has(p.m), i));
    points.forEach((node) => svg.append(node));
    svg.append(labels(placed, onFront, box));
    svg.addEventListener("keydown", (event) => {
      const at = points.indexOf(document.activeElement);
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (event.key === "Escape") close();
      if (at < 0 || !step) return;
      event.preventDefault();
      const next = points[(at + step + points.length) % points.length];
      points.forEach((node) => node.setAttribute("tabindex", node === next ? 0 : -1));
      next.focus();
    });
    svg.addEventListener("click", (event) => { if (!event.target.closest(".point")) close(); });
    plot.replaceChildren(svg);
    const hidden = references.filter((m) => !inView.includes(m));
    outside.textContent = hidden.length ? `Beyond this scale: ${hidden.map((m) => `${m.label} (${FORMAT.score(m.mean)})`).join(", ")}.` : "";
  }

  function point({ m, cx, cy, off }, y, onFront, index) {
    const node = el("g", {
      class: `point ${m.colour}${onFront ? " on" : ""}${m.chosen ? " chosen" : ""}`, tabindex: index ? -1 : 0, role: "img",
      transform: `translate(${round(cx)} ${round(cy)})`, "aria-label": describe(m),
      onpointerenter: (event) => { if (event.pointerType === "mouse") open(node, m, cx, cy); },
      onpointerleave: (event) => { if (event.pointerType === "mouse" && document.activeElement !== node) close(); },
      onfocus: () => open(node, m, cx, cy), onblur: close, onclick: () => open(node, m, cx, cy),
    });
    if (m.interval) node.append(el("line", { class: "bar", x1: 0, x2: 0, y1: round(y(m.interval[0]) - cy), y2: round(y(m.interval[1]) - cy) }));
    node.append(el("circle", { class: "halo", r: 13 }), el("circle", { class: "ring", r: 10.5 }),
      el("use", { href: `#m-${m.shape}`, x: -7, y: -7, width: 14, height: 14 }), el("circle", { class: "hit", r: 16 }));
    if (off) node.append(el("path", { class: "off", d: cy > 100 ? "M-5 10H5L0 17Z" : "M-5-10H5L0-17Z" }));
    return node;
  }

  function open(node, m, cx, cy) {
    close();
    opened = node;
    node.classList.add("open");
    const rows = [[METRIC, FORMAT.score(m.mean)]];
    if (m.behind !== null && m.behind > 0) rows.push(["Behind the best", `${+m.behind.toPrecision(2)}${m.half ? ` ± ${+m.half.toPrecision(2)}` : ""}`]);
    if (m.interval && !m.half) rows.push(["95 % interval", `${FORMAT.score(m.interval[0])} to ${FORMAT.score(m.interval[1])}`]);
    if (m.seeds) rows.push(["Seeds", `${m.seeds}`]);
    for (const c of DATA.costs) if (m.costs[c.key] !== null) rows.push([c.key === "memory" && m.forecast ? "Peak, forecast" : c.title, FORMAT[c.unit](m.costs[c.key])]);
    const remarks = [m.family, m.baseline ? "baseline" : "", m.chosen ? "the pick" : "", m.may ? m.marked : m.near && m.may === null ? "within noise of the best" : ""].filter(Boolean);
    tip.show(plot.offsetLeft + cx, plot.offsetTop + cy, m.label, rows, remarks.join(" · "));
  }

  function close() {
    opened?.classList.remove("open");
    opened = null;
    tip.hide();
  }

  const redraw = responsive(host, draw);
}

function describe(m) {
  const parts = [`${METRIC} ${FORMAT.score(m.mean)}`];
  if (m.interval) parts.push(`95 % interval ${FORMAT.score(m.interval[0])} to ${FORMAT.score(m.interval[1])}`);
  for (const c of DATA.costs) if (m.costs[c.key] !== null) parts.push(`${c.title.toLowerCase()} ${FORMAT[c.unit](m.costs[c.key])}`);
  return `${m.label}: ${parts.join(", ")}`;
}

/** Methods that no other beats or equals on both axes while beating it on one. */
function frontOf(methods, key) {
  const better = (a, b) => (DATA.metric.higher ? a.mean - b.mean : b.mean - a.mean);
  return methods.filter((m) => !methods.some((o) => o !== m && better(o, m) >= 0 && o.costs[key] <= m.costs[key]
    && (better(o, m) > 0 || o.costs[key] < m.costs[key])));
}

function frontLine(points, box) {
  if (!points.length) return el("g");
  let d = `M${round(points[0].cx)} ${round(points[0].cy)}`;
  for (const p of points.slice(1)) d += `H${round(p.cx)}V${round(p.cy)}`;
  return el("path", { class: "front", d: `${d}H${box.right}` });
}

/** The scores that are not shown to differ from the best. */
function noiseBand(box, y) {
  if (!DATA.band) return el("g");
  const [a, b] = DATA.band.map((value) => Math.max(box.top, Math.min(box.bottom, y(value))));
  return el("rect", { class: "noise", x: box.left, width: box.right - box.left, y: round(Math.min(a, b)), height: round(Math.abs(a - b)) });
}

/** What was never trained, as lines across: it has a score and no cost. */
function referenceLines(references, box, y) {
  return references.map((m) => {
    const py = Math.round(y(m.mean)) + 0.5;
    return el("g", { "aria-hidden": "true" }, el("line", { class: "refline", x1: box.left, x2: box.right, y1: py, y2: py }),
      el("text", { x: box.left + 6, y: py - 5 }, `${m.label} ${FORMAT.score(m.mean)}`));
  });
}

/** Names beside the points, most important first; a name that finds no free place stays in the tooltip only. */
function labels(placed, onFront, box) {
  const front = new Set(onFront.map((p) => p.m));
  const group = el("g", { "aria-hidden": "true" });
  const taken = placed.map(({ cx, cy }) => ({ l: cx - 9, r: cx + 9, t: cy - 9, b: cy + 9 }));
  const bars = [];
  onFront.forEach((p, i) => {
    const next = onFront[i + 1];
    bars.push({ l: p.cx, r: next?.cx ?? box.right, t: p.cy - 1, b: p.cy + 1 });
    if (next) bars.push({ l: next.cx - 1, r: next.cx + 1, t: next.cy, b: p.cy });
  });
  const weight = ({ m }) => 4 * m.chosen + 3 * front.has(m) + 2 * m.baseline + (m.may ?? m.near);
  for (const p of [...placed].sort((a, b) => weight(b) - weight(a))) {
    const w = p.m.label.length * 6.8 + 4, h = 14;
    const spots = [[13, -7, "start"], [-13, -7, "end"], [11, 4, "start"], [11, -19, "start"], [-11, -19, "end"], [-11, 4, "end"], [0, -27, "middle"], [0, 13, "middle"]];
    for (const strict of [true, false]) {
      const spot = spots.map(([dx, dy, anchor]) => {
        const l = p.cx + dx - (anchor === "end" ? w : anchor === "middle" ? w / 2 : 0), t = p.cy + dy;
        return { l, r: l + w, t, b: t + h, anchor, tx: p.cx + dx };
      }).find((s) => s.l >= box.left + 2 && s.r <= box.right + 12 && s.t >= box.top - 8 && s.b <= box.bottom
        && !taken.concat(strict ? bars : []).some((o) => s.l < o.r && s.r > o.l && s.t < o.b && s.b > o.t));
      if (!spot) continue;
      taken.push(spot);
      group.append(el("text", { class: `label${p.m.chosen ? " strong" : ""}`, x: round(spot.tx), y: round(spot.t + 11), "text-anchor": spot.anchor }, p.m.label));
      break;
    }
  }
  return group;
}

function byteLogTicks(low, high, wanted) {
  const ticks = [];
  for (let e = Math.ceil(Math.log2(low)); 2 ** e <= high; e += 1) ticks.push(2 ** e);
  const every = Math.ceil(ticks.length / wanted);
  return ticks.filter((_, i) => i % every === 0);
}

function familyKey(methods) {
  const list = el("ul", { class: "key" });
  const families = new Map(methods.filter((m) => m.family).map((m) => [m.family, m.shape]));
  for (const [family, shape] of families) {
    list.append(el("li", {}, el("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, el("use", { href: `#m-${shape}`, x: -8, y: -8, width: 16, height: 16 })), family));
  }
  if (methods.some((m) => m.chosen)) {
    list.append(el("li", {}, el("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" },
      el("circle", { r: 6.5, fill: "none", stroke: "currentColor", "stroke-width": 1.5 })), "the pick"));
  }
  if (DATA.band) {
    list.append(el("li", {}, el("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, el("rect", { class: "noise", x: -8, y: -6, width: 16, height: 12 })),
      "not shown to differ from the best"));
  }
  return list;
}
