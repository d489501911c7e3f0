// The page's behaviour: sort, filter by task, provenance of a cell, charts drawn as SVG. No library, no network.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function shape(name, attributes = {}, text = null) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  return made;
}

// ── A look of its own for every method, the same in all charts ───────────────────────────────────────────────────────

const FIXED = { twist: "var(--c0)", "moco-v2": "var(--c1)", byol: "var(--c2)", swav: "var(--c3)", supervised: "var(--c6)", random: "var(--grey)" };
const SPARE = ["var(--c4)", "var(--c5)", "var(--c3)", "var(--c2)", "var(--c1)"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];

const looks = new Map();
function look(row) {
  if (looks.has(row)) return looks.get(row);
  const method = data.rows[row].method;
  const kin = data.rows.map((other, index) => [other.method, index]).filter(([name]) => name === method).map(([, index]) => index);
  const strangers = [...new Set(data.rows.map((other) => other.method))].filter((name) => !(name in FIXED));
  const place = strangers.indexOf(method);
  const made = {
    colour: FIXED[method] ?? SPARE[place % SPARE.length],
    // Rows of one method share its colour and differ in the dash; so do methods beyond the palette.
    dash: DASHES[(kin.indexOf(row) + (place >= SPARE.length ? 1 : 0)) % DASHES.length],
  };
  looks.set(row, made);
  return made;
}

// ── Theme ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const theme = $("#theme");
const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
function showTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
  theme.setAttribute("aria-pressed", String(isDark()));
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();

// ── Filter by task ───────────────────────────────────────────────────────────────────────────────────────────────────

const table = $("table.results");
const everyMetric = $("#every-metric");
const measuredOnly = $("#measured-only");
let task = "all";

// Of the heads, and of the cells, one each is where Tab stops.
function stopAt(wanted) {
  const kind = wanted?.matches("button") ? "thead button" : "td[tabindex]";
  for (const other of $$(kind, table)) other.tabIndex = other === wanted ? 0 : -1;
}

function filter(wanted) {
  task = wanted;
  for (const chip of $$(".chips button")) chip.setAttribute("aria-pressed", String(chip.dataset.task === task));
  for (const marked of $$("[data-of-task]")) {
    const folded = ("minor" in marked.dataset && !everyMetric.checked) || ("printed" in marked.dataset && measuredOnly?.checked);
    marked.hidden = folded || (task !== "all" && marked.dataset.ofTask !== task);
  }
  for (const row of $$("tbody tr", table)) {
    const kind = measuredOnly?.checked ? ".measured" : ".measured, .printed";
    row.hidden = !$$("td", row).some((cell) => !cell.hidden && $(kind, cell));
  }
  for (const section of $$("main section[data-charts]")) {
    section.hidden = !$$(".chart, figure", section).some((part) => !part.hidden);
  }
  closeProvenance();
  // One cell and one head at a time are in the Tab order, and they must be ones that can be seen.
  stopAt(places()[0]);
  stopAt(heads()[0]);
  draw();
}
for (const chip of $$(".chips button")) chip.addEventListener("click", () => filter(chip.dataset.task));

// ── Sort ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

const body = $("tbody", table);
const original = $$("tr", body);
const heads = () => $$("thead button", table).filter((button) => !button.closest("th").hidden);
// Arrow keys go along the heads, and down into the column.
for (const button of $$("thead button", table)) {
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const column = button.closest("th").dataset.column;
    const below = event.key === "ArrowDown" && places().find((cell) => column === "name" || cell.dataset.column === column);
    const wanted = step ? heads()[heads().indexOf(button) + step] : below;
    if (step || below) event.preventDefault();
    if (!wanted) return;
    stopAt(wanted);
    wanted.focus();
  });
  button.addEventListener("click", () => {
    stopAt(button);
    const head = button.closest("th");
    const named = head.dataset.column === "name";
    // Names from their beginning first, numbers from the largest.
    const turns = named ? ["none", "ascending", "descending"] : ["none", "descending", "ascending"];
    const next = turns[(turns.indexOf(head.getAttribute("aria-sort")) + 1) % turns.length];
    for (const other of $$("thead th[aria-sort]", table)) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", next);
    const column = head.dataset.column;
    const value = (row) => Number.parseFloat($(`td[data-column="${column}"]`, row)?.dataset.value ?? "NaN");
    const sign = next === "ascending" ? 1 : -1;
    const label = (row) => data.rows[row.dataset.row].label;
    const sorted = next === "none" ? original : named ? [...original].sort((a, b) => sign * label(a).localeCompare(label(b))) : [...original].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What is absent goes last either way.
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    });
    body.append(...sorted);
  });
}

