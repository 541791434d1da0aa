// How are curves drawn? As SVG over linear or logarithmic axes, with the values under the pointer or the arrow keys.
// A curve is {label, short, color (an index), x, y, dash, faint, dots}; y may hold null. What is drawn stays readable as
// `host.curves`.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = {left: 58, right: 14, top: 12, bottom: 40};
const DASHES = ["7 4", "2 3", "10 3 2 3", "4 2 1 2", "12 4", "1 3", "6 2 2 2 2 2", "3 3"];
const MOST_PER_PIXEL = 4;

function drawChart(host, curves, options) {
  host.curves = curves;
  host.options = options;
  if (!host.watched) watchChart(host);
  const width = host.clientWidth, height = host.clientHeight;
  if (!width || !height) return;
  const x = scaleOf(curves.map(curve => curve.x), options.x, MARGIN.left, width - MARGIN.right, {tight: true, zero: options.x0});
  const y = scaleOf(curves.map(curve => curve.y), options.y, height - MARGIN.bottom, MARGIN.top, {zero: options.y0});
  host.scales = {x, y};
  const picture = svg("svg", {width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"});
  picture.append(...axes(x, y, width, height, options));
  for (const curve of curves) picture.append(...linesOf(curve, x, y));
  const cross = svg("g", {class: "cross"});
  picture.append(cross);
  host.querySelector("svg")?.remove();
  host.prepend(picture);
  showUnder(host);
}

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

// tight: the numbers reach from end to end; zero: a linear axis begins there.
function scaleOf(columns, kind, from, to, {tight = false, zero = false}) {
  let low = Infinity, high = -Infinity;
  for (const column of columns)
    for (const value of column)
      if (value !== null && (kind !== "log" || value > 0)) { low = Math.min(low, value); high = Math.max(high, value); }
  if (low > high) [low, high] = kind === "log" ? [1, 10] : [0, 1];
  const log = kind === "log";
  if (!log && zero) low = Math.min(low, 0);
  if (log && !tight && low < high * 1e-8) low = high * 1e-8;
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 1, high + 1];
  const [a, b] = log ? [Math.log10(low), Math.log10(high)] : [low, high];
  const room = tight ? 0 : (b - a) * 0.05;
  const [start, end] = [!log && low === 0 ? a : a - room, b + room];
  const place = value => from + ((log ? Math.log10(value) : value) - start) / (end - start) * (to - from);
  const value = at => {
    const inner = start + (at - from) / (to - from) * (end - start);
    return log ? 10 ** inner : inner;
  };
  const ticks = log ? logTicks(start, end) : linearTicks(start, end, Math.max(2, Math.abs(to - from) / (tight ? 72 : 38)));
  return {kind, place, value, ticks, from, to, shows: number => number !== null && (!log || number >= 10 ** start * 0.999)};
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5, 10].find(factor => factor * power >= rough) ?? 10);
  const found = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++)
    found.push(Number((index * step).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const factors = high - low > 3 ? [1] : high - low > 1.2 ? [1, 3] : [1, 2, 3, 5, 7];
  const stride = Math.max(1, Math.ceil((high - low) / 7));
  const found = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const factor of factors) {
      const value = Number(`${factor}e${power}`);
      const exponent = Math.log10(value);
      if (exponent >= low - 1e-9 && exponent <= high + 1e-9 && (factor > 1 || power % stride === 0)) found.push(value);
    }
  return found;
}

function axes(x, y, width, height, options) {
  const found = [];
  const foot = height - MARGIN.bottom;
  for (const tick of y.ticks) {
    const at = y.place(tick);
    found.push(svg("line", {class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at}));
    found.push(svg("text", {class: "tick", x: MARGIN.left - 8, y: at + 4, "text-anchor": "end"}, shortNumber(tick)));
  }
  found.push(svg("line", {class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: foot, y2: foot}));
  for (const tick of x.ticks) {
    const at = x.place(tick);
    const anchor = at > width - MARGIN.right - 14 ? "end" : "middle";
    found.push(svg("line", {class: "axis", x1: at, x2: at, y1: foot, y2: foot + 4}));
    found.push(svg("text", {class: "tick", x: at, y: foot + 17, "text-anchor": anchor}, compact(tick)));
  }
  found.push(svg("text", {class: "title", x: (MARGIN.left + width - MARGIN.right) / 2, y: height - 5, "text-anchor": "middle"}, options.xLabel));
  return found;
}

function linesOf(curve, x, y) {
  const found = [];
  if (!curve.dots || curve.x.length > 1) {
    const line = svg("path", {class: curve.faint ? "curve faint" : "curve", d: pathOf(curve, x, y)});
    line.style.stroke = `var(--c${curve.color})`;
    if (curve.dash !== undefined) line.style.strokeDasharray = DASHES[curve.dash % DASHES.length];
    found.push(line);
  }
  if (curve.dots)
    curve.x.forEach((value, index) => {
      if (!x.shows(value) || !y.shows(curve.y[index])) return;
      const dot = svg("circle", {cx: x.place(value), cy: y.place(curve.y[index]), r: 3.5});
      dot.style.fill = `var(--c${curve.color})`;
      found.push(dot);
    });
  return found;
}

