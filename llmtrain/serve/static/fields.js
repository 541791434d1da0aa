// How is one parameter set? By a slider beside its exact value, a choice, or text, as its JSON Schema has it.
// A slider has a scale: places 0 to `places`, each a number; it moves in the unit that is written.

const LENGTH = /^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*([KMBT]?)\s*(steps?|tokens?|%)\s*$/i;
const SUFFIXES = {"": 1, K: 1e3, M: 1e6, B: 1e9, T: 1e12};
const LENGTH_PLACES = 200;
const PEAK_RANGE = [1e-6, 1e-1];
const HORIZON_RANGE = {steps: [100, 1e6], tokens: [1e7, 1e14]};
const LONGEST = {steps: 1e5, tokens: 1e12};

// {node, show(value, config), complain(message)}; `changed(value)` hears what the user sets.
function field(key, schema, label, changed) {
  const id = `field-${++field.count}`;
  const error = make("p", {className: "error", id: `${id}-error`});
  const caption = make("label", {for: id, textContent: key.replaceAll("_", " ")});
  const made = inputFor(key, schema, id, label, changed);
  made.input.setAttribute("aria-describedby", error.id);
  if (schema.description) caption.title = schema.description;
  const node = make("div", {className: made.slider ? "field" : "field plain"}, caption, ...[made.slider, made.input].filter(Boolean), error);
  node.dataset.key = key;
  const complain = message => {
    error.textContent = message;
    markInvalid(made.input, message !== "");
  };
  return {node, show: made.show, complain};
}
field.count = 0;

function markInvalid(input, invalid) {
  if (invalid) input.setAttribute("aria-invalid", "true");
  else input.removeAttribute("aria-invalid");
}

function inputFor(key, schema, id, label, changed) {
  if (schema.enum) return choice(schema, id, changed);
  if (schema.type === "array") return list(schema, id, changed);
  if (schema.type === "number" || schema.type === "integer") return withSlider(key, schema, id, label, changed, numberScale, readNumber);
  if (schema.anyOf) return withSlider(key, schema, id, label, changed, lengthScale, String);
  return text(id, changed, String);
}

function choice(schema, id, changed) {
  const input = make("select", {id}, ...schema.enum.map(name => make("option", {textContent: name})));
  input.addEventListener("change", () => changed(input.value));
  return {input, show: value => { input.value = value ?? schema.default; }};
}

function text(id, changed, read) {
  const input = make("input", {id, autocomplete: "off", spellcheck: false});
  input.addEventListener("input", () => changed(read(input.value)));
  return {input, show: value => { if (document.activeElement !== input) input.value = value; }};
}

function readNumber(written) {
  const value = Number(written);
  return written.trim() === "" || Number.isNaN(value) ? written : value;
}

function withSlider(key, schema, id, label, changed, scaleFor, read) {
  const {input} = text(id, value => { changed(value); place(value); }, read);
  const slider = make("input", {type: "range", min: 0, step: 1, "aria-label": `${key.replaceAll("_", " ")} of ${label}, slider`});
  let scale = null;
  const place = value => {
    const at = scale?.toPlace(value);
    slider.disabled = at === undefined;
    if (slider.disabled) return;
    slider.max = scale.places;
    slider.value = Math.min(scale.places, Math.max(0, Math.round(at)));
    slider.setAttribute("aria-valuetext", numberText(value));
  };
  slider.addEventListener("input", () => {
    const value = scale.fromPlace(Number(slider.value));
    input.value = numberText(value);
    slider.setAttribute("aria-valuetext", numberText(value));
    changed(value);
  });
  const show = (value, config) => {
    const shown = value ?? schema.default ?? "";
    scale = scaleFor(key, schema, shown, config);
    if (document.activeElement !== input) input.value = numberText(shown);
    if (document.activeElement !== slider) place(shown);
  };
  return {slider, input, show};
}

