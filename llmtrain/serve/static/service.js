// What does the service say? Requests as JSON; a refusal is thrown with its problems, field by field.

const TIMEOUT_MS = 15000;
const BUSY_MS = 1000;
const TOKEN = "llmtrain-token";

class Refused extends Error {
  constructor(status, problems) {
    super(problems.map(problem => problem.message).join("; "));
    this.status = status;
    this.problems = problems;
  }
}

async function ask(path, body) {
  for (;;) {
    const answer = await sent(path, body);
    if (answer.status === 401) await askForToken();
    else if (answer.status === 503) await pause(BUSY_MS);
    else if (answer.ok) return answer.json();
    else throw new Refused(answer.status, await problemsOf(answer));
  }
}

async function sent(path, body) {
  const headers = {};
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const options = {headers, method: body === undefined ? "GET" : "POST", signal: AbortSignal.timeout(TIMEOUT_MS)};
  if (body !== undefined) options.body = JSON.stringify(body);
  try {
    return await fetch(path, options);
  } catch (error) {
    throw new Refused(0, [{field: null, message: `The service does not answer (${error.message}).`}]);
  }
}

async function problemsOf(answer) {
  try {
    return (await answer.json()).errors;
  } catch {
    return [{field: null, message: `The service answered ${answer.status}.`}];
  }
}

let tokenAsked = null;

function askForToken() {
  tokenAsked ??= new Promise(done => {
    const input = element("token");
    element("token-error").textContent = sessionStorage.getItem(TOKEN) ? "That token was not accepted." : "";
    input.value = "";
    element("token-dialog").showModal();
    element("token-dialog").oncancel = event => event.preventDefault();
    element("token-form").onsubmit = event => {
      event.preventDefault();
      sessionStorage.setItem(TOKEN, input.value.trim());
      element("token-dialog").close();
      tokenAsked = null;
      done();
    };
  });
  return tokenAsked;
}

function pause(milliseconds) {
  return new Promise(done => setTimeout(done, milliseconds));
}

function element(id) {
  return document.getElementById(id);
}

// A new element with properties, attributes (where they hold a - or are `role`, `for`, `list`) and children.
function make(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || ["role", "for", "scope", "value"].includes(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}