function pathOf(curve, x, y) {
  const parts = [];
  let down = false;
  for (const index of drawnIndices(curve, x)) {
    const shown = x.shows(curve.x[index]) && y.shows(curve.y[index]);
    if (shown) parts.push(`${down ? "L" : "M"}${x.place(curve.x[index]).toFixed(2)} ${y.place(curve.y[index]).toFixed(2)}`);
    down = shown;
  }
  return parts.join("");
}

// All points of a short curve; of a long one the first, last, lowest and highest in each pixel.
function drawnIndices(curve, x) {
  const length = curve.x.length;
  if (length <= MOST_PER_PIXEL * Math.abs(x.to - x.from)) return Array.from({length}, (_, index) => index);
  const kept = new Set([0, length - 1]);
  let column = null, low = 0, high = 0, last = 0;
  const close = () => [low, high, last].forEach(index => kept.add(index));
  for (let index = 0; index < length; index++) {
    const here = x.shows(curve.x[index]) ? Math.round(x.place(curve.x[index])) : -1;
    if (here !== column) { close(); column = here; low = high = index; kept.add(index); }
    const value = curve.y[index];
    if (value === null) kept.add(index);
    else if (curve.y[low] === null || value < curve.y[low]) low = index;
    if (value !== null && (curve.y[high] === null || value > curve.y[high])) high = index;
    last = index;
  }
  close();
  return [...kept].sort((a, b) => a - b);
}

function watchChart(host) {
  host.watched = true;
  host.tabIndex = 0;
  host.setAttribute("role", "group");
  const card = make("div", {className: "tip", role: "status"});
  host.append(card);
  new ResizeObserver(() => drawChart(host, host.curves, host.options)).observe(host);
  host.addEventListener("pointermove", event => showUnder(host, host.scales?.x.value(event.clientX - host.getBoundingClientRect().left)));
  host.addEventListener("pointerleave", () => showUnder(host, null));
  host.addEventListener("blur", () => showUnder(host, null));
  host.addEventListener("click", () => { if (host.under != null) host.options.onPick?.(host.under); });
  host.addEventListener("keydown", event => {
    const move = {ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20}[event.key];
    const places = host.curves[0]?.x;
    if (event.key === "Escape") showUnder(host, null);
    if (event.key === "Enter" && host.under != null) host.options.onPick?.(host.under);
    if (!move || !places?.length) return;
    event.preventDefault();
    const here = host.under == null ? (move > 0 ? -1 : places.length) : nearest(places, host.under);
    showUnder(host, places[Math.min(places.length - 1, Math.max(0, here + move))]);
  });
}

function nearest(places, value) {
  let low = 0, high = places.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < value) low = middle + 1; else high = middle;
  }
  return low > 0 && value - places[low - 1] <= places[low] - value ? low - 1 : low;
}

// The values at the drawn point nearest to `value`; null hides them, undefined shows the same place again.
function showUnder(host, value = host.under) {
  const cross = host.querySelector(".cross"), card = host.querySelector(".tip");
  if (!cross || !card) return;
  const first = host.curves.find(curve => curve.x.length);
  host.under = value == null || !first ? null : first.x[nearest(first.x, value)];
  cross.replaceChildren();
  card.replaceChildren();
  card.hidden = host.under === null;
  if (host.under === null) return;
  const {x, y} = host.scales;
  const at = x.place(host.under);
  cross.append(svg("line", {x1: at, x2: at, y1: y.from, y2: y.to}));
  card.append(make("b", {textContent: `${host.options.unit} ${whole(host.under)}`}));
  for (const curve of host.curves) {
    if (!curve.x.length || host.under > curve.x.at(-1) * 1.02) continue;
    const index = nearest(curve.x, host.under);
    if (curve.y[index] === null) continue;
    const mark = make("i", {className: "swatch"});
    mark.style.background = `var(--c${curve.color})`;
    const elsewhere = curve.x[index] === host.under ? "" : ` at ${whole(curve.x[index])}`;
    card.append(make("span", {}, mark, `${curve.label} `, make("b", {textContent: sixDigits(curve.y[index])}), elsewhere));
    if (!x.shows(curve.x[index]) || !y.shows(curve.y[index])) continue;
    const dot = svg("circle", {cx: x.place(curve.x[index]), cy: y.place(curve.y[index]), r: 4});
    dot.style.fill = `var(--c${curve.color})`;
    cross.append(dot);
  }
  card.style.left = at > host.clientWidth / 2 ? "auto" : `${at + 14}px`;
  card.style.right = at > host.clientWidth / 2 ? `${host.clientWidth - at + 14}px` : "auto";
}

const wholeNumber = new Intl.NumberFormat("en-US", {maximumFractionDigits: 0});
const compactNumber = new Intl.NumberFormat("en-US", {notation: "compact", maximumSignificantDigits: 4});

function whole(value) {
  return wholeNumber.format(value);
}

function compact(value) {
  return compactNumber.format(value);
}

function shortNumber(value) {
  const plain = Number(value.toPrecision(3));
  const size = Math.abs(plain);
  return size === 0 || (size >= 0.01 && size < 100000) ? String(plain) : plain.toExponential().replace("e+", "e");
}

function sixDigits(value) {
  return value == null ? "-" : numberText(Number(value.toPrecision(6)));
}

function numberText(value) {
  return typeof value === "number" && value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential() : String(value);
}