// ── Provenance ───────────────────────────────────────────────────────────────────────────────────────────────────────

const panel = $("#provenance");
const cells = new Map(data.cells.map((cell) => [`${cell.row},${cell.column}`, cell]));
let pinned = null;
let shown = null;
let pressed = false;

function facts(pairs) {
  const list = element("dl");
  for (const [name, value] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    list.append(element("dt", {}, name), element("dd", {}, String(value)));
  }
  return list;
}

function describe(cell) {
  const column = data.columns[cell.column];
  const parts = [facts([
    ["metric", column.definition],
    ["scale", column.scale === "published" ? "" : column.scale],
    ["recipe", column.recipe_hash?.slice(0, 12)],
    ["mixed", column.mixed],
  ])];
  if (cell.measured) {
    const m = cell.measured;
    const spread = m.sd === null ? "" : ` ± ${m.sd.toFixed(2)}`;
    const count = m.runs.length;
    const random = data.rows[cell.row].method === "random";
    const origin = m.pretrainings > 1 ? `, from ${m.pretrainings} ${random ? "initialisations" : "pretrainings"}`
      : count > 1 ? ", from one pretraining" : "";
    parts.push(element("h3", {}, `Measured: ${m.mean.toFixed(2)}${spread}, ${count} run${count > 1 ? "s" : ""}${origin}`));
    if (m.repeated) parts.push(element("p", {}, `Runs that repeat a result exactly count once: n = ${m.n}.`));
    if (cell.difference) {
      const d = cell.difference;
      const gap = Math.round(100 * d.value) / 100 + 0;
      parts.push(element("p", {}, `${gap > 0 ? "+" : ""}${gap.toFixed(2)} against ${data.rows[data.baseline].label}: ${d.said}.`));
    }
    const runs = element("table", { class: "runs" });
    runs.append(element("tr", {}, ...["seed", "value", "record"].map((name) => element("th", {}, name))));
    m.runs.forEach((run) => runs.append(element("tr", {},
      element("td", {}, String(run.seed)), element("td", {}, run.value.toFixed(2)), element("td", {}, run.path ?? run.run))));
    parts.push(runs);
    const first = m.runs[0];
    parts.push(facts([
      ["weights", [...new Set(m.runs.map((run) => run.weights))].join(", ")],
      ["SHA-256", [...new Set(m.runs.map((run) => run.weights_sha256?.slice(0, 16)).filter(Boolean))].join(", ")],
      ["hardware", [...new Set(m.runs.map((run) => run.hardware).filter(Boolean))].join(", ")],
      ["commit", [...new Set(m.runs.map((run) => run.git_commit?.replace(/^(.{12})[0-9a-f]*/, "$1")).filter(Boolean))].join(", ")],
      ["run on", first.created.slice(0, 10)],
      ["notes", [...new Set(m.runs.flatMap((run) => run.notes))].join(" ")],
    ]));
  }
  for (const value of cell.published) {
    const source = data.sources[value.source];
    parts.push(element("h3", {}, `Published: ${value.value}${value.sd === null ? "" : ` ± ${value.sd}`}`));
    parts.push(facts([
      ["source", source.text],
      ["read in", source.read === "primary" ? "the source itself" : "a copy of it"],
      ["trials", value.trials],
      ["note", value.note],
    ]));
  }
  return parts;
}

function showProvenance(place) {
  const cell = cells.get(`${place.dataset.row},${place.dataset.column}`);
  if (!cell) return;
  hideMark();
  shown = place;
  place.setAttribute("aria-expanded", "true");
  const column = data.columns[cell.column];
  $("h3", panel).textContent = `${data.rows[cell.row].label} · ${column.protocol} · ${column.label}`;
  $(".body", panel).replaceChildren(...describe(cell));
  $(".body", panel).scrollTop = 0;
  panel.hidden = false;
  putBeside(place);
}

