// How do runs go? Loss and rate of the chosen ones, row by row, also while they train: only new rows are asked for.

const POLL_MS = 1500;
const LIST_EVERY = 4;  // polls
const FIRST_RUNS = 4;
const ROWS = 10000;

let runNames = [];
let followed = new Map();  // name -> what has been read of it
let polling = null, polls = 0;

async function findRuns() {
  try {
    const {runs} = await ask("runs");
    if (state.runs === null && runs.length)
      state.runs = [...runs].sort((a, b) => b.modified - a.modified).slice(0, FIRST_RUNS).map(run => run.name).sort();
    const names = runs.map(run => run.name);
    if (names.join("\n") !== runNames.join("\n")) { runNames = names; buildPicker(); }
    return true;
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (error.status !== 404) element("runs-error").textContent = error.message;
    return error.status !== 404;
  }
}

function buildPicker() {
  const boxes = runNames.map((name, index) => {
    const box = make("input", {type: "checkbox", name: "run", checked: state.runs?.includes(name) ?? false});
    box.setAttribute("value", name);
    box.addEventListener("change", () => {
      state.runs = runNames.filter(other => other === name ? box.checked : state.runs?.includes(other));
      remember();
      poll();
    });
    const swatch = make("i", {className: "swatch"});
    swatch.style.background = `var(--c${index % MOST_SCHEDULES})`;
    return make("label", {className: "check"}, box, swatch, name);
  });
  element("run-names").replaceChildren(...(boxes.length ? boxes : ["There is no run in this directory yet."]));
}

function follow() {
  clearTimeout(polling);
  polling = setTimeout(async () => {
    if (state.view === "runs" && !document.hidden) await poll();
    follow();
  }, POLL_MS);
}

async function poll() {
  if (polls++ % LIST_EVERY === 0) await findRuns();
  const names = runNames.filter(name => state.runs?.includes(name));
  try {
    const grown = await Promise.all(names.map(readNew));
    element("runs-error").textContent = "";
    if (grown.some(Boolean) || names.join("\n") !== poll.shown) showRuns();
    poll.shown = names.join("\n");
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    element("runs-error").textContent = error.message;
  }
}

function unread() {
  return {next: 0, file: null, steps: {step: [], tokens: [], loss: [], lr: []}, validations: {step: [], tokens: [], loss: []}, last: {}, at: null};
}

// Whether there was something new.
async function readNew(name) {
  const run = followed.get(name) ?? unread();
  if (run.busy) return false;
  followed.set(name, run);
  run.busy = true;
  try {
    let grown = false;
    for (;;) {
      const answer = await ask(`runs/${name}/metrics?after=${run.next}&limit=${ROWS}${run.file ? `&file=${run.file}` : ""}`);
      if (answer.restarted) Object.assign(run, unread(), {busy: true});
      const advanced = answer.next > run.next;
      Object.assign(run, {next: answer.next, file: answer.file});
      answer.rows.forEach(row => take(run, row));
      grown ||= answer.rows.length > 0 || answer.restarted;
      if (!advanced || answer.next >= answer.size) break;
      showRuns();
    }
    if (grown) run.at = new Date();
    return grown;
  } finally {
    run.busy = false;
  }
}

function take(run, row) {
  const columns = {step: run.steps, validation: run.validations}[row.kind];
  if (!columns) return;
  run.last[row.kind] = row;
  for (const [name, values] of Object.entries(columns)) values.push(row[name] ?? null);
}

function showRuns() {
  const shown = runNames.map((name, index) => ({name, color: index % MOST_SCHEDULES, run: followed.get(name)}))
    .filter(one => state.runs?.includes(one.name) && one.run);
  const across = state.across;
  const axis = {x: state.runs_x, x0: true, xLabel: across === "step" ? "update" : "tokens", unit: across === "step" ? "update" : "tokens"};
  const losses = shown.flatMap(({name, color, run}) => [
    {label: name, color, x: run.steps[across], y: run.steps.loss, faint: true},
    {label: `${name} validation`, color, x: run.validations[across], y: run.validations.loss, dots: true},
  ]);
  const rates = shown.map(({name, color, run}) => ({label: name, color, x: run.steps[across], y: run.steps.lr}));
  drawChart(element("losses"), losses, {...axis, y: state.loss});
  drawChart(element("run-rates"), rates, {...axis, y: "linear", y0: true});
  element("losses").setAttribute("aria-label", `Loss across ${axis.xLabel}s; points are validations. Arrow keys read the curves.`);
  element("run-rates").setAttribute("aria-label", `Learning rate across ${axis.xLabel}s. Arrow keys read the curves.`);
  showKey(element("run-key"), shown.map(({name, color}) => ({label: name, color})), []);
  showNewest(shown);
}

function showNewest(shown) {
  const titles = ["Run", "Update", "Tokens", "Loss", "Rate", "Validation loss", "Perplexity", "Tokens/s", "New rows at", "Schedule"];
  const head = make("tr", {}, ...titles.map(title => make("th", {scope: "col", textContent: title})));
  const rows = shown.map(({name, color, run}) => {
    const swatch = make("i", {className: "swatch"});
    swatch.style.background = `var(--c${color})`;
    const {step = {}, validation = {}} = run.last;
    const cells = [whole(step.step ?? validation.step ?? 0), compact(step.tokens ?? validation.tokens ?? 0), exact(step.loss, "loss"), exact(step.lr, "lr"),
      exact(validation.loss, "validation"), exact(validation.perplexity, "perplexity"), step.tokens_per_s ? whole(step.tokens_per_s) : "-",
      run.at?.toLocaleTimeString("en-GB") ?? "-", button("Open", `Open the schedule of ${name}`, () => openSchedule(name))];
    return make("tr", {}, make("th", {scope: "row"}, swatch, name), ...cells.map(cell => make("td", {}, cell)));
  });
  element("run-numbers").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
}

async function openSchedule(name) {
  try {
    const {config} = await ask(`runs/${name}`);
    if (!registry.has(config?.schedule?.name)) return notify(`${name} has no schedule that this service knows.`);
    if (config.batch?.global_tokens) setText("batch", String(config.batch.global_tokens));
    state.linked = element("linked").checked = false;
    showView("schedules");
    addSchedule(config.schedule);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    notify(error.message);
  }
}
