// The page's charts, drawn as SVG, and its start. Goes on where page.js ends; no library, no network.

// ── Charts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const along = (step) => {
    const made = [];
    for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) made.push(Number(tick.toPrecision(12)));
    return made;
  };
  // The narrowest step that is wide enough, or a narrower one that gives two ticks: one alone is no scale.
  const steps = [10, 5, 2, 1, 0.5, 0.2, 0.1].map((factor) => factor * power);
  const narrow = steps.findLastIndex((step) => step >= rough);
  const step = steps.slice(narrow).find((size) => along(size).length >= 2);
  return along(step ?? steps[narrow]);
}

const short = (number) => {
  const size = Math.abs(number);
  if (size >= 1e9) return number.toExponential(1).replace(".0e", "e").replace("+", "");
  if (size >= 999500) return `${Number((number / 1e6).toPrecision(3))}M`;
  if (size >= 10000) return `${Number((number / 1000).toPrecision(3))}k`;
  return size !== 0 && size < 0.001 ? number.toExponential(0) : String(Number(number.toPrecision(4)));
};

function canvas(host, height, label) {
  const width = host.clientWidth;
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  host.replaceChildren(svg);
  return [svg, width];
}

// One metric: a dot and its error bar for every row, the runs as faint dots, published values as open diamonds.
function dotPlot(host, columnIndex) {
  const column = data.columns[columnIndex];
  const lines = data.rows.map((_, row) => cells.get(`${row},${columnIndex}`)).filter(Boolean);
  const numbers = lines.flatMap((cell) => [
    ...(cell.measured ? [...cell.measured.values, cell.measured.mean - (cell.measured.sd ?? 0), cell.measured.mean + (cell.measured.sd ?? 0)] : []),
    ...cell.published.map((value) => value.value),
  ]);
  let [low, high] = [Math.min(...numbers), Math.max(...numbers)];
  // A scale around one value says nothing but that value; and none goes beyond what the metric can be.
  const only = low === high ? [low] : null;
  const pad = only ? 1 : Math.max((high - low) * 0.08, 0.25);
  [low, high] = [low - pad, high + pad];
  const marked = only ?? ticks(low, high, 4).filter((tick) => column.unit !== "percent" || tick <= 100);
  const pitch = 25;
  const height = lines.length * pitch + 30;
  const summary = lines.filter((cell) => cell.measured).map((cell) => `${data.rows[cell.row].label} ${cell.measured.mean.toFixed(1)}`).join(", ");
  const [svg, width] = canvas(host, height, `${column.title}, ${column.label}: ${summary}`);
  const names = Math.min(190, width * 0.44);
  const x = (value) => names + ((value - low) / (high - low)) * (width - names - 12);
  for (const tick of marked) {
    svg.append(shape("line", { class: "grid-line", x1: x(tick), x2: x(tick), y1: 0, y2: height - 24 }));
    svg.append(shape("text", { x: x(tick), y: height - 8, "text-anchor": "middle" }, short(tick)));
  }
  const base = data.baseline === null ? null : cells.get(`${data.baseline},${columnIndex}`)?.measured;
  if (base) svg.append(shape("line", { class: "baseline-line", x1: x(base.mean), x2: x(base.mean), y1: 0, y2: height - 24 }));
  lines.forEach((cell, index) => {
    const y = index * pitch + 14;
    const { colour } = look(cell.row);
    const label = data.rows[cell.row].label;
    const room = Math.floor(names / 6.6);
    const name = shape("text", { class: "name", x: 0, y: y + 4 }, label.length > room ? `${label.slice(0, room - 1)}…` : label);
    name.append(shape("title", {}, label));
    svg.append(name);
    if (cell.measured) {
      const m = cell.measured;
      for (const value of m.values) svg.append(shape("circle", { cx: x(value), cy: y, r: 2.6, fill: colour, opacity: 0.35 }));
      if (m.sd !== null) svg.append(shape("line", { x1: x(m.mean - m.sd), x2: x(m.mean + m.sd), y1: y, y2: y, stroke: colour, "stroke-width": 2 }));
      const dot = shape("circle", { cx: x(m.mean), cy: y, r: 5, fill: colour });
      dot.append(shape("title", {}, `${label}: ${m.mean.toFixed(2)}${m.sd === null ? "" : ` ± ${m.sd.toFixed(2)}`} (${m.n})`));
      svg.append(dot);
    }
    for (const value of cell.published) {
      const [cx, cy] = [x(value.value), y];
      const mark = shape("path", { d: `M${cx} ${cy - 5}l5 5l-5 5l-5 -5z`, fill: "var(--paper)", stroke: "var(--published)", "stroke-width": 1.6 });
      mark.append(shape("title", {}, `${label}, published: ${value.value} (${data.sources[value.source].text})`));
      svg.append(mark);
    }
  });
}

