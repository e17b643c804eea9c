// ---- Learning rates -----------------------------------------------------------------------------------------------

function rates(host) {
  const shown = DATA.methods.filter((m) => m.trials.length > 1);
  const scores = shown.flatMap((m) => m.trials.map((t) => t[1])), lrs = shown.flatMap((m) => m.trials.map((t) => t[0]));
  const log = lrs.every((v) => v > 0);
  const [bottom, top] = extent(fences(scores), 0.1);
  const [low, high] = log ? [Math.min(...lrs) / 1.6, Math.max(...lrs) * 1.6] : extent(lrs);
  const clamp = (v) => Math.max(bottom, Math.min(top, v));
  const grid = el("div", { class: "panels" });
  host.prepend(grid);
  for (const m of shown) {
    const plot = el("div"), chosen = m.trials.find((t) => t[0] === m.lr && (m.size === null || t[2] === m.size));
    const sizes = [...new Set(m.trials.map((t) => t[2]))];
    const said = [m.size === null ? "" : `size ${m.size}, `, m.lr === null ? "" : FORMAT.rate(m.lr), chosen ? " chosen" : " used", m.edge && chosen ? ", at the edge of those tried" : ""];
    grid.append(el("div", { class: `panel ${m.colour}` }, el("h3", {}, m.label), plot, el("p", {}, m.lr === null ? "" : said.join(""))));
    responsive(plot, (width) => {
      const yTicks = linearTicks(bottom, top, 3), yFormat = tickFormat(yTicks, "score");
      const box = { left: leftOf(yTicks, yFormat, 44), right: width - 6, top: 8, bottom: 96 };
      const x = scale(low, high, box.left, box.right, log), y = scale(bottom, top, box.bottom, box.top);
      const xTicks = log ? logTicks(low, high, 4) : linearTicks(low, high, 3);
      const told = m.trials.map((t) => `${FORMAT.rate(t[0])}${t[2] === null ? "" : `, size ${t[2]},`} gives ${FORMAT.score(t[1])}`);
      const svg = canvas(width, 118, { role: "img", "aria-label": `${m.label}: ${told.join("; ")}` });
      svg.append(axes(box, { at: x, ticks: xTicks, format: FORMAT.rate }, { at: y, ticks: yTicks, format: yFormat }));
      sizes.forEach((size, index) => {
        const own = m.trials.filter((t) => t[2] === size);
        svg.append(el("path", { class: `line d${index % 4}`, d: own.map((t, i) => `${i ? "L" : "M"}${round(x(t[0]))} ${round(y(clamp(t[1])))}`).join("") }));
      });
      for (const t of m.trials) {
        const name = `learning rate ${FORMAT.rate(t[0])}${t[2] === null ? "" : `, size ${t[2]}`}: ${METRIC} ${FORMAT.score(t[1])}`;
        svg.append(el("circle", { class: `trial${t === chosen ? " chosen" : ""}`, cx: round(x(t[0])), cy: round(y(clamp(t[1]))), r: t === chosen ? 5 : 3 },
          el("title", {}, name)));
      }
      plot.replaceChildren(svg);
    });
  }
}
