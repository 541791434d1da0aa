// The page begins: what the address says is shown, and what is set goes back into it.

function showView(view) {
  state.view = view;
  for (const made of document.querySelectorAll("#views button")) {
    if (made.dataset.view === view) made.setAttribute("aria-current", "page");
    else made.removeAttribute("aria-current");
  }
  element("schedules").hidden = view !== "schedules";
  element("runs").hidden = view !== "runs";
  remember();
  if (view === "runs") poll();
}

function showState() {
  for (const name of Object.keys(TEXTS)) element(name).value = state[name];
  for (const name of Object.keys(CHOICES))
    for (const made of document.querySelectorAll(`input[name=${name}]`)) made.checked = made.value === state[name];
  state.conventions = state.conventions.filter(name => document.querySelector(`input[name=convention][value="${CSS.escape(name)}"]`));
  for (const made of document.querySelectorAll("input[name=convention]")) made.checked = state.conventions.includes(made.value);
  element("linked").checked = state.linked;
  buildCards();
  buildPicker();
  showView(state.view);
  changed();
}

function listen() {
  for (const name of Object.keys(TEXTS)) element(name).addEventListener("input", event => setText(name, event.target.value));
  for (const name of Object.keys(CHOICES))
    for (const made of document.querySelectorAll(`input[name=${name}]`))
      made.addEventListener("change", () => {
        state[name] = made.value;
        remember();
        if (state.view === "runs") showRuns(); else changed();
      });
  for (const made of document.querySelectorAll("#views button")) made.addEventListener("click", () => showView(made.dataset.view));
  element("linked").addEventListener("change", event => { state.linked = event.target.checked; remember(); });
  element("add").addEventListener("click", addUsual);
  element("theme").addEventListener("click", nextTheme);
  element("text-close").addEventListener("click", () => element("text-dialog").close());
  element("share").addEventListener("click", () => copy(location.href.split("#")[0] + toFragment(), "A link to what you see", "The link is copied: it holds everything you see."));
  addEventListener("hashchange", () => { readAddress(); showState(); });
}

async function start() {
  showTheme();
  readAddress();
  const {schedules, common} = await ask("schedules");
  registry = new Map(schedules.map(entry => [entry.name, entry]));
  buildConventions(common.convention.enum.filter(name => name !== common.convention.default));
  listen();
  const hasRuns = await findRuns();
  document.querySelector("#views [data-view=runs]").hidden = !hasRuns;
  if (!hasRuns) state.view = "schedules";
  showState();
  if (hasRuns) follow();
}

start().catch(error => { element("refused").textContent = error.message; });