function list(schema, id, changed) {
  const items = schema.items ?? {};
  if (items.type === "number" || items.anyOf) {
    const read = written => written.split(",").map(item => item.trim()).filter(item => item)
      .map(item => items.type === "number" ? readNumber(item) : item);
    const made = text(id, changed, read);
    return {...made, show: value => { if (document.activeElement !== made.input) made.input.value = (value ?? schema.default ?? []).join(", "); }};
  }
  const input = make("textarea", {id, rows: 4, spellcheck: false});
  input.addEventListener("input", () => {
    try { changed(JSON.parse(input.value)); } catch { changed(input.value); }
  });
  const shown = value => typeof value === "string" ? value : `[${value.map(item => JSON.stringify(item)).join(",\n ")}]`;
  return {input, show: value => { if (document.activeElement !== input) input.value = shown(value ?? []); }};
}

function numberScale(key, schema) {
  if (key === "peak") return logScale(...PEAK_RANGE, 500, value => value);
  const [low, high] = numberRange(schema);
  const step = schema.type === "integer" ? 1 : (high - low) / 100;
  return {
    places: Math.round((high - low) / step),
    toPlace: value => typeof value === "number" ? (value - low) / step : undefined,
    fromPlace: place => digits(low + place * step, 6),
  };
}

// The schema's bounds where both are near, else some room around the default.
function numberRange(schema) {
  if (schema.maximum <= 1 && schema.minimum >= 0) return [schema.minimum, schema.maximum];
  const usual = schema.default ?? 1;
  if (schema.type === "integer") return [1, Math.max(10, 4 * usual)];
  return usual > 0 && usual < 1 ? [0, 1] : [0, 4 * Math.max(1, usual)];
}

function lengthScale(key, schema, shown, config) {
  const [, unit] = lengthOf(shown) ?? [];
  const write = value => writeLength(value, unit);
  const count = value => { const read = lengthOf(value); return read && read[1] === unit ? read[0] : undefined; };
  if (unit === undefined) return {places: LENGTH_PLACES, toPlace: () => undefined};
  if (key === "horizon" && HORIZON_RANGE[unit]) return logScale(...HORIZON_RANGE[unit], 400, write, count);
  const [horizon, horizonUnit] = lengthOf(config.horizon) ?? [];
  const longest = unit === "%" ? 100 : horizonUnit === unit ? horizon : LONGEST[unit];
  return {
    places: LENGTH_PLACES,
    toPlace: value => count(value) === undefined ? undefined : Math.sqrt(count(value) / longest) * LENGTH_PLACES,
    fromPlace: place => write(longest * (place / LENGTH_PLACES) ** 2),
  };
}

function logScale(low, high, places, write, read = value => value) {
  const width = Math.log10(high / low);
  return {
    places,
    toPlace: value => read(value) > 0 ? Math.log10(read(value) / low) / width * places : undefined,
    fromPlace: place => write(digits(low * 10 ** (place / places * width), 3)),
  };
}

// [count, "steps" | "tokens" | "%"], or null for auto and what is no length.
function lengthOf(written) {
  if (written === 0) return [0, "steps"];
  const match = LENGTH.exec(String(written));
  if (!match) return null;
  const unit = match[3] === "%" ? "%" : match[3].startsWith("step") ? "steps" : "tokens";
  return [Number(match[1].replaceAll("_", "")) * SUFFIXES[match[2].toUpperCase()], unit];
}

function writeLength(value, unit) {
  if (unit === "%") return `${Number(value.toFixed(value < 10 ? 1 : 0))}%`;
  const count = Math.ceil(digits(value, 3));
  if (unit === "steps") return `${count} steps`;
  const suffix = ["T", "B", "M", "K"].find(name => count >= SUFFIXES[name]) ?? "";
  return `${digits(count / SUFFIXES[suffix], 6)}${suffix} tokens`;
}

function digits(value, count) {
  return Number(value.toPrecision(count));
}
