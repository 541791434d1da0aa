// The curves of a comparison: loss above, learning rate below, over one axis. Losses are null where they were not finite.
"use strict";
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 66, RIGHT = 14, TOP = 28, BOTTOM = 40;
const COLORS = 8, DASHES = ["", "7 4", "2 3", "10 3 2 3"];
const MANY_RUNS = 12, MANY_DOTS = 1500;
const UNITS = {steps: "update", tokens: "tokens", area: "area under the learning rates"};

const data = JSON.parse(document.getElementById("data").textContent);
const state = {kind: "validation", across: "steps", part: "whole", hidden: new Set(), under: null};
const plots = {};

const element = id => document.getElementById(id);
const colorOf = run => `var(--c${run.cell % COLORS})`;
const dashOf = run => DASHES[Math.floor(run.cell / COLORS) % DASHES.length];
const whole = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
const compact = new Intl.NumberFormat("en-US", {notation: "compact", maximumSignificantDigits: 4});

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

for (const run of data.runs)
  if (!Array.isArray(run.training.tokens)) run.training.tokens = run.training.steps.map(step => step * run.training.tokens);

function short(value) {
  const size = Math.abs(value);
  return size === 0 || (size >= 0.01 && size < 1e5) ? String(Number(value.toPrecision(5))) : value.toExponential().replace("e+", "e");
}

function extent(columns) {
  let low = Infinity, high = -Infinity;
  for (const column of columns)
    for (const value of column)
      if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
  return low > high ? [0, 1] : low === high ? [low - Math.abs(low) / 2 - 1e-9, high + Math.abs(high) / 2 + 1e-9] : [low, high];
}

function scale([low, high], from, to, spacing) {
  const rough = (high - low) / Math.max(2, Math.abs(to - from) / spacing);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find(factor => factor * power >= rough) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return {low, high, from, to, ticks, place: value => from + (value - low) / (high - low) * (to - from)};
}

function nearest(places, value) {
  let low = 0, high = places.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - places[low - 1] <= places[low] - value ? low - 1 : low;
}

// The curves to draw: of loss in the kind chosen, of the rate always every update.
function curves(kind, column) {
  return data.runs.filter(run => !state.hidden.has(run.cell)).map(run => ({run, rows: run[kind], x: run[kind][state.across], y: run[kind][column]}))
    .filter(curve => curve.x.length && curve.x[0] !== null);
}

function path(curve, x, y) {
  let text = "", down = false;
  curve.x.forEach((value, i) => {
    const shown = curve.y[i] !== null;
    if (shown) text += `${down ? "L" : "M"}${x.place(value).toFixed(1)} ${y.place(curve.y[i]).toFixed(1)}`;
    down = shown;
  });
  return text;
}

function line(curve, x, y) {
  return svg("path", {class: "curve", d: path(curve, x, y), style: `stroke:${colorOf(curve.run)}`, "stroke-dasharray": dashOf(curve.run)});
}

function dot(curve, i, x, y, r) {
  const fill = curve.rows.annealed && !curve.rows.annealed[i] ? "var(--ground)" : colorOf(curve.run);
  return svg("circle", {cx: x.place(curve.x[i]), cy: y.place(curve.y[i]), r, style: `fill:${fill};stroke:${colorOf(curve.run)};stroke-width:1.6`});
}

function plot(id, drawn, title, dots, bounds, fromZero) {
  const host = element(id), width = host.clientWidth, height = host.clientHeight;
  const x = scale(bounds, LEFT, width - RIGHT, 90);
  const inside = drawn.map(curve => curve.y.filter((_, i) => curve.x[i] >= bounds[0]));
  const [low, high] = extent(inside.some(column => column.length) ? inside : drawn.map(curve => curve.y));
  const y = scale([fromZero ? 0 : low - (high - low) * 0.04, high + (high - low) * 0.05], height - BOTTOM, TOP, 42);
  const made = [];
  for (const tick of y.ticks) {
    made.push(svg("line", {class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.place(tick), y2: y.place(tick)}));
    made.push(svg("text", {x: LEFT - 8, y: y.place(tick) + 4, "text-anchor": "end"}, short(tick)));
  }
  for (const tick of x.ticks) {
    const anchor = x.place(tick) > width - RIGHT - 14 ? "end" : "middle";
    made.push(svg("text", {x: x.place(tick), y: height - BOTTOM + 18, "text-anchor": anchor}, compact.format(tick)));
  }
  made.push(svg("line", {class: "axis", x1: LEFT, x2: width - RIGHT, y1: height - BOTTOM, y2: height - BOTTOM}));
  made.push(svg("text", {class: "title", x: LEFT, y: 15}, title));
  made.push(svg("text", {x: (LEFT + width) / 2, y: height - 5, "text-anchor": "middle"}, UNITS[state.across]));
  const clip = svg("clipPath", {id: `${id}-clip`});
  clip.append(svg("rect", {x: LEFT - 5, y: TOP - 8, width: Math.max(0, width - LEFT - RIGHT + 10), height: height - TOP - BOTTOM + 16}));
  const inner = svg("g", {"clip-path": `url(#${id}-clip)`});
  inner.append(...drawn.map(curve => line(curve, x, y)));
  if (dots && drawn.reduce((sum, curve) => sum + curve.x.length, 0) <= MANY_DOTS)
    for (const curve of drawn)
      curve.x.forEach((_, i) => { if (curve.y[i] !== null) inner.append(dot(curve, i, x, y, drawn.length > MANY_RUNS ? 2.2 : 3.4)); });
  const cross = svg("g", {class: "cross", "clip-path": `url(#${id}-clip)`});
  host.classList.toggle("many", drawn.length > MANY_RUNS);
  host.classList.toggle("training", state.kind === "training" && id === "loss");
  host.replaceChildren(clip, ...made, inner, cross);
  plots[id] = {x, y, drawn, cross};
}

