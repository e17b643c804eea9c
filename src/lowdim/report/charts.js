"use strict";
// What every chart on the page needs: elements, scales, ticks, axes, a tooltip. No chart is known here.

const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = document.querySelector(".symbols").namespaceURI;
const METRIC = DATA.metric.name;

/** Makes an element: `el("g", {class: "point"}, child, "text")`; SVG names get the SVG namespace. */
const SVG_NAMES = new Set(["svg", "g", "path", "line", "circle", "rect", "text", "tspan", "use", "title"]);
function el(name, attributes = {}, ...children) {
  const node = SVG_NAMES.has(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const round = (value) => Math.round(value * 10) / 10;
const minus = (text) => text.replace(/^-/, "−");
const three = (value) => (Math.abs(value) < 9.995 ? value.toFixed(2) : Math.abs(value) < 99.95 ? value.toFixed(1) : value.toFixed(0));

function inUnits(value, base, units) {
  let power = 0;
  while (power < units.length - 1 && Math.abs(value) >= 999.5) { value /= base; power += 1; }
  return power === 0 ? `${+value.toPrecision(3)}${units[0]}` : `${three(value)}${units[power]}`;
}

/** How a number is written, by unit. */
const FORMAT = {
  bytes: (v) => inUnits(v, 1024, [" B", " KiB", " MiB", " GiB", " TiB"]),
  count: (v) => inUnits(v, 1000, ["", "K", "M", "B", "T"]),
  seconds: (v) => (v === 0 ? "0 s" : v < 9.995e-4 ? `${three(v * 1e6)} µs` : v < 0.9995 ? `${three(v * 1e3)} ms`
    : v < 119.5 ? `${three(v)} s` : v < 7170 ? `${three(v / 60)} min`
    : v < 172620 ? `${three(v / 3600)} h` : `${three(v / 86400)} days`),
  score: (v) => minus(Math.abs(v) < 1e6 ? v.toFixed(DATA.metric.decimals ?? 3) : `${+v.toPrecision(4)}`.replace("e+", "e")),
  loss: (v) => minus(`${+v.toPrecision(4)}`),
  step: (v) => Math.round(v).toLocaleString("en"),
  rate: (v) => {
    if (v === 0 || (Math.abs(v) >= 0.01 && Math.abs(v) < 1000)) return `${+v.toPrecision(3)}`;
    const [mantissa, exponent] = v.toExponential(2).split("e");
    return `${+mantissa}e${+exponent}`;
  },
};

/**
 * Round tick values from low to high, about `wanted` of them and at least two, since one alone gives no scale.
 * `unit` is what a tick counts in, e.g. 2**30 for GiB.
 */
function linearTicks(low, high, wanted, unit = 1) {
  const span = (high - low) / unit || 1;
  const power = 10 ** Math.floor(Math.log10(span / wanted));
  const steps = [0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10].map((m) => m * power);
  for (let at = Math.max(4, steps.findIndex((s) => span / s <= wanted)); at >= 0; at -= 1) {
    const step = steps[at], ticks = [];
    for (let i = Math.ceil(low / unit / step - 1e-9); i * step <= (high / unit) * (1 + 1e-12) + 1e-12 * span; i += 1) {
      ticks.push(+(i * step).toPrecision(12) * unit);
    }
    if (ticks.length > 1 || at === 0) return ticks;
  }
  return [];
}

function logTicks(low, high, wanted) {
  const from = Math.floor(Math.log10(low)), to = Math.ceil(Math.log10(high));
  for (const steps of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let e = from; e <= to; e += 1) for (const m of steps) ticks.push(m * 10 ** e);
    const inside = ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
    if (inside.length <= wanted) return inside;
  }
  const every = Math.ceil((to - from) / wanted);
  return Array.from({ length: Math.floor((to - from) / every) + 1 }, (_, i) => 10 ** (from + i * every))
    .filter((t) => t >= low * 0.999 && t <= high * 1.001);
}

/** A scale from [low, high] to [a, b] pixels. Zero on a logarithmic scale lies in a gutter left of it. */
function scale(low, high, a, b, log = false, gutter = 0) {
  const f = log ? Math.log : (v) => v;
  const start = a + gutter;
  const size = f(high) - f(low) || 1;
  const at = (v) => (log && v <= 0 ? a + gutter / 3 : start + ((f(v) - f(low)) / size) * (b - start));
  at.invert = (pixel) => { const v = f(low) + ((pixel - start) / (b - start)) * size; return log ? Math.exp(v) : v; };
  return at;
}

/** The largest binary unit that fits, so that ticks on a byte axis are round numbers of it. */
const byteUnit = (high) => [2 ** 40, 2 ** 30, 2 ** 20, 2 ** 10].find((u) => high >= u) ?? 1;

function extent(values, pad = 0.06) {
  const low = Math.min(...values), high = Math.max(...values);
  const margin = (high - low || Math.abs(high) || 1) * pad;
  return [low - margin, high + margin];
}

/** The ends of the values that lie near the middle half, so that one far away does not squeeze the others. */
function fences(values) {
  const ordered = [...values].sort((a, b) => a - b), quarter = Math.floor(ordered.length / 4);
  const lower = ordered[quarter], upper = ordered[ordered.length - 1 - quarter], reach = 1.5 * (upper - lower);
  const near = ordered.filter((v) => v >= lower - reach && v <= upper + reach);
  return near.length ? [near[0], near.at(-1)] : [0, 1];
}

/** Grid lines and labels. `x` and `y` are {at, ticks, format, title}; `box` is {left, right, top, bottom} in pixels. */
function axes(box, x, y) {
  const group = el("g", { "aria-hidden": "true" });
  for (const tick of y.ticks) {
    const py = Math.round(y.at(tick)) + 0.5;
    group.append(el("line", { class: "grid", x1: box.left, x2: box.right, y1: py, y2: py }),
      el("text", { x: box.left - 8, y: py + 4, "text-anchor": "end" }, y.format(tick)));
  }
  let last = -Infinity;
  for (const tick of x.ticks) {
    const px = Math.round(x.at(tick)) + 0.5, text = x.format(tick), half = text.length * 3.4;
    group.append(el("line", { class: "axis", x1: px, x2: px, y1: box.bottom, y2: box.bottom + 4 }));
    if (px - half < last + 8) continue; // labels that would touch are left out
    last = px + half;
    group.append(el("text", { x: px, y: box.bottom + 18, "text-anchor": "middle" }, text));
  }
  group.append(el("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom + 0.5, y2: box.bottom + 0.5 }));
  if (x.title) group.append(el("text", { class: "title", x: (box.left + box.right) / 2, y: box.bottom + 38, "text-anchor": "middle" }, x.title));
  if (y.title) group.append(el("text", { class: "title", x: 0, y: 11 }, y.title));
  return group;
}

/** The name of a byte unit. */
const byteName = (unit) => ({ 1: "B", [2 ** 10]: "KiB", [2 ** 20]: "MiB", [2 ** 30]: "GiB" })[unit] ?? "TiB";

/** Tick labels with as many digits as tell neighbours apart, and none that say nothing. */
function tickFormat(ticks, unit) {
  if (unit === "count") return (v) => inUnits(v, 1000, ["", "K", "M", "B", "T"]).replace(/\.?0+(?=[A-Z]|$)/, (m, i, s) => (s.includes(".") ? "" : m));
  if (unit === "seconds") return (v) => (v === 0 ? "0" : FORMAT.seconds(v).replace(/\.?0+ /, (m) => (m.includes(".") ? " " : m)));
  const base = unit === "bytes" ? byteUnit(ticks.at(-1) ?? 1) : 1; // its name stands in the axis title
  const largest = Math.max(0, ...ticks.map((v) => Math.abs(v / base)));
  const power = largest >= 1e6 || (largest > 0 && largest < 1e-3) ? Math.floor(Math.log10(largest) + 1e-12) : 0; // 5.2e9, not ten digits
  const scaled = (v) => v / base / 10 ** power;
  const tolerance = 1e-9 * (largest / 10 ** power || 1);
  const digits = Array.from({ length: 13 }, (_, d) => d).find((d) => ticks.every((v) => Math.abs(scaled(v) - +scaled(v).toFixed(d)) <= tolerance)) ?? 12;
  return (v) => (v === 0 ? "0" : minus(scaled(v).toFixed(digits)) + (power ? `e${power}` : ""));
}

/** Pixels left of an axis that its labels need. */
const leftOf = (ticks, format, least) => Math.max(least, 14 + 6.8 * Math.max(0, ...ticks.map((tick) => format(tick).length)));

/** One tooltip in `host`, placed beside (x, y) and kept inside. */
function tooltip(host) {
  const tip = el("div", { class: "tip", role: "tooltip", hidden: true });
  host.append(tip);
  return {
    show(x, y, title, rows, note) {
      const list = el("dl", { class: "rows" });
      for (const [name, value, colour] of rows) {
        list.append(el("dt", {}, colour ? el("span", { class: `swatch ${colour}` }) : null, name), el("dd", {}, value));
      }
      tip.replaceChildren(el("b", {}, title), list, ...(note ? [el("p", {}, note)] : []));
      tip.hidden = false;
      const { offsetWidth: w, offsetHeight: h } = tip;
      const left = x + 16 + w <= host.clientWidth ? x + 16 : x - 16 - w;
      tip.style.left = `${Math.max(4, Math.min(left, host.clientWidth - w - 4))}px`;
      tip.style.top = `${Math.max(4, Math.min(y - h / 2, host.clientHeight - h - 4))}px`;
    },
    hide() { tip.hidden = true; },
  };
}

/** A row of buttons of which one is pressed. */
function switcher(label, options, chosen, pick) {
  const group = el("div", { class: "switch", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    group.append(el("button", { type: "button", "aria-pressed": `${value === chosen}`, onclick: (event) => {
      for (const other of group.children) other.setAttribute("aria-pressed", `${other === event.currentTarget}`);
      pick(value);
    } }, text));
  }
  return group;
}

function checkbox(text, checked, change) {
  const input = el("input", { type: "checkbox", onchange: () => change(input.checked) });
  input.checked = checked;
  return el("label", {}, input, text);
}

/** Draws now and whenever the width changes: charts are laid out in real pixels, so text is never scaled. */
function responsive(host, draw) {
  let width = 0;
  const redraw = () => { if (host.clientWidth && host.clientWidth !== width) { width = host.clientWidth; draw(width); } };
  new ResizeObserver(redraw).observe(host);
  redraw();
  return () => draw(host.clientWidth || 640);
}

const canvas = (width, height, attributes) => el("svg", { width, height, viewBox: `0 0 ${width} ${height}`, ...attributes });
const named = (name) => `${name.charAt(0).toUpperCase()}${name.slice(1)}`;
