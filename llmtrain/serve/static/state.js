// What is being looked at? One object, which the fragment of the address holds whole; only the theme stays with the viewer.

const SHARED = ["peak", "warmup", "horizon", "floor"];
const FIRST = {peak: 0.0003, warmup: "500 steps", horizon: "20000 steps", floor: 0.1};
const CHOICES = {
  view: ["schedules", "runs"], x: ["linear", "log"], y: ["linear", "log"],
  loss: ["linear", "log"], across: ["step", "tokens"], runs_x: ["linear", "log"],
};
const TEXTS = {batch: "4M", weight_decay: "0.1", beta2: "0.95", at: ""};
const MOST_SCHEDULES = 8;

let identity = 0;
let state = fromFragment("");

function fromFragment(text) {
  const read = new URLSearchParams(text);
  const found = {
    linked: read.get("linked") !== "no", conventions: read.getAll("as"),
    runs: read.has("run") ? read.getAll("run").filter(name => name) : null,  // null: nobody has chosen yet
  };
  for (const [name, values] of Object.entries(CHOICES)) found[name] = values.includes(read.get(name)) ? read.get(name) : values[0];
  for (const [name, usual] of Object.entries(TEXTS)) found[name] = read.get(name) ?? usual;
  found.schedules = read.getAll("s").slice(0, MOST_SCHEDULES).map(written);
  if (!found.schedules.length)
    found.schedules = ["cosine", "linear", "wsd"].map(name => identified({name, ...FIRST}));
  found.schedules[0].open = true;
  return found;
}

// Throws where a link was cut or changed by hand.
function written(text) {
  const config = JSON.parse(text);
  if (typeof config !== "object" || config === null || typeof config.name !== "string")
    throw new SyntaxError("a schedule has no name");
  return identified(config);
}

function identified(config) {
  identity += 1;
  return {id: identity, config, open: false};
}

function toFragment() {
  const kept = new URLSearchParams();
  for (const [name, values] of Object.entries(CHOICES)) if (state[name] !== values[0]) kept.set(name, state[name]);
  for (const [name, usual] of Object.entries(TEXTS)) if (state[name] !== usual) kept.set(name, state[name]);
  if (!state.linked) kept.set("linked", "no");
  for (const name of state.conventions) kept.append("as", name);
  if (state.runs) for (const name of state.runs.length ? state.runs : [""]) kept.append("run", name);
  for (const one of state.schedules) kept.append("s", JSON.stringify(one.config));
  return `#${kept}`;
}

function readAddress() {
  try {
    state = fromFragment(location.hash.slice(1));
  } catch (error) {
    state = fromFragment("");
    notify(`This link cannot be read (${error.message}); these are the usual schedules.`);
  }
}

let remembering = null;

function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => history.replaceState(null, "", toFragment()), 150);
}

function notify(text) {
  const notice = element("notice");
  notice.textContent = text;
  clearTimeout(notify.timer);
  notify.timer = setTimeout(() => { notice.textContent = ""; }, 6000);
}

async function copy(text, title, done) {
  try {
    await navigator.clipboard.writeText(text);
    notify(done);
  } catch {  // the clipboard is closed to pages that come over plain HTTP from another machine
    element("text-title").textContent = title;
    element("text").value = text;
    element("text-dialog").showModal();
    element("text").select();
  }
}

const THEMES = ["auto", "light", "dark"];
const THEME = "llmtrain-theme";

function showTheme() {
  const theme = THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  element("theme").setAttribute("aria-label", `Theme: ${theme}`);
  element("theme").textContent = `\u25d0 ${theme}`;
}

function nextTheme() {
  const now = THEMES.indexOf(localStorage.getItem(THEME) ?? "auto");
  localStorage.setItem(THEME, THEMES[(now + 1) % THEMES.length]);
  showTheme();
}