// Lines over a common axis: series = [{points: [[x, y], …], colour, dash, name}].
function linePlot(host, series, { xLabel = "", marks = [], zero = false, label = "" }) {
  const all = series.flatMap((one) => one.points);
  if (!all.length) return;
  const height = 210;
  const [svg, width] = canvas(host, height, label);
  const [left, right, top, bottom] = [44, 10, 10, 36];
  const xs = all.map((point) => point[0]);
  const ys = all.map((point) => point[1]);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (zero) y0 = Math.min(y0, 0);
  const only = y0 === y1 ? [y0] : null;
  const pad = (y1 - y0) * 0.06 || Math.abs(y1) * 0.05 || 1;
  [y0, y1] = [zero && y0 === 0 ? 0 : y0 - pad, y1 + pad];
  const x = (value) => left + ((value - x0) / (x1 - x0 || 1)) * (width - left - right);
  const y = (value) => top + (1 - (value - y0) / (y1 - y0)) * (height - top - bottom);
  for (const tick of only ?? ticks(y0, y1, 4)) {
    svg.append(shape("line", { class: "grid-line", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  for (const tick of ticks(x0, x1, Math.max(2, Math.floor(width / 110)))) {
    svg.append(shape("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, short(tick)));
  }
  svg.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(shape("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, xLabel));
  for (const [value, text] of marks) {
    svg.append(shape("line", { class: "baseline-line", x1: x(value), x2: x(value), y1: top, y2: height - bottom }));
    const late = x(value) > width * 0.6;
    svg.append(shape("text", { x: x(value) + (late ? -5 : 5), y: height - bottom - 6, "text-anchor": late ? "end" : "start" }, text));
  }
  for (const one of series) {
    const path = one.points.map(([px, py], index) => `${index ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
    const line = shape("path", { d: path, fill: "none", stroke: one.colour, "stroke-width": 1.7, "stroke-dasharray": one.dash ?? "", opacity: one.faint ? 0.55 : 1, "stroke-linejoin": "round" });
    line.append(shape("title", {}, one.name));
    svg.append(line);
  }
}

function keys(list, entries) {
  list.replaceChildren(...entries.map(({ name, colour, dash }) => {
    const swatch = shape("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    swatch.append(shape("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: colour, "stroke-width": 2.4, "stroke-dasharray": dash ?? "" }));
    return element("li", {}, swatch, name);
  }));
}

const rowKey = (row) => ({ name: data.rows[row].label, ...look(row) });
const runColours = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)", "var(--c4)", "var(--c5)"];
const runKey = (index) => ({ name: data.pretrain[index].name, colour: runColours[index % runColours.length], dash: DASHES[Math.floor(index / runColours.length) % DASHES.length] });

function draw() {
  for (const host of $$(".chart:not([hidden]) .plot")) {
    if (!host.clientWidth) continue;
    const { kind, index } = host.dataset;
    if (kind === "dots") dotPlot(host, Number(index));
    if (kind === "curves") {
      const group = data.curves[index];
      linePlot(host, group.lines.map((line) => ({ ...rowKey(line.row), name: `${data.rows[line.row].label}, seed ${line.seed}`, points: line.points, faint: true })),
        { xLabel: "step", label: `Training loss, ${group.protocol}` });
    }
    if (kind === "pretrain") {
      linePlot(host, data.pretrain.map((run, number) => ({ ...runKey(number), points: run.series[index] ?? [] })).filter((one) => one.points.length),
        { xLabel: "step", label: index, zero: "zero" in host.parentElement.dataset, marks: data.pretrain.length === 1 ? data.pretrain[0].stages : [] });
    }
  }
}

// ── Start ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

for (const list of $$(".keys")) {
  if (list.dataset.kind === "pretrain") keys(list, data.pretrain.map((_, index) => runKey(index)));
  else keys(list, JSON.parse(list.dataset.rows).map(rowKey));
}

for (const box of [everyMetric, measuredOnly]) box?.addEventListener("change", () => filter(task));

let drawnWidth = 0;
new ResizeObserver(([entry]) => {
  // Drawing changes the height; only another width asks for another drawing.
  if (entry.contentRect.width === drawnWidth) return;
  drawnWidth = entry.contentRect.width;
  draw();
}).observe($("main"));
addEventListener("resize", () => {
  if (shown) putBeside(shown);
  chooseTables();
});
// What was measured is shown whole; the published collection alone is far too wide for that and opens on one protocol.
const first = data.cells.some((cell) => cell.measured) ? null : $("#protocol optgroup");
if (first) filter(first.dataset.task, $("option", first).value);
else filter("all");
goTo();
