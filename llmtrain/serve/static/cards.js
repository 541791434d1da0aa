// What is set for each schedule? One card a schedule: its shape, its parameters, and what it amounts to.

const GENERIC = ["warmup_shape", "warmup_start", "convention", "accumulation"];
const LETTERS = "ABCDEFGH";

let registry = new Map();  // name -> what GET /schedules says of it
let shownCards = new Map();  // id of a schedule -> {node, fields, error, gist}

function labelOf(index) {
  return `${LETTERS[index]} ${state.schedules[index].config.name}`;
}

function buildCards() {
  shownCards = new Map(state.schedules.map((one, index) => [one.id, buildCard(one, index)]));
  element("cards").replaceChildren(...[...shownCards.values()].map(card => card.node));
  element("add").disabled = state.schedules.length >= MOST_SCHEDULES;
  showFields();
}

function buildCard(one, index) {
  const label = labelOf(index);
  const entry = registry.get(one.config.name);
  const swatch = make("i", {className: "swatch"});
  swatch.style.background = `var(--c${index})`;
  const shape = make("select", {"aria-label": `Shape of ${LETTERS[index]}`}, ...shapeOptions(one.config.name));
  shape.value = one.config.name;
  shape.addEventListener("change", () => reshape(one, shape.value));
  const gist = make("p", {className: "gist"});
  const error = make("p", {className: "error", role: "alert"});
  const fields = new Map();
  const body = make("details", {open: one.open}, make("summary", {textContent: `Parameters of ${label}`}));
  body.addEventListener("toggle", () => { one.open = body.open; });
  if (entry) fillBody(body, fields, one, entry, label);
  const [about, ...further] = entry ? entry.doc.replaceAll("`", "").split("\n") : ["This service has no such schedule."];
  const rest = further.join(" ").trim();
  if (rest) body.querySelector("summary").after(make("p", {className: "about", textContent: rest}));
  const node = make("article", {className: "panel card", "aria-label": label},
    make("div", {className: "card-head"}, swatch, make("b", {textContent: LETTERS[index]}), shape,
      button("YAML", `Copy ${label} as YAML`, () => copy(yamlOf(one.config), `${label} as YAML`, `${label} is copied: the schedule section of a run.`)),
      button("Duplicate", `Duplicate ${label}`, () => addSchedule({...one.config}, one)),
      button("Remove", `Remove ${label}`, () => removeSchedule(one))),
    gist, make("p", {className: "about", textContent: about}), error, body);
  node.dataset.schedule = index;
  return {node, fields, error, gist};
}

function fillBody(body, fields, one, entry, label) {
  const properties = entry.schema.properties;
  const own = Object.keys(entry.parameters);
  const more = make("details", {className: "more"}, make("summary", {textContent: `Warm-up shape and convention of ${label}`}));
  for (const key of [...SHARED, ...own, ...GENERIC]) {
    const made = field(key, properties[key], label, value => setValue(one, key, value));
    fields.set(key, made);
    (GENERIC.includes(key) ? more : body).append(made.node);
  }
  more.open = GENERIC.some(key => key in one.config);
  body.append(more);
}

function shapeOptions(present) {
  const names = [...registry.keys()];
  if (!registry.has(present)) names.unshift(present);
  return names.map(name => make("option", {textContent: name}));
}

function button(text, label, pressed) {
  const made = make("button", {type: "button", textContent: text, "aria-label": label});
  made.addEventListener("click", pressed);
  return made;
}

function setValue(one, key, value) {
  const held = state.linked && SHARED.includes(key) ? state.schedules.filter(other => other === one || takes(other, key)) : [one];
  for (const other of held) {
    if (value === "" && registry.get(other.config.name)?.parameters[key]?.required === false) delete other.config[key];
    else other.config[key] = value;
  }
  showFields();
  changed();
}

// Some shapes draw their own warm-up; their example says so.
function takes(one, key) {
  return key !== "warmup" || registry.get(one.config.name)?.example.warmup !== "0 steps";
}

function reshape(one, name) {
  one.config = configFor(name, one.config);
  one.open = true;
  buildCards();
  shownCards.get(one.id).node.querySelector("select").focus();
  changed();
}

// A config of that shape with the common values of another.
function configFor(name, other) {
  const entry = registry.get(name);
  const config = {name};
  for (const key of [...SHARED, ...GENERIC]) if (key in other) config[key] = other[key];
  for (const [key, parameter] of Object.entries(entry.parameters)) if (parameter.required) config[key] = entry.example[key];
  if (entry.example.warmup === "0 steps") config.warmup = "0 steps";
  else if (!takes({config: other}, "warmup")) config.warmup = state.schedules.find(one => takes(one, "warmup"))?.config.warmup ?? FIRST.warmup;
  return config;
}

function addSchedule(config, after) {
  const added = identified(config);
  added.open = true;
  const place = after ? state.schedules.indexOf(after) + 1 : state.schedules.length;
  if (state.schedules.length >= MOST_SCHEDULES) return notify(`At most ${MOST_SCHEDULES} schedules are compared at once.`);
  state.schedules.splice(place, 0, added);
  buildCards();
  shownCards.get(added.id).node.querySelector("select").focus();
  changed();
}

function addUsual() {
  const present = new Set(state.schedules.map(one => one.config.name));
  const name = [...registry.keys()].find(other => !present.has(other) && !registry.get(other).schema.required.some(key => registry.get(other).parameters[key])) ?? "cosine";
  addSchedule(configFor(name, state.schedules[0]?.config ?? FIRST));
}

function removeSchedule(one) {
  if (state.schedules.length === 1) return notify("One schedule stays; change its shape instead.");
  state.schedules.splice(state.schedules.indexOf(one), 1);
  buildCards();
  element("add").focus();
  changed();
}

function showFields() {
  for (const one of state.schedules)
    for (const [key, shown] of shownCards.get(one.id)?.fields ?? []) shown.show(one.config[key], one.config);
}

// problems: {id, key or null, message} each; what is not named is in order.
function complain(problems) {
  for (const [id, card] of shownCards) {
    const own = problems.filter(problem => problem.id === id);
    for (const [key, shown] of card.fields) shown.complain(messages(own.filter(problem => problem.key === key)));
    card.error.textContent = messages(own.filter(problem => !card.fields.has(problem.key)));
    if (own.some(problem => card.fields.has(problem.key))) card.node.querySelector("details").open = true;
  }
}

function messages(problems) {
  return problems.map(problem => problem.message).join(" ");
}

function yamlOf(config) {
  const lines = Object.entries(config).map(([key, value]) => `  ${key}: ${yamlValue(value)}`);
  const tokens = JSON.stringify(config).includes("token");
  return `${tokens ? `# with updates of ${state.batch} tokens: batch.global_tokens\n` : ""}schedule:\n${lines.join("\n")}\n`;
}

// JSON is YAML; names and lengths read better without quotes.
function yamlValue(value) {
  const plain = /^([A-Za-z][\w-]*|[0-9.]+[KMBT]? ?(steps?|tokens?|%))$/;
  return typeof value === "string" && plain.test(value) ? value : JSON.stringify(value);
}