function putBeside(place) {
  const box = place.getBoundingClientRect();
  const width = panel.offsetWidth;
  const height = panel.offsetHeight;
  const left = Math.min(Math.max(box.right - width, 16), document.documentElement.clientWidth - width - 16);
  const below = box.bottom + 8 + height < innerHeight || box.top < height + 16;
  panel.style.left = `${left + scrollX}px`;
  panel.style.top = `${(below ? box.bottom + 8 : box.top - height - 8) + scrollY}px`;
}

function hideMark() {
  shown?.setAttribute("aria-expanded", "false");
}

function closeProvenance() {
  hideMark();
  pinned = shown = null;
  panel.hidden = true;
}

const places = () => $$("td[tabindex]", table).filter((cell) => !cell.hidden && !cell.parentElement.hidden);

for (const place of $$("td[tabindex]", table)) {
  let timer = null;
  place.addEventListener("mouseenter", () => {
    if (pinned) return;
    timer = setTimeout(() => showProvenance(place), 150);
  });
  place.addEventListener("mouseleave", () => {
    clearTimeout(timer);
    if (!pinned && document.activeElement !== place) closeProvenance();
  });
  // A press focuses too; were the panel shown then, it could come to lie under the finger and swallow the click.
  place.addEventListener("pointerdown", () => { pressed = true; });
  place.addEventListener("focus", () => { if (!pinned && !pressed) showProvenance(place); });
  place.addEventListener("blur", () => { if (!pinned) closeProvenance(); });
  place.addEventListener("click", () => {
    pressed = false;
    const again = pinned === place;
    closeProvenance();
    if (!again) {
      pinned = place;
      showProvenance(place);
      // On a phone the panel is a sheet over the foot of the screen: the cell must stay in sight above it.
      const covered = place.getBoundingClientRect().bottom + 12 - panel.getBoundingClientRect().top;
      if (getComputedStyle(panel).position === "fixed" && covered > 0) scrollBy({ top: covered });
    }
  });
  place.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (step) {
      event.preventDefault();
      move(place, step);
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      place.click();
    }
  });
}

// Arrow keys go to the nearest cell that holds something; Tab passes the whole table in one step.
function move(place, [across, down]) {
  const order = places();
  const here = place.getBoundingClientRect();
  const ahead = order.filter((cell) => {
    const box = cell.getBoundingClientRect();
    return across ? cell.parentElement === place.parentElement && Math.sign(box.left - here.left) === across
      : cell.dataset.column === place.dataset.column && Math.sign(box.top - here.top) === down;
  });
  const distance = (cell) => Math.abs(cell.getBoundingClientRect()[across ? "left" : "top"] - here[across ? "left" : "top"]);
  const next = ahead.sort((a, b) => distance(a) - distance(b))[0];
  if (!next) return;
  stopAt(next);
  pinned = null;
  next.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeProvenance();
});
document.addEventListener("pointerup", () => { pressed = false; });
document.addEventListener("click", (event) => {
  if (!panel.contains(event.target) && !event.target.closest("td[tabindex]")) closeProvenance();
});
$(".close", panel).addEventListener("click", closeProvenance);

// ── Charts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const made = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) made.push(Number(tick.toPrecision(12)));
  return made;
}

