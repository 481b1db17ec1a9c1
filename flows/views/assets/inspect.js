// Responses of one iteration, token by token.
const number = (x) => x === null || x === undefined ? "" : Math.abs(x) >= 1e5 || (x !== 0 && Math.abs(x) < 5e-4) ? x.toExponential(2)
  : Number.isInteger(x) ? String(x) : x.toFixed(3);

// --- colour: red below, green above, grey at 0; by the 98th percentile of this iteration ---

const scales = {};
for (const column of data.columns) {
  const sizes = data.responses.flatMap((r) => r.numbers[column]).filter((x) => x !== null).map(Math.abs).sort((a, b) => a - b);
  scales[column] = sizes[Math.floor(0.98 * (sizes.length - 1))] || 1;
}
function colour(value, scale) {
  if (value === null || value === undefined) return "transparent";
  const part = Math.min(1, Math.abs(value) / scale);
  return `color-mix(in oklab, var(${value < 0 ? "--low" : "--high"}) ${Math.round(65 * part)}%, transparent)`;
}

// --- the list ---

const state = { sort: "row", down: false, search: "", group: false, column: data.columns[0], at: null };
const keys = { row: (r) => r.row, score: (r) => r.score, kl: (r) => r.kl, advantage: (r) => r.raw_advantage, length: (r) => r.length };

function shown() {
  const words = state.search.toLowerCase();
  const rows = data.responses.filter((r) => !words || `${r.prompt}\n${r.response}`.toLowerCase().includes(words));
  const by = keys[state.sort], sign = state.down ? -1 : 1;
  const compare = (a, b) => sign * ((by(a) ?? -Infinity) - (by(b) ?? -Infinity)) || a.row - b.row;
  rows.sort(compare);
  if (!state.group) return rows;
  const groups = new Map();
  for (const row of rows) groups.set(row.prompt_id, [...(groups.get(row.prompt_id) || []), row]);
  return [...groups.values()].flat();
}

function list() {
  const rows = shown(), place = $("list");
  place.replaceChildren();
  let before = null;
  for (const row of rows.slice(0, 2000)) {
    if (state.group && row.prompt_id !== before) {
      const group = rows.filter((r) => r.prompt_id === row.prompt_id);
      const scores = group.map((r) => r.score).filter((x) => x !== null);
      const range = scores.length > 1 ? ` · ${group.length} responses, ${number(Math.min(...scores))} to ${number(Math.max(...scores))}` : "";
      place.append(make("li", {}, make("span", { className: "prompt", textContent: row.prompt.slice(0, 300) + range })));
      before = row.prompt_id;
    }
    const item = make("li", { role: "option", tabIndex: -1, onclick: () => open(row) },
      make("span", { className: "said", textContent: row.response.slice(0, 200) || "(empty)" }),
      make("span", { className: "faint", textContent: number(keys[state.sort === "row" ? "score" : state.sort](row)) }));
    item.dataset.row = row.row;
    place.append(item);
  }
  $("count").textContent = `${rows.length} of ${data.responses.length}`;
  mark();
}

function mark() {
  for (const item of $("list").children) {
    const at = state.at !== null && item.dataset.row === String(state.at.row);
    item.setAttribute("aria-selected", at);
    if (at) item.scrollIntoView({ block: "nearest" });
  }
}

function move(by) {
  const rows = shown(), at = rows.indexOf(state.at);
  const next = rows[Math.min(rows.length - 1, Math.max(0, at + by))];
  if (next) open(next);
}

// --- one response ---

function heatMap(row) {
  const tokens = make("div", { className: "tokens" });
  row.tokens.forEach((text, i) => {
    const sampled = !row.sampled || row.sampled[i];
    const token = make("span", { className: sampled ? "token" : "token reply", textContent: text, tabIndex: 0 });
    token.style.backgroundColor = colour(row.numbers[state.column][i], scales[state.column]);
    token.onmouseenter = token.onfocus = () => tip(numbers(row, i), token.getBoundingClientRect());
    token.onmouseleave = token.onblur = () => { $("tip").hidden = true; };
    tokens.append(token);
  });
  return tokens;
}

// The other run's responses to the prompt in this iteration, beside this one.
function pair(row) {
  const panels = data.beside.map((other) => {
    const found = other.responses.filter((r) => r.prompt_id === row.prompt_id);
    const none = `${other.run} has no response to this prompt in iteration ${data.iteration}.`;
    return make("div", {}, make("h3", { textContent: other.run }), ...found.map((r) => make("div", { className: "panel" }, heatMap(r),
      make("span", { className: "faint", textContent: `row ${r.row}, score ${number(r.score)}, KL ${number(r.kl)}` }))),
      ...(found.length ? [] : [make("p", { className: "faint", textContent: none })]));
  });
  const ours = make("div", { className: "panel" }, heatMap(row));
  if (!panels.length) return ours;
  return make("div", { className: "pair" }, make("div", {}, make("h3", { textContent: data.run }), ours), ...panels);
}

