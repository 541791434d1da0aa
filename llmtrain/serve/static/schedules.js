// What do the schedules amount to, beside one another? Curves and numbers of POST /compare and POST /lr_schedule.
// One request is under way at a time, for what is set when it starts; what changes meanwhile is asked next.

const SETTLE_MS = 30;
const POINTS = 600;
const EARLY_POINTS = 160;
const NUMBERS = [
  ["area", "Area"], ["mean_multiplier", "Mean multiplier"], ["first", "First rate"], ["last", "Last rate"], ["at", "Rate at"],
  ["peak_update", "Peak at"], ["decay_share", "In the decay"], ["effective_updates", "Averages over"],
  ["averaging_window", "Reaching back"], ["bound_ratio", "Convex bound"], ["peak_ratio", "Peak ratio"],
];

const FORMS = {
  mean_multiplier: value => value.toFixed(4), mean: value => value.toFixed(4), decay_share: value => `${(100 * value).toFixed(1)} %`,
  peak_update: whole, effective_updates: whole, averaging_window: whole,
  bound_ratio: value => value.toFixed(4), peak_ratio: value => value.toFixed(4), perplexity: value => value.toFixed(2),
};

let compared = new Map();  // id of a schedule -> its answer
let picked = new Map();  // id -> its rate at update state.at
let wanted = false, asking = false;

function changed() {
  remember();
  wanted = true;
  element("schedules").setAttribute("aria-busy", "true");
  setTimeout(askWhileWanted, SETTLE_MS);
}

async function askWhileWanted() {
  if (asking) return;
  asking = true;
  try {
    while (wanted) {
      wanted = false;
      await askOnce();
    }
  } finally {
    asking = false;
    element("schedules").removeAttribute("aria-busy");
  }
}

async function askOnce() {
  const asked = state.schedules.map(one => ({id: one.id, config: structuredClone(one.config)}));
  const {answers, problems} = await compareAll(asked);
  if (state.x === "log") await Promise.all(asked.filter(one => answers.has(one.id)).map(one => addEarly(answers.get(one.id), one.config)));
  const rates = await ratesAt(asked.filter(one => answers.has(one.id)), problems);
  const ids = state.schedules.map(one => one.id);
  if (ids.join() !== asked.map(one => one.id).join()) return;  // another set by now: it is asked next
  picked = rates;
  showProblems(problems);
  for (const [id, answer] of answers) compared.set(id, answer);
  compared = new Map(ids.filter(id => compared.has(id)).map(id => [id, compared.get(id)]));
  showSchedules(new Set(asked.filter(one => !answers.has(one.id)).map(one => one.id)));
}

// The answer for every schedule that can be planned, and what is wrong with the others.
async function compareAll(asked) {
  const answers = new Map(), problems = [];
  let left = asked;
  while (left.length) {
    try {
      const answer = await ask("compare", {...setting(), configs: left.map(one => one.config), conventions: state.conventions,
        weight_decay: readNumber(state.weight_decay), points: POINTS});
      answer.schedules.forEach((one, index) => answers.set(left[index].id, one));
      return {answers, problems};
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      const named = error.problems.map(problem => placed(problem, left));
      problems.push(...named);
      const bad = new Set(named.map(problem => problem.id));
      if (bad.has(null)) return {answers, problems};
      left = left.filter(one => !bad.has(one.id));
    }
  }
  return {answers, problems};
}

function setting() {
  const found = {beta2: readNumber(state.beta2)};
  if (state.batch.trim()) found.tokens_per_update = state.batch;
  return found;
}

// configs[1].decay -> the second schedule's decay; other fields are the whole comparison's.
function placed(problem, asked) {
  const match = /^configs(?:\[|\.)(\d+)\]?\.?(\w+)?/.exec(problem.field ?? "");
  if (!match) return {id: null, key: firstKey(problem), message: problem.message};
  return {id: asked[Number(match[1])].id, key: match[2] ?? null, message: problem.message};
}

// Even steps say little about the beginning on a logarithmic axis: the curves get more points there.
async function addEarly(answer, config) {
  const known = new Set(answer.updates);
  const even = Array.from({length: EARLY_POINTS}, (_, index) => Math.round(answer.total_updates ** (index / EARLY_POINTS)));
  const steps = [...new Set(even)].filter(update => !known.has(update));
  if (!steps.length) return;
  const drawn = Object.entries(answer.conventions).filter(([, other]) => other.learning_rate);
  const [own, ...others] = await Promise.all([config, ...drawn.map(([convention]) => ({...config, convention}))]
    .map(one => ask("lr_schedule", {...setting(), config: one, steps})));
  const order = [...answer.updates, ...steps].map((update, index) => [update, index]).sort((a, b) => a[0] - b[0]);
  const merged = (rates, early) => { const all = [...rates, ...early]; return order.map(([, index]) => all[index]); };
  answer.updates = order.map(([update]) => update);
  answer.learning_rate = merged(answer.learning_rate, own.learning_rate);
  drawn.forEach(([, other], index) => { other.learning_rate = merged(other.learning_rate, others[index].learning_rate); });
}

function firstKey(problem) {
  return problem.field?.split(".")[0] ?? null;
}

async function ratesAt(asked, problems) {
  const step = state.at.trim();
  if (!step) return new Map();
  try {
    const answers = await Promise.all(asked.map(one => ask("lr_schedule", {...setting(), config: one.config, step: readNumber(step)})));
    return new Map(asked.map((one, index) => [one.id, answers[index].learning_rate]));
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    problems.push(...error.problems.map(problem => ({id: null, key: firstKey(problem), message: problem.message})));
    return new Map();
  }
}