function draw() {
  for (const button of document.querySelectorAll("[data-switch]"))
    button.setAttribute("aria-pressed", String(state[button.dataset.switch] === button.dataset.to));
  const losses = curves(state.kind, "loss"), rates = curves("training", "lr");
  const last = extent([...losses, ...rates].map(curve => curve.x))[1];
  const bounds = [state.part === "end" ? last / 2 : 0, last];
  plot("loss", losses, `${state.kind === "validation" ? "Validation" : "Training"} loss, nats per token`, state.kind === "validation", bounds, false);
  plot("rate", rates, "Learning rate", false, bounds, true);
  show(null);
}

// Mark a row of a run and say what it holds.
function show(found) {
  state.under = found;
  const tip = element("tip");
  for (const one of Object.values(plots)) one.cross.replaceChildren();
  tip.hidden = found === null;
  if (found === null) return;
  const {curve, index} = found, {run, rows} = curve, {x, y, cross} = plots.loss;
  const at = x.place(curve.x[index]);
  cross.append(svg("line", {x1: at, x2: at, y1: y.from, y2: y.to}), line(curve, x, y));
  if (curve.y[index] !== null) cross.append(dot(curve, index, x, y, 5));
  const rate = plots.rate.drawn.find(one => one.run === run);
  if (rate) plots.rate.cross.append(svg("line", {x1: at, x2: at, y1: plots.rate.y.from, y2: plots.rate.y.to}), line(rate, plots.rate.x, plots.rate.y));
  tip.textContent = [
    `${run.name}: ${data.cells[run.cell]}, peak ${run.peak}, seed ${run.seed}`,
    `update ${whole.format(rows.steps[index])}, ${whole.format(rows.tokens[index])} tokens${rows.area[index] === null ? "" : `, area ${rows.area[index]}`}`,
    `${state.kind} loss ${curve.y[index] ?? "not finite"}, learning rate ${rows.lr[index]}` + (rows.annealed ? (rows.annealed[index] ? ", annealed" : ", not annealed") : ""),
  ].join("\n");
  const room = element("loss").clientWidth - tip.offsetWidth;
  tip.style.left = `${Math.max(0, Math.min(room, at > room ? at - tip.offsetWidth - 14 : at + 14))}px`;
  tip.style.top = `${Math.max(0, y.place(curve.y[index] ?? y.high) - tip.offsetHeight - 14)}px`;
}

function pointed(event) {
  const box = element("loss").getBoundingClientRect(), {x, y, drawn} = plots.loss;
  const px = event.clientX - box.left, py = event.clientY - box.top;
  const value = x.low + (px - x.from) / (x.to - x.from) * (x.high - x.low);
  let best = null, least = Infinity;
  for (const curve of drawn) {
    const middle = nearest(curve.x, value);
    for (let index = Math.max(0, middle - 2); index <= Math.min(curve.x.length - 1, middle + 2); index++) {
      if (curve.y[index] === null || curve.x[index] < x.low) continue;
      const distance = Math.hypot(x.place(curve.x[index]) - px, y.place(curve.y[index]) - py);
      if (distance < least) [best, least] = [{curve, index}, distance];
    }
  }
  show(best);
}

function keyed(event) {
  const {drawn} = plots.loss;
  if (event.key === "Escape") return show(null);
  const along = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20}[event.key], across = {ArrowUp: -1, ArrowDown: 1}[event.key];
  if ((!along && !across) || !drawn.length) return undefined;
  event.preventDefault();
  if (!state.under) return show({curve: drawn[0], index: drawn[0].x.length - 1});
  const {curve, index} = state.under;
  if (along) return show({curve, index: Math.min(curve.x.length - 1, Math.max(0, index + along))});
  const other = drawn[(drawn.indexOf(curve) + across + drawn.length) % drawn.length];
  return show({curve: other, index: nearest(other.x, curve.x[index])});
}

data.cells.forEach((name, cell) => {
  const button = document.createElement("button"), swatch = svg("svg", {viewBox: "0 0 24 8", "aria-hidden": "true"});
  swatch.append(svg("line", {x1: 0, x2: 24, y1: 4, y2: 4, "stroke-width": 3, style: `stroke:${colorOf({cell})}`, "stroke-dasharray": dashOf({cell})}));
  button.append(swatch, name);
  button.setAttribute("aria-pressed", "true");
  button.addEventListener("click", () => {
    if (!state.hidden.delete(cell)) state.hidden.add(cell);
    button.setAttribute("aria-pressed", String(!state.hidden.has(cell)));
    draw();
  });
  element("key").append(button);
});
document.addEventListener("click", event => {
  const {switch: name, to} = event.target.dataset ?? {};
  if (name) { state[name] = to; draw(); }
});
element("loss").addEventListener("pointermove", pointed);
element("loss").addEventListener("pointerleave", () => show(null));
element("loss").addEventListener("keydown", keyed);
element("loss").addEventListener("blur", () => show(null));
new ResizeObserver(draw).observe(element("loss"));
draw();