const short = (number) => {
  const size = Math.abs(number);
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
  const pad = Math.max((high - low) * 0.08, 0.25);
  [low, high] = [low - pad, high + pad];
  const pitch = 25;
  const height = lines.length * pitch + 30;
  const summary = lines.filter((cell) => cell.measured).map((cell) => `${data.rows[cell.row].label} ${cell.measured.mean.toFixed(1)}`).join(", ");
  const [svg, width] = canvas(host, height, `${column.protocol}, ${column.label}: ${summary}`);
  const names = Math.min(190, width * 0.44);
  const x = (value) => names + ((value - low) / (high - low)) * (width - names - 12);
  for (const tick of ticks(low, high, 4)) {
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

// Lines over a common axis: series = [{points: [[x, y, sd?], …], colour, dash, name, open}].
function linePlot(host, series, { xLabel = "", yLabel = "", logX = false, xTicks = null, marks = [], dots = false, label = "" }) {
  const all = series.flatMap((one) => one.points);
  if (!all.length) return;
  const height = 210;
  const [svg, width] = canvas(host, height, label);
  const [left, right, top, bottom] = [44, 10, 10, 36];
  const xs = all.map((point) => point[0]);
  const ys = all.flatMap((point) => [point[1] - (point[2] ?? 0), point[1] + (point[2] ?? 0)]);
  const scale = logX ? Math.log10 : (value) => value;
  const [x0, x1] = [scale(Math.min(...xs)), scale(Math.max(...xs))];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  const pad = (y1 - y0) * 0.06 || Math.abs(y1) * 0.05 || 1;
  [y0, y1] = [y0 - pad, y1 + pad];
  const inset = dots ? 14 : 0;
  const x = (value) => left + inset + ((scale(value) - x0) / (x1 - x0 || 1)) * (width - left - right - 2 * inset);
  const y = (value) => top + (1 - (value - y0) / (y1 - y0)) * (height - top - bottom);
  for (const tick of ticks(y0, y1, 4)) {
    svg.append(shape("line", { class: "grid-line", x1: left, x2: width - right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, short(tick)));
  }
  const under = xTicks ?? ticks(x0, x1, Math.max(2, Math.floor(width / 110))).map((tick) => [tick, short(tick)]);
  for (const [value, text] of under) svg.append(shape("text", { x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, text));
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
    if (!dots) continue;
    for (const [px, py, sd] of one.points) {
      if (sd) svg.append(shape("line", { x1: x(px), x2: x(px), y1: y(py - sd), y2: y(py + sd), stroke: one.colour, "stroke-width": 2 }));
      const dot = shape("circle", { cx: x(px), cy: y(py), r: 4, fill: one.open ? "var(--paper)" : one.colour, stroke: one.colour, "stroke-width": 1.6 });
      dot.append(shape("title", {}, `${one.name}: ${py.toFixed(2)}${sd ? ` ± ${sd.toFixed(2)}` : ""}`));
      svg.append(dot);
    }
  }
  if (yLabel) svg.append(shape("text", { x: 0, y: top - 1 }, yLabel));
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
    if (kind === "labels") {
      const family = data.labels[index];
      const shares = [...new Set(family.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
      linePlot(host, family.lines.map((line) => ({ ...rowKey(line.row), points: line.points, open: line.published })),
        { logX: true, dots: true, xLabel: "share of labels", xTicks: shares.map((share) => [share, `${share} %`]), label: family.title });
    }
    if (kind === "curves") {
      const group = data.curves[index];
      linePlot(host, group.lines.map((line) => ({ ...rowKey(line.row), name: `${data.rows[line.row].label}, seed ${line.seed}`, points: line.points, faint: true })),
        { xLabel: "step", label: `Training loss, ${group.protocol}` });
    }
    if (kind === "pretrain") {
      linePlot(host, data.pretrain.map((run, number) => ({ ...runKey(number), points: run.series[index] ?? [] })).filter((one) => one.points.length),
        { xLabel: "step", label: index, marks: data.pretrain.length === 1 ? data.pretrain[0].stages : [] });
    }
  }
}

for (const list of $$(".keys")) {
  if (list.dataset.kind === "pretrain") keys(list, data.pretrain.map((_, index) => runKey(index)));
  else keys(list, JSON.parse(list.dataset.rows).map(rowKey));
}

for (const box of [everyMetric, measuredOnly]) box?.addEventListener("change", () => filter(task));

// ── Pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

const dialog = $("#picture");
for (const button of $$(".pictures button")) {
  button.addEventListener("click", () => {
    const image = $("img", button);
    Object.assign($("img", dialog), { src: image.src, alt: image.alt });
    $("p", dialog).textContent = image.alt;
    dialog.showModal();
  });
}
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });

let drawnWidth = 0;
new ResizeObserver(([entry]) => {
  // Drawing changes the height; only another width asks for another drawing.
  if (entry.contentRect.width === drawnWidth) return;
  drawnWidth = entry.contentRect.width;
  draw();
}).observe($("main"));
addEventListener("resize", () => { if (shown) putBeside(shown); });
filter("all");