function showProblems(problems) {
  const inputs = {step: "at", tokens_per_update: "batch", weight_decay: "weight_decay", beta2: "beta2"};
  complain(problems.filter(problem => problem.id !== null));
  const whole = problems.filter(problem => problem.id === null);
  for (const [key, id] of Object.entries(inputs)) markInvalid(element(id), whole.some(problem => problem.key === key));
  element("setting-error").textContent = messages(whole.filter(problem => problem.key in inputs));
  element("refused").textContent = messages(whole.filter(problem => !(problem.key in inputs)));
}

function showSchedules(old) {
  const rows = state.schedules.map((one, index) => ({...one, index, answer: compared.get(one.id), old: old.has(one.id)}))
    .filter(row => row.answer);
  drawChart(element("rates"), rows.flatMap(curvesOf), {
    x: state.x, y: state.y, x0: true, y0: true, xLabel: "update", unit: "update", onPick: update => setText("at", String(update)),
  });
  element("rates").setAttribute("aria-label", "Learning rate at each update. Arrow keys read the curves, Enter keeps an update in the table.");
  showKey(element("key"), rows.map(row => ({label: labelOf(row.index), color: row.index})), state.conventions.filter(name => rows.some(row => row.answer.conventions[name]?.learning_rate)));
  for (const row of rows) showGist(row);
  showTable(rows);
  const warnings = rows.flatMap(row => row.answer.summary.warnings.map(text => `${labelOf(row.index)}: ${text}`));
  element("warnings").replaceChildren(...warnings.map(text => make("li", {textContent: text})));
}

function curvesOf(row) {
  const {answer, index} = row;
  const own = {label: labelOf(index), color: index, x: answer.updates, y: answer.learning_rate, faint: row.old};
  const others = state.conventions.map((name, dash) => ({name, dash, rates: answer.conventions[name]?.learning_rate}))
    .filter(other => other.rates)
    .map(other => ({label: `${labelOf(index)} in ${other.name}`, color: index, dash: other.dash, x: answer.updates, y: other.rates, faint: row.old}));
  return [own, ...others];
}

function showKey(host, curves, dashed) {
  const items = curves.map(curve => {
    const swatch = make("i", {className: "swatch"});
    swatch.style.background = `var(--c${curve.color})`;
    return make("li", {}, swatch, curve.label);
  });
  host.replaceChildren(...items, ...dashed.map(name => {
    const line = svg("svg", {width: 26, height: 8, "aria-hidden": "true"});
    line.append(svg("line", {x1: 0, x2: 26, y1: 4, y2: 4, stroke: "currentColor", "stroke-width": 2,
      "stroke-dasharray": DASHES[state.conventions.indexOf(name) % DASHES.length]}));
    return make("li", {}, line, name);
  }));
}

function showGist(row) {
  const {summary} = row.answer;
  const gist = shownCards.get(row.id).gist;
  gist.classList.toggle("old", row.old);
  gist.replaceChildren(...[["area", summary.area], ["mean", summary.mean_multiplier], ["last", summary.last_lrs.at(-1)]]
    .map(([name, value]) => make("span", {}, `${name} `, exact(value, name))));
}

// A number for the eye that carries all its digits.
function exact(value, name) {
  const text = value == null ? "-" : (FORMS[name] ?? sixDigits)(value);
  const shown = make("data", {value: String(value), textContent: text, title: value == null ? "there is none" : String(value)});
  shown.dataset.number = name;
  return shown;
}

function showTable(rows) {
  const titles = columns().map(([name, title]) => name === "at" ? `Rate at ${state.at}` : title);
  const head = make("tr", {}, make("th", {scope: "col", textContent: "Schedule"}), ...titles.map(title => make("th", {scope: "col", textContent: title})));
  const body = rows.flatMap(row => [ownRow(row), ...state.conventions.map(name => otherRow(row, name)).filter(Boolean)]);
  element("numbers").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

function columns() {
  return NUMBERS.filter(([name]) => name !== "at" || state.at.trim());
}

function ownRow(row) {
  const swatch = make("i", {className: "swatch"});
  swatch.style.background = `var(--c${row.index})`;
  const cells = columns().map(([name]) => make("td", {}, exact(name === "at" ? picked.get(row.id) : numberOf(row.answer.summary, name), name)));
  return make("tr", {className: row.old ? "old" : ""}, make("th", {scope: "row"}, swatch, labelOf(row.index)), ...cells);
}

function otherRow(row, name) {
  const other = row.answer.conventions[name];
  if (!other) return null;
  const head = make("th", {scope: "row", textContent: `in ${name}`});
  if (other.error) return make("tr", {className: "other"}, head, make("td", {colSpan: columns().length, className: "words", textContent: other.error}));
  const cells = columns().map(([key]) => {
    if (key === "at") return make("td");
    const value = numberOf(other.summary, key), own = numberOf(row.answer.summary, key);
    const cell = make("td", {}, exact(value, key));
    if (value === own) cell.className = "same";
    else if (key === "area") cell.append(make("small", {textContent: ` ${Number((100 * (value / own - 1)).toPrecision(2))} %`}));
    return cell;
  });
  return make("tr", {className: "other"}, head, ...cells);
}

function numberOf(summary, name) {
  if (name === "first") return summary.first_lrs[0];
  if (name === "last") return summary.last_lrs.at(-1);
  return summary[name];
}

function setText(name, value) {
  state[name] = value;
  if (element(name).value !== value) element(name).value = value;
  changed();
}

function buildConventions(names) {
  element("conventions").replaceChildren(...names.map(name => {
    const box = make("input", {type: "checkbox", name: "convention"});
    box.setAttribute("value", name);
    box.addEventListener("change", () => {
      state.conventions = names.filter(other => other === name ? box.checked : state.conventions.includes(other));
      changed();
    });
    return make("label", {className: "check"}, box, name);
  }));
}
