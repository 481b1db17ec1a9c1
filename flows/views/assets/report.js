// Curves and samples of a run.
const number = (x) => x === null || x === undefined ? "" : Number.isInteger(x) && Math.abs(x) < 1e15 ? String(x)
  : x !== 0 && Math.abs(x) < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(4));
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 2 });
const short = (x) => Math.abs(x) >= 1e4 ? compact.format(x) : number(x);

function draw(tag, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// --- curves ---

const WIDTH = 320, HEIGHT = 190, LEFT = 46, RIGHT = 16, TOP = 8, BOTTOM = 24;

function ticks(low, high) {
  const step = 10 ** Math.floor(Math.log10((high - low) / 3 || 1));
  const wide = [1, 2, 5, 10].map((x) => x * step).find((x) => (high - low) / x <= 5) || step;
  const found = [];
  for (let at = Math.ceil(low / wide) * wide; at <= high + 1e-9 * wide; at += wide) found.push(+at.toPrecision(12));
  return found;
}

function reach(values, margin) {
  const there = values.filter((x) => x !== null);
  let low = Math.min(...there), high = Math.max(...there);
  if (low === high) { low -= Math.abs(low) / 10 || 0.5; high += Math.abs(high) / 10 || 0.5; }
  return [low - margin * (high - low), high + margin * (high - low)];
}

function chart(one) {
  const lines = one.lines, svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${one.title}, ${one.unit}` });
  const [x0, x1] = reach(lines.flatMap((l) => l.x), 0), [y0, y1] = reach(lines.flatMap((l) => [...l.y, ...l.low, ...l.high]), 0.05);
  const px = (x) => LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), py = (y) => HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM);
  for (const y of ticks(y0, y1)) {
    svg.append(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: py(y), y2: py(y) }));
    const label = draw("text", { x: LEFT - 5, y: py(y) + 4, "text-anchor": "end" });
    label.textContent = short(y);
    svg.append(label);
  }
  for (const x of ticks(x0, x1).filter((at) => one.x !== "iteration" || Number.isInteger(at))) {
    const label = draw("text", { x: px(x), y: HEIGHT - 8, "text-anchor": "middle" });
    label.textContent = short(x);
    svg.append(label);
  }
  const names = [...new Set(lines.map((l) => l.name))];
  for (const line of lines) {
    const colour = `c${names.indexOf(line.name) % 8}`, path = (ys) => line.x.map((x, i) => `${px(x).toFixed(1)} ${py(ys[i]).toFixed(1)}`);
    if (line.low.length) svg.append(draw("path", { class: `band ${colour}`, d: `M${path(line.low).join("L")}L${path(line.high).reverse().join("L")}Z` }));
    svg.append(draw("path", { class: `line ${colour}${line.run === data.runs[0] ? "" : " other"}`, d: `M${path(line.y).join("L")}` }));
    if (line.x.length < 40) line.x.forEach((x, i) => svg.append(draw("circle", { class: colour, cx: px(x), cy: py(line.y[i]), r: 2 })));
  }
  const cursor = draw("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const nearest = (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * WIDTH, y = (event.clientY - box.top) / box.height * HEIGHT;
    let best = null;
    for (const line of lines) line.x.forEach((at, i) => {
      const far = Math.abs(px(at) - x) + (one.x === "iteration" ? 0.02 : 1) * Math.abs(py(line.y[i]) - y);
      if (!best || far < best.far) best = { far, at, iteration: line.iterations[i] };
    });
    return best;
  };
  svg.onpointermove = (event) => {
    const best = nearest(event), table = make("table");
    cursor.setAttribute("x1", px(best.at)); cursor.setAttribute("x2", px(best.at)); cursor.setAttribute("visibility", "visible");
    table.append(make("tr", {}, make("th", { colSpan: 2, textContent: `iteration ${best.iteration}` })));
    for (const line of lines) {
      const i = line.iterations.indexOf(best.iteration);
      if (i < 0) continue;
      const name = data.runs.length > 1 ? `${line.run}: ${line.name}` : line.name;
      table.append(make("tr", {}, make("td", { textContent: name }), make("td", { className: "number", textContent: number(line.y[i]) +
        (line.low.length ? ` (${number(line.low[i])} to ${number(line.high[i])})` : "") })));
    }
    tip(table, { left: event.clientX + 14, top: event.clientY - 6, bottom: event.clientY + 12 });
  };
  svg.onpointerleave = () => { cursor.setAttribute("visibility", "hidden"); $("tip").hidden = true; };
  svg.onclick = (event) => { show(nearest(event).iteration); $("samples").scrollIntoView({ behavior: "smooth" }); };
  const legend = make("div", { className: "legend" });
  for (const name of names.length > 1 ? names : []) {
    legend.append(make("span", {}, make("span", { className: `key c${names.indexOf(name) % 8}` }), name));
  }
  if (data.runs.length > 1) legend.append(make("span", { textContent: `dashed: ${data.runs[1]}` }));
  return make("figure", { className: "chart" }, make("figcaption", {}, one.title, make("span", { className: "unit", textContent: ` ${one.unit}` })), svg, legend);
}

// --- samples ---

const kept = Object.keys(data.samples).map(Number).sort((a, b) => a - b);

function tableOf(rows) {
  const columns = data.kind === "language"
    ? [["prompt", "text"], ["response", "text"], ["score", "number"], ...(rows.some((r) => r.gold !== null) ? [["gold", "number"]] : []), ["kl", "number"]]
    : [["seed", "number"], ["episode_return", "number"], ["length", "number"], ["terminated", "text"]];
  const table = make("table", { className: data.kind === "language" ? "samples" : "" });
  table.append(make("tr", {}, ...columns.map(([name, kind]) => make("th", { className: kind === "number" ? "number" : "", textContent: name.replaceAll("_", " ") }))));
  for (const row of rows) {
    table.append(make("tr", {}, ...columns.map(([name, kind]) => {
      const cell = make("td", { className: kind === "number" ? "number" : "" });
      cell.append(kind === "number" ? number(row[name]) : make("span", { className: "text", textContent: String(row[name]) }));
      return cell;
    })));
  }
  const source = rows.length && rows[0].source ? `${rows[0].source === "rollout" ? "Of its rollout: it was not evaluated." : "Of held-out prompts."}` : "";
  return make("div", {}, make("p", { className: "faint", textContent: source }), make("div", { className: "wide" }, table));
}

function show(iteration) {
  const at = kept.reduce((best, each) => Math.abs(each - iteration) < Math.abs(best - iteration) ? each : best, kept[0]);
  $("iteration").value = at;
  const found = [tableOf(data.samples[at] || [])];
  if (at !== iteration) found.unshift(make("p", { className: "faint", textContent: `Those of iteration ${iteration} are not on this page.` }));
  if (data.beside) {
    found.unshift(make("h3", { textContent: data.runs[0] }));
    found.push(make("h3", { textContent: data.runs[1] }), data.beside[at] ? tableOf(data.beside[at])
      : make("p", { className: "faint", textContent: `Of iteration ${at} this page has none.` }));
  }
  $("shown").replaceChildren(...found);
}

for (const at of kept) $("iteration").append(make("option", { value: at, textContent: at }));
$("iteration").onchange = () => show(+$("iteration").value);
const step = (by) => show(kept[Math.max(0, Math.min(kept.length - 1, kept.indexOf(+$("iteration").value) + by))]);
$("back").onclick = () => step(-1);
$("on").onclick = () => step(1);
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const by = { j: 1, n: 1, k: -1, p: -1 }[event.key];
  if (by) { step(by); event.preventDefault(); }
});
if (kept.length) show(kept[kept.length - 1]); else $("samples").hidden = true;

// charts that are below the fold are drawn when they come into sight
const seen = new IntersectionObserver((entries) => {
  for (const entry of entries.filter((each) => each.isIntersecting)) {
    entry.target.replaceWith(chart(data.charts[+entry.target.dataset.chart]));
    seen.unobserve(entry.target);
  }
}, { rootMargin: "400px" });
data.charts.forEach((_, i) => {
  const place = make("div", { className: "chart" });
  place.style.minHeight = "15rem";
  place.dataset.chart = i;
  $("charts").append(place);
  seen.observe(place);
});
addEventListener("beforeprint", () => document.querySelectorAll("[data-chart]").forEach((place) => place.replaceWith(chart(data.charts[+place.dataset.chart]))));