function open(row) {
  state.at = row;
  const facts = make("table");
  for (const [name, value] of [["score", row.score], ["raw score", row.raw_score], ["KL, nats", row.kl], ["mean A before whitening", row.raw_advantage],
    ["tokens", row.length], ["ended by", row.finish_reason]]) {
    facts.append(make("tr", {}, make("th", { textContent: name }),
      make("td", { className: "number", textContent: typeof value === "string" ? value : number(value) })));
  }
  $("detail").replaceChildren(
    make("h2", { textContent: `Row ${row.row}, prompt ${row.prompt_id}` }),
    make("div", { className: "panel text", textContent: row.prompt }),
    pair(row), make("div", { className: "bar" }, facts, parts(row)), elsewhere(row));
  mark();
  history.replaceState(null, "", `#row=${row.row}`);
}

function parts(row) {
  const table = make("table");
  for (const [name, value] of Object.entries(row.components || {})) {
    const all = data.responses.map((r) => r.components[name]), low = Math.min(...all), high = Math.max(...all);
    const place = high > low ? (value - low) / (high - low) : 0.5;
    const bar = make("span", { className: "share", title: `${number(low)} to ${number(high)} in this iteration` });
    bar.style.width = `${1 + 7 * place}rem`;
    bar.style.background = `color-mix(in oklab, var(--high) ${Math.round(100 * place)}%, var(--low))`;
    table.append(make("tr", {}, make("th", { textContent: name }), make("td", { className: "number", textContent: number(value) }), make("td", {}, bar)));
  }
  return table;
}

function elsewhere(row) {
  const found = (data.elsewhere[row.prompt_id] || []).filter((r) => !(r.run === data.run && r.iteration === data.iteration));
  if (!found.length) return make("p", { className: "faint", textContent: "No other iteration has this prompt." });
  const table = make("table", {}, make("tr", {}, ...["run", "iteration", "score", "KL", "response"].map((x) => make("th", { textContent: x }))));
  for (const r of found) {
    table.append(make("tr", {}, make("td", { textContent: r.run }), make("td", { className: "number", textContent: r.iteration }),
      make("td", { className: "number", textContent: number(r.score) }), make("td", { className: "number", textContent: number(r.kl) }),
      make("td", { className: "text", textContent: r.response })));
  }
  return make("div", {}, make("h2", { textContent: "The same prompt elsewhere" }), table);
}

function numbers(row, i) {
  const table = make("table");
  table.append(make("tr", {}, make("th", { colSpan: 2, textContent: `${JSON.stringify(row.tokens[i])}, position ${i}` })));
  for (const column of data.columns) {
    table.append(make("tr", {}, make("td", { textContent: column }), make("td", { className: "number", textContent: number(row.numbers[column][i]) })));
  }
  return table;
}

// --- controls ---

function select(id, names, change) {
  const place = $(id);
  for (const name of names) place.append(make("option", { value: name, textContent: name }));
  place.onchange = () => change(place.value);
}
function paint(column) {
  state.column = $("column").value = column;
  $("scale").style.background = `linear-gradient(to right, ${colour(-1, 1)}, transparent, ${colour(1, 1)})`;
  $("range").textContent = `±${number(scales[column])}`;
  if (state.at) open(state.at);
}
function sort(name) {
  if (state.sort === name) state.down = !state.down; else { state.sort = name; state.down = name !== "row"; }
  $("sort").value = name;
  $("down").textContent = state.down ? "↓" : "↑";
  list();
}
function group() {
  state.group = !state.group;
  $("group").setAttribute("aria-pressed", state.group);
  list();
}
select("sort", Object.keys(keys), (name) => { state.sort = null; sort(name); });
select("column", data.columns, paint);
$("down").onclick = () => sort(state.sort);
$("group").onclick = group;
$("search").oninput = () => { state.search = $("search").value; list(); };
addEventListener("keydown", (event) => {
  if (event.target.tagName === "INPUT") { if (event.key === "Escape") event.target.blur(); return; }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const names = Object.keys(keys), columns = data.columns;
  const act = { j: () => move(1), n: () => move(1), ArrowDown: () => move(1), k: () => move(-1), p: () => move(-1), ArrowUp: () => move(-1),
    g: group, "/": () => $("search").focus(), s: () => { const next = names[(names.indexOf(state.sort) + 1) % names.length]; state.sort = null; sort(next); },
    r: () => sort(state.sort), c: () => paint(columns[(columns.indexOf(state.column) + 1) % columns.length]) }[event.key];
  if (act) { act(); event.preventDefault(); }
});
list();
paint(state.column);
const wanted = /^#row=(\d+)$/.exec(location.hash);
const first = wanted ? data.responses.find((r) => String(r.row) === wanted[1]) : shown()[0];
if (first) open(first);
