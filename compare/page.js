// The page's behaviour: filter by task and protocol, sort, provenance of a cell. No library, no network; the charts are
// in page_charts.js.
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

// The whole table, and one of each protocol for where it has no room.
const tables = $$("table.results");
const everyMetric = $("#every-metric");
const measuredOnly = $("#measured-only");
const protocols = $("#protocol");
let task = "all";

// Of a table's heads, and of its cells, one each is where Tab stops.
function stopAt(wanted) {
  if (!wanted) return;
  const kind = wanted.matches("button") ? "thead button" : "td[tabindex]";
  for (const other of $$(kind, wanted.closest("table"))) other.tabIndex = other === wanted ? 0 : -1;
}

// `home` is one of our protocols, with the foreign ones beside it, or "" for all of them.
function filter(wanted, home = protocols?.value ?? "") {
  task = wanted;
  if (protocols) {
    protocols.value = home;
    for (const group of $$("optgroup", protocols)) group.hidden = task !== "all" && group.dataset.task !== task;
  }
  for (const chip of $$(".chips button")) chip.setAttribute("aria-pressed", String(chip.dataset.task === task));
  for (const marked of $$("[data-of-task]")) {
    const folded = ("minor" in marked.dataset && !everyMetric.checked) || ("printed" in marked.dataset && measuredOnly?.checked);
    const elsewhere = home && "ofHome" in marked.dataset && marked.dataset.ofHome !== home;
    marked.hidden = folded || elsewhere || (task !== "all" && marked.dataset.ofTask !== task);
  }
  // A column goes with its head.
  const gone = new Set($$(".results thead th[data-column]").filter((head) => head.hidden).map((head) => head.dataset.column));
  for (const cell of $$(".results td[data-column]")) cell.hidden = gone.has(cell.dataset.column);
  for (const row of $$(".results tbody tr")) {
    const kind = measuredOnly?.checked ? ".measured" : ".measured, .printed";
    row.hidden = !$$("td", row).some((cell) => !cell.hidden && $(kind, cell));
  }
  for (const section of $$("main section[data-charts]")) {
    section.hidden = !$$(".chart, figure", section).some((part) => !part.hidden);
  }
  closeProvenance();
  // One cell and one head of a table at a time are in the Tab order, and they must be ones that can be seen.
  for (const table of tables) {
    stopAt(places(table)[0]);
    stopAt(heads(table)[0]);
  }
  draw();
  chooseTables();
}
for (const chip of $$(".chips button")) chip.addEventListener("click", () => filter(chip.dataset.task, ""));
protocols?.addEventListener("change", () => {
  const group = protocols.selectedOptions[0].closest("optgroup");
  filter(group ? group.dataset.task : task, protocols.value);
});

// The whole table where it has room, else one a protocol.
const scroller = $(".scroll");
function chooseTables() {
  $("#table").classList.toggle("narrow", scroller.scrollWidth - scroller.clientWidth > 2);
}

// ── Sort ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

const heads = (table) => $$("thead button", table).filter((button) => !button.closest("th").hidden);
const originals = new Map(tables.map((table) => [table, $$("tbody tr", table)]));
// Arrow keys go along the heads, and down into the column.
for (const button of $$(".results thead button")) {
  const table = button.closest("table");
  const original = originals.get(table);
  button.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const column = button.closest("th").dataset.column;
    const below = event.key === "ArrowDown" && places(table).find((cell) => column === "name" || cell.dataset.column === column);
    const wanted = step ? heads(table)[heads(table).indexOf(button) + step] : below;
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
    $("tbody", table).append(...sorted);
  });
}

// ── Provenance ───────────────────────────────────────────────────────────────────────────────────────────────────────

const panel = $("#provenance");
const cells = new Map(data.cells.map((cell) => [`${cell.row},${cell.column}`, cell]));
let pinned = null;
let shown = null;
let pressed = false;

const nameOf = (run) => run.path ?? run.run;

function facts(pairs) {
  const list = element("dl");
  for (const [name, value] of pairs) {
    if (value === null || value === undefined || value === "") continue;
    list.append(element("dt", {}, name), element("dd", name === "run on" ? { class: "date" } : {}, String(value)));
  }
  return list;
}

function describe(cell) {
  const column = data.columns[cell.column];
  const parts = [facts([
    ["protocol", column.title === column.protocol ? "" : column.protocol],
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
      element("td", {}, String(run.seed)), element("td", {}, run.value.toFixed(2)), element("td", {}, element("a", { href: `#${encodeURIComponent(`record/${nameOf(run)}`)}` }, nameOf(run))))));
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
  $("h3", panel).textContent = `${data.rows[cell.row].label} · ${column.title} · ${column.label}`;
  $("h3", panel).append(" ", element("a", { class: "anchor", href: `#${encodeURIComponent(place.dataset.link)}`, "aria-label": "Link to this number" }, "#"));
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

const places = (table) => $$("td[tabindex]", table).filter((cell) => !cell.hidden && !cell.parentElement.hidden);

for (const place of $$("td[tabindex]")) {
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
  const order = places(place.closest("table"));
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

// ── Links to a protocol, a number or a record, and copies ────────────────────────────────────────────────────────────

function goTo() {
  let wanted = decodeURIComponent(location.hash.slice(1));
  const holder = data.cells.find((cell) => cell.measured?.runs.some((run) => `record/${nameOf(run)}` === wanted));
  if (holder) wanted = $(`td[data-row="${holder.row}"][data-column="${holder.column}"]`).dataset.link;
  const all = $$("[data-link]").filter((one) => one.dataset.link === wanted);
  if (!all.length) return;
  const seen = () => all.find((one) => one.checkVisibility({ checkVisibilityCSS: true }));
  if (!seen()) filter("all", "");
  const place = seen();
  place?.scrollIntoView({ block: "center" });
  if (place?.matches("td") && pinned !== place) place.click();
}
addEventListener("hashchange", goTo);

for (const button of $$("[data-copy]")) {
  button.addEventListener("click", async () => {
    const done = await navigator.clipboard?.writeText(data.copies[button.dataset.copy]).then(() => true, () => false);
    $(".copy output").textContent = done ? `${button.textContent} copied.` : "The browser does not let this page copy.";
  });
}

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
