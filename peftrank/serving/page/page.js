// The page of `peftrank serve`: a slate in, its ranking before and after an adapter out.
//
// It knows the HTTP API and nothing else: no library, no storage but the token of this tab. Every
// text from outside (titles, messages, names) becomes a text node, never markup.

const $ = (id) => document.getElementById(id);
const TOKEN = "peftrank-token";
const SAMPLES = 10;
const WAIT_MS = 1000;

const state = {
  adapters: [], // as GET v1/adapters lists them
  samples: new Map(), // domain -> slates
  columns: [], // what was ranked, left to right: see `chosenColumns`
  slate: null, // the slate those columns rank, or the one to be ranked
  chosen: null, // item id of the candidate that is explained
};
let running = new AbortController(); // replaced when a ranking starts or its answer is unwanted

// --- the server ------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(type, message, status = 0) {
    super(message);
    this.type = type;
    this.status = status;
  }
}

/** Returns the JSON of an answer; throws ServerError with the server's own message. */
async function call(path, body, signal) {
  const headers = { Accept: "application/json" };
  if (token()) headers.Authorization = `Bearer ${token()}`;
  const options = { headers, signal };
  if (body !== undefined) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("unreachable", "The server does not answer. Is it still running?");
  }
  const value = await answer.json().catch(() => null);
  if (answer.ok) return value;
  let message = sentence(value?.error?.message ?? `the server answered ${answer.status}`);
  const later = answer.headers.get("Retry-After");
  if (answer.status === 429 && later && !/again/i.test(message))
    message += ` Try again in ${later} s.`;
  const type = value?.error?.type ?? (answer.status === 401 ? "auth" : "internal");
  throw new ServerError(type, message, answer.status);
}

let heldToken = null;
function token() {
  try {
    return heldToken ?? sessionStorage.getItem(TOKEN);
  } catch {
    return null; // a browser that refuses storage: the token then lives in memory
  }
}
function keepToken(value) {
  heldToken = value;
  try {
    if (value === null) sessionStorage.removeItem(TOKEN);
    else sessionStorage.setItem(TOKEN, value);
  } catch {
    // Held in memory already.
  }
}

// --- small parts of a document ----------------------------------------------------------------

/** Returns an element; children that are strings become text. */
function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Writes the line that screen readers announce; the same words again are not said again. */
function say(text) {
  if ($("summary").textContent !== text) $("summary").textContent = text;
}

function show(id, text) {
  $(id).textContent = text;
  $(id).hidden = !text;
}

/** Returns an empty bar whose length is `share` of its room. */
function filled(kind, share) {
  const made = el("i", { class: kind });
  made.style.setProperty("--share", share.toFixed(4));
  return made;
}

/** Returns a message as a sentence: servers write them without a capital and a full stop. */
const sentence = (text) =>
  text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const minus = (text) => text.replace("-", "−");
const shownScore = (value) => minus(value.toFixed(3));
const signed = (value) => (value >= 0 ? "+" : "") + minus(value.toFixed(3));
const ordinal = (n) => {
  const tens = n % 100;
  const ending = tens > 10 && tens < 14 ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th");
  return `${n}${ending}`;
};

// --- items ----------------------------------------------------------------------------------

const adapterOf = (domain) => state.adapters.find((adapter) => adapter.domain === domain);

/** Returns the item field a domain's prompt reads first. */
const fieldOf = (domain) => adapterOf(domain)?.fields?.[0] ?? "title";

/** Returns [the text the model reads, the other texts] of an item of a domain. */
function textsOf(item, domain) {
  // A pasted item may be anything: what is wrong with it, the server will say.
  const fields = Object(item?.fields);
  const longest = Object.keys(fields).sort((a, b) => fields[b].length - fields[a].length);
  const read = [fieldOf(domain), ...longest].find((name) => fields[name]);
  const others = Object.keys(fields).filter((name) => name !== read && fields[name]);
  return [String(fields[read] ?? idOf(item)), others.map((name) => fields[name]).join(" · ")];
}

/** Returns the item with the field that another domain's prompt reads, copied if it lacks it. */
function readableBy(item, domain, own) {
  const field = fieldOf(domain);
  if (domain === own || !item?.fields || item.fields[field]) return item;
  return { ...item, fields: { ...item.fields, [field]: textsOf(item, own)[0] } };
}

const idOf = (item) => item?.item_id ?? item;
/** Returns the slate's history; null where the server is to take the one it stores. */
function historyOf({ history }) {
  if (Array.isArray(history)) return history;
  return history === undefined || history === null ? null : [];
}
const labelsOf = (slate) => (Array.isArray(slate.labels) ? slate.labels : []);

function tagOf(label) {
  if (!(label > 0)) return null;
  return el("span", { class: "tag" }, label === 1 ? "✓ relevant" : `✓ relevant, ${label}`);
}

// --- the request -----------------------------------------------------------------------------

const picked = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const linesOf = (id) =>
  $(id)
    .value.split("\n")
    .map((line) => line.trim())
    .filter((line) => line !== "");

/** Returns the slate the form describes; throws an Error that says what is missing. */
function slateOfForm() {
  const domain = $("domain").value;
  const source = picked("source");
  if (source === "sample") {
    const found = state.samples.get(domain)?.[$("sample").selectedIndex];
    if (!found) throw new Error("There is no sample slate to rank; paste titles or JSON instead.");
    return found;
  }
  if (source === "titles") {
    const item = (letter) => (text, place) => ({
      item_id: `${letter}${place + 1}`,
      fields: { [fieldOf(domain)]: text },
    });
    const candidates = linesOf("candidates-text").map(item("c"));
    if (!candidates.length) throw new Error("Write at least one candidate, one title per line.");
    const history = linesOf("history-text").map(item("h"));
    return { slate_id: "pasted", history, candidates };
  }
  const text = $("json-text").value.trim();
  if (!text) throw new Error("Paste a slate as JSON.");
  let record;
  try {
    record = JSON.parse(text);
  } catch (error) {
    throw new Error(`This is not JSON: ${error.message}`);
  }
  if (!Array.isArray(record?.candidates) || !record.candidates.length) {
    throw new Error('The slate needs "candidates", a list of items.');
  }
  return record;
}

/** Returns what stands side by side, left to right. Each will get `order` and `scores`. */
function chosenColumns() {
  const domain = $("domain").value;
  const own = { domain, adapter: true };
  if (picked("against") === "base") return [{ domain, adapter: false }, own];
  return [own, { domain: $("other").value, adapter: true }];
}

/** Returns the body of POST v1/rank. Labels stay here: a ranker has no business seeing them. */
function bodyOf(slate, column, explain = false) {
  const { labels: _labels, domain: _domain, ...sent } = slate;
  const own = $("domain").value;
  const readable = (item) => readableBy(item, column.domain, own);
  sent.candidates = sent.candidates.map(readable);
  if (Array.isArray(sent.history)) sent.history = sent.history.map(readable);
  const body = { slate: sent, domain: column.domain };
  if (!column.adapter) body.adapter = "none";
  if (explain) body.explain = true;
  return body;
}

function nameOf(column) {
  return column.adapter ? `the ${column.domain} adapter` : "the untrained base";
}

// --- ranking ---------------------------------------------------------------------------------

async function rank() {
  const { slate } = state;
  if (!slate) return preview(); // says again what is missing
  const { signal } = anew();
  const columns = chosenColumns();
  busy("Ranking…");
  const started = performance.now();
  const answers = await Promise.allSettled(
    columns.map((column) => call("v1/rank", bodyOf(slate, column), signal)),
  );
  if (signal.aborted) return;
  busy(null);
  answers.forEach((answer, place) => {
    const column = columns[place];
    if (answer.status === "rejected") {
      column.error = answer.reason;
      return;
    }
    const [ranking] = answer.value.rankings;
    column.order = ranking.item_ids;
    column.scores = ranking.scores;
    column.version = ranking.version;
  });
  const refused = columns.find((column) => column.error?.type === "auth");
  if (refused) return askToken();
  const failed = columns.every((column) => column.error);
  Object.assign(state, { columns: failed ? [] : columns, chosen: null });
  if (failed) show("error", columns.at(-1).error.message);
  say(failed ? "Not ranked." : summary(performance.now() - started));
  drawRankings();
  drawHistory();
  $(failed ? "error" : "summary").scrollIntoView({ block: "nearest" }); // the form may be long
}

/** Gives up what is under way, and returns what can give up the next. */
function anew() {
  running.abort();
  running = new AbortController();
  return running;
}

function busy(text) {
  $("result").setAttribute("aria-busy", text !== null);
  if (text !== null) {
    show("error", "");
    say(text);
  }
}

/** Asks once per column for the effects of all candidates, then shows those of the chosen one. */
async function choose(id) {
  state.chosen = id;
  mark();
  const { signal } = running;
  const { slate } = state;
  const asked = historyOf(slate)?.length === 0 ? [] : explainable();
  drawHistory();
  await Promise.all(
    asked
      .filter((column) => !column.explanation || column.explanation.error)
      .map(async (column) => {
        column.explanation = { waiting: true };
        drawHistory();
        try {
          const answer = await call("v1/rank", bodyOf(slate, column, true), signal);
          column.explanation = explanationFor(column, answer.rankings[0]);
        } catch (error) {
          if (signal.aborted) return;
          if (error.type === "auth") askToken();
          column.explanation = { error: error.message };
        }
        if (!signal.aborted) drawHistory();
      }),
  );
}

/** Returns the explanation, unless it is of another version than the ranking it would explain. */
function explanationFor(column, ranking) {
  if (ranking.version !== column.version) {
    const changed = `version ${ranking.version} has replaced ${column.version} since.`;
    return { error: `${changed} Rank again.` };
  }
  return ranking.explanation ?? { error: "the server sent none." };
}

const explainable = () => state.columns.filter((column) => column.adapter && column.order);

/** Shows the form's slate as it is, unranked: whatever was ranked no longer answers the form. */
function preview() {
  anew();
  Object.assign(state, { columns: [], slate: null, chosen: null });
  $("result").setAttribute("aria-busy", "false");
  show("error", "");
  try {
    state.slate = slateOfForm();
    say("Not ranked yet.");
  } catch (error) {
    say(error.message);
  }
  drawRankings();
  drawHistory();
  drawCommand();
}

// --- drawing ---------------------------------------------------------------------------------

function drawRankings() {
  const { slate, columns } = state;
  $("rankings").replaceChildren();
  show("legend", "");
  if (!slate) return;
  const pair = el("div", { class: columns.length ? "pair" : null });
  if (!columns.length) {
    pair.append(unrankedTable(slate));
  } else {
    const slopes = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    slopes.setAttribute("class", "slopes");
    slopes.setAttribute("aria-hidden", "true");
    const drawn = columns.map((column, place) =>
      column.error ? refusal(column) : rankedTable(column, place),
    );
    pair.append(drawn[0], slopes, drawn[1]);
  }
  $("rankings").append(pair);
  const bars =
    "A bar runs from the list's lowest score to its highest; each ranking has its scale.";
  const ticks = "✓ marks what the person went on to choose; it is not sent to the server.";
  const notes = [columns.length && bars, labelsOf(slate).some((label) => label > 0) && ticks];
  show("legend", notes.filter(Boolean).join(" "));
  mark();
}

function unrankedTable(slate) {
  const rows = slate.candidates.map((item, place) => {
    const tag = tagOf(labelsOf(slate)[place]);
    return el(
      "tr",
      { class: tag ? "relevant" : null },
      el("td", { class: "number rank" }, String(place + 1)),
      el("th", { scope: "row" }, el("span", {}, ...titleParts(item, tag))),
    );
  });
  return el(
    "table",
    {},
    el("caption", {}, el("b", {}, "Candidates"), el("span", {}, " as they were given")),
    head(["#", "number"], ["Candidate"]),
    el("tbody", {}, ...rows),
  );
}

function rankedTable(column, place) {
  const { slate } = state;
  const items = new Map(
    slate.candidates.map((item, i) => [idOf(item), { item, label: labelsOf(slate)[i] }]),
  );
  const earlier = place === 1 ? state.columns[0].order : undefined;
  const low = Math.min(...column.scores);
  const range = Math.max(...column.scores) - low || 1;
  const rows = column.order.map((id, i) => {
    const { item, label } = items.get(id);
    const tag = tagOf(label);
    const bar = el(
      "div",
      { class: "bar", "aria-hidden": "true" },
      filled("", (column.scores[i] - low) / range),
    );
    return el(
      "tr",
      { class: tag ? "relevant" : null, "data-id": id },
      el("td", { class: "number rank" }, String(i + 1)),
      earlier ? move(earlier.indexOf(id), i) : null,
      el("th", { scope: "row", class: "candidate" }, choice(item, id, place, tag), bar),
      el("td", { class: "number" }, shownScore(column.scores[i])),
    );
  });
  return el(
    "table",
    {},
    captionOf(column, place),
    head(["Rank", "number"], earlier && ["Move", "number"], ["Candidate"], ["Score", "number"]),
    el("tbody", {}, ...rows),
  );
}

function head(...cells) {
  const made = cells
    .filter((cell) => cell)
    .map(([text, kind]) => el("th", { scope: "col", class: kind }, text));
  return el("thead", {}, el("tr", {}, ...made));
}

function captionOf(column, place) {
  const adapter = adapterOf(column.domain);
  const versus = state.columns.every((each) => each.adapter);
  const name = versus ? `Adapter ${column.domain}` : place ? "After" : "Before";
  const facts = column.adapter
    ? [
        versus ? null : `${column.domain} adapter`,
        adapter?.method,
        column.version && `version ${column.version}`,
      ]
    : ["untrained base"];
  const [own, other] = [fieldOf($("domain").value), fieldOf(column.domain)];
  if (own !== other) facts.push(`given the ${own} as ${other}`);
  return el(
    "caption",
    {},
    el("b", {}, name),
    el("span", {}, ` ${facts.filter(Boolean).join(", ")}`),
  );
}

/** Returns the radio button that chooses a candidate; a table's buttons are one tab stop. */
function choice(item, id, place, tag) {
  const input = el("input", { type: "radio", name: `candidate-${place}`, value: id });
  input.addEventListener("change", () => choose(id));
  return el("label", {}, input, el("span", {}, ...titleParts(item, tag, false)));
}

/** Returns the text the model reads, the others if wanted, and the tag if there is one. */
function titleParts(item, tag, more = true) {
  const [text, others] = textsOf(item, $("domain").value);
  const parts = [el("span", { class: "title" }, text)];
  if (others && more) parts.push(" ", el("span", { class: "more" }, others));
  if (tag) parts.push(" ", tag);
  return parts;
}

/** Returns a cell that says how far a candidate moved; places are 0-based. */
function move(from, to) {
  const by = from - to;
  if (by === 0) return said("td", "number same", "–", "same");
  return said(
    "td",
    `number ${by > 0 ? "up" : "down"}`,
    `${by > 0 ? "▲" : "▼"} ${Math.abs(by)}`,
    `${by > 0 ? "up" : "down"} ${Math.abs(by)}`,
  );
}

/** Returns an element that is seen as one text and read aloud as another. */
function said(tag, kind, seen, heard) {
  return el(
    tag,
    { class: kind },
    el("span", { "aria-hidden": "true" }, seen),
    el("span", { class: "vh" }, heard),
  );
}

function refusal(column) {
  const name = nameOf(column);
  return el(
    "div",
    { class: "notice" },
    el("p", {}, el("b", {}, `No ranking by ${name}`)),
    el("p", {}, column.error.message),
  );
}

/** Shows in every table which candidate is chosen, without drawing anything anew. */
function mark() {
  for (const row of document.querySelectorAll("#rankings tr[data-id]")) {
    const is = row.dataset.id === state.chosen;
    row.classList.toggle("chosen", is);
    row.querySelector("input").checked = is;
  }
  drawSlopes();
}

/** Draws a line from each candidate's row on the left to its row on the right. */
function drawSlopes() {
  const svg = document.querySelector(".slopes");
  if (!svg) return;
  svg.replaceChildren();
  const [left, right] = document.querySelectorAll("#rankings table");
  const room = svg.getBoundingClientRect();
  if (!left || !right || !room.width) return;
  const middle = (row) => {
    const box = row.getBoundingClientRect();
    return box.top + box.height / 2 - room.top;
  };
  const rows = new Map([...right.tBodies[0].rows].map((row) => [row.dataset.id, row]));
  for (const row of left.tBodies[0].rows) {
    const other = rows.get(row.dataset.id);
    if (!other) continue;
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const [from, to, half] = [middle(row), middle(other), room.width / 2];
    line.setAttribute("d", `M4 ${from} C${half} ${from} ${half} ${to} ${room.width - 4} ${to}`);
    line.setAttribute("class", row.className);
    if (row.className) svg.append(line);
    else svg.prepend(line);
  }
}

function drawHistory() {
  const { slate, chosen } = state;
  $("history").hidden = !slate;
  $("history-table").replaceChildren();
  $("explained").replaceChildren();
  if (!slate) return;
  const items = historyItems();
  const asked = chosen === null ? [] : explainable();
  if (asked.length && historyOf(slate)?.length !== 0) {
    $("explained").append(...explained(items, asked));
  }
  $("history-hint").textContent = historyHint(items);
  if (!items.length) return;
  const known = asked.filter((column) => column.explanation?.effects);
  const every = known.flatMap((column) => Object.values(column.explanation.effects).flat());
  const widest = Math.max(1e-9, ...every.map(Math.abs));
  const effects = known.map((column) => effectsOf(column.explanation, items));
  const rows = items.map(({ item, feedback }, place) => {
    const parts = titleParts(item, null);
    if (feedback !== undefined)
      parts.push(" ", el("span", { class: "more" }, `feedback ${feedback}`));
    return el(
      "tr",
      {},
      el("td", { class: "number rank" }, String(place + 1)),
      el("th", { scope: "row" }, ...parts),
      ...effects.map((each) => effectCell(each[place], widest)),
    );
  });
  const name = (column) => (known.length > 1 ? `Effect, ${column.domain}` : "Effect");
  $("history-table").append(
    el(
      "table",
      {},
      el("caption", { class: "vh" }, "History, oldest first"),
      head(["#", "number"], ["Item"], ...known.map((column) => [name(column), "effect"])),
      el("tbody", {}, ...rows),
    ),
  );
}

/** Returns the history as {item, feedback}; of a stored history only the explanation knows it. */
function historyItems() {
  const { slate, columns } = state;
  const given = historyOf(slate);
  if (given) return given.map((item, i) => ({ item, feedback: slate.history_feedback?.[i] }));
  const told = columns.find((column) => column.explanation?.history)?.explanation.history ?? [];
  return told.map((id) => ({ item: id }));
}

/** Returns each item's effect on the chosen candidate; null where the adapter did not read it. */
function effectsOf({ history, effects }, items) {
  let left = history.length; // the prompt leaves out what is too old or has no text
  const places = items.map(() => null);
  for (let place = items.length - 1; place >= 0 && left > 0; place -= 1) {
    if (idOf(items[place].item) === history[left - 1]) places[place] = left -= 1;
  }
  return places.map((place) => (place === null ? null : effects[state.chosen][place]));
}

function effectCell(effect, widest) {
  if (effect === null) return el("td", { class: "number same" }, "not read");
  const up = effect >= 0;
  const heard = `${up ? "raises" : "lowers"} by ${Math.abs(effect).toFixed(3)}`;
  const bar = filled(up ? "up" : "down", Math.abs(effect) / widest);
  return el(
    "td",
    { class: "effect" },
    el(
      "div",
      {},
      el("div", { class: "signed", "aria-hidden": "true" }, bar),
      said("span", "value", signed(effect), heard),
    ),
  );
}

function historyHint(items) {
  const { slate, columns, chosen } = state;
  const stored = historyOf(slate) === null;
  if (!items.length && !stored) return "This slate has no history.";
  const which = stored ? "Stored on the server" : plural(items.length, "item");
  let how = "";
  if (columns.length && chosen === null) how = " Choose a candidate to see which mattered for it.";
  else if (columns.length)
    how = " Effect: how much an item raises the candidate's score against the list's mean.";
  return `${which}, oldest first.${how}`;
}

/** Returns lines on what mattered most for the chosen candidate, or why there are none. */
function explained(items, columns) {
  const { slate, chosen } = state;
  const [title] = textsOf(
    slate.candidates.find((item) => idOf(item) === chosen),
    $("domain").value,
  );
  const lines = columns.map((column) => {
    const { explanation } = column;
    if (explanation?.error) return [`No explanation by ${nameOf(column)}: ${explanation.error}`];
    if (!explanation?.effects) return [`Asking ${nameOf(column)} what mattered…`];
    return mattered(column, items);
  });
  return [[el("b", {}, title)], ...lines].map((parts) =>
    el("span", { class: "line" }, ...parts, " "),
  );
}

function mattered(column, items) {
  const effects = effectsOf(column.explanation, items).map((effect) => effect ?? 0);
  const most = [Math.max(...effects), Math.min(...effects)];
  const parts = [];
  most.forEach((effect, down) => {
    if (down ? effect >= 0 : effect <= 0) return;
    const [text] = textsOf(items[effects.indexOf(effect)].item, $("domain").value);
    parts.push(
      parts.length ? ", " : "",
      `${down ? "lowered" : "raised"} most by `,
      el("b", {}, text),
      ` (${signed(effect)})`,
    );
  });
  return [
    `With ${nameOf(column)}, `,
    ...(parts.length ? parts : ["the history makes no difference"]),
    ".",
  ];
}

/** Returns the result in a sentence: where the relevant candidate stands, or what comes first. */
function summary(elapsed) {
  const { slate } = state;
  const took = elapsed < 1000 ? `${Math.round(elapsed)} ms` : `${(elapsed / 1000).toFixed(1)} s`;
  const ranked = state.columns.filter((column) => column.order);
  const relevant = slate.candidates.filter((_item, i) => labelsOf(slate)[i] > 0).map(idOf);
  const places = ranked.map((column) => {
    if (relevant.length) {
      const best = Math.min(...relevant.map((id) => column.order.indexOf(id)));
      return `${ordinal(best + 1)} with ${nameOf(column)}`;
    }
    const first = slate.candidates.find((item) => idOf(item) === column.order[0]);
    return `“${textsOf(first, $("domain").value)[0]}” with ${nameOf(column)}`;
  });
  const which =
    relevant.length > 1 ? "The best-placed relevant candidate" : "The relevant candidate";
  return `${relevant.length ? `${which} ranks` : "First:"} ${places.join(", ")}. (${took})`;
}

function drawCommand() {
  const { slate } = state;
  $("curl").hidden = !slate;
  $("copied").textContent = "";
  if (!slate) return;
  const body = JSON.stringify(bodyOf(slate, { domain: $("domain").value, adapter: true }));
  const lines = [
    `curl ${new URL("v1/rank", document.baseURI)}`,
    "-H 'Content-Type: application/json'",
  ];
  if (token()) lines.push('-H "Authorization: Bearer $PEFTRANK_TOKEN"');
  lines.push(`--data '${body.replaceAll("'", "'\\''")}'`);
  $("command").textContent = lines.join(" \\\n  ");
}

async function copyCommand() {
  try {
    await navigator.clipboard.writeText($("command").textContent);
    $("copied").textContent = "Copied.";
  } catch {
    // Browsers keep the clipboard from pages that are neither local nor https.
    getSelection().selectAllChildren($("command"));
    $("copied").textContent = "Selected: press Ctrl+C or ⌘C.";
  }
}

// --- the form --------------------------------------------------------------------------------

async function domainChanged() {
  const domain = $("domain").value;
  const adapter = adapterOf(domain);
  const size = adapter.nbytes === undefined ? null : `${(adapter.nbytes / 2 ** 20).toFixed(1)} MiB`;
  const facts = [
    adapter.method,
    adapter.version && `version ${adapter.version}`,
    size,
    adapter.tier && `on ${adapter.tier}`,
  ];
  $("domain-facts").textContent = facts.filter(Boolean).join(" · ");
  const others = state.adapters.map((each) => each.domain).filter((each) => each !== domain);
  const kept = $("other").value;
  $("other").replaceChildren(
    ...others.map((each) => el("option", { selected: each === kept }, each)),
  );
  const choice = document.querySelector('input[name="against"][value="adapter"]');
  choice.disabled = !others.length;
  if (!others.length) document.querySelector('input[name="against"][value="base"]').checked = true;
  let problem = "";
  if (!state.samples.has(domain)) {
    $("sample").replaceChildren(el("option", {}, "Loading…"));
    preview();
    say("Loading the sample…");
    problem = await loadSamples(domain);
    if ($("domain").value !== domain || !$("token-form").hidden) return;
  }
  show("sample-hint", problem);
  const slates = state.samples.get(domain) ?? [];
  $("sample").replaceChildren(...slates.map((slate) => el("option", {}, sizeOf(slate))));
  $("sample").disabled = !slates.length;
  $("titles-hint").textContent =
    `One per line. Each becomes an item with the field “${fieldOf(domain)}”.`;
  formChanged();
}

function sizeOf(slate) {
  const read = historyOf(slate)?.length ?? 0;
  return `${slate.slate_id}, ${read} read, ${plural(slate.candidates.length, "candidate")}`;
}

/** Fetches the domain's sample slates; returns what to say if there are none. */
async function loadSamples(domain) {
  try {
    const { slates } = await call(`v1/samples/${encodeURIComponent(domain)}?n=${SAMPLES}`);
    state.samples.set(domain, slates);
    return "";
  } catch (error) {
    if (error.type === "auth") askToken();
    return error.status === 404
      ? "This domain has no sample; paste titles or JSON."
      : error.message;
  }
}

function formChanged() {
  const source = picked("source");
  for (const part of document.querySelectorAll("[data-source]")) {
    part.hidden = part.dataset.source !== source;
  }
  $("fill").hidden = source === "sample" || !state.samples.get($("domain").value)?.length;
  $("other").hidden = picked("against") !== "adapter";
  preview();
}

/** Puts the chosen sample slate into the text fields, to be changed there. */
function fillFromSample() {
  const domain = $("domain").value;
  const slate = state.samples.get(domain)[$("sample").selectedIndex];
  const lines = (items) => items.map((item) => textsOf(item, domain)[0]).join("\n");
  $("history-text").value = lines(historyOf(slate) ?? []);
  $("candidates-text").value = lines(slate.candidates);
  $("json-text").value = JSON.stringify(slate, null, 2);
  preview();
}

// --- starting --------------------------------------------------------------------------------

/** Shows the form for the token; `message` stands for why, where the title does not say it. */
function askToken(message = token() ? "The server did not take the token it was given." : "") {
  show("token-message", message);
  keepToken(null);
  $("token-form").hidden = false;
  $("forget").hidden = true;
  $("work").hidden = true;
  $("token").value = "";
  $("token").focus();
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function ready() {
  for (;;) {
    try {
      await call("readyz");
      return show("notice", "");
    } catch (error) {
      show("notice", `${error.message} This page goes on by itself as soon as it is ready.`);
    }
    await pause(WAIT_MS);
  }
}

async function start() {
  await ready();
  let listed;
  try {
    listed = await call("v1/adapters");
  } catch (error) {
    if (error.type === "auth") return askToken();
    return show("notice", error.message);
  }
  const { base } = listed;
  $("base").textContent = [base?.name, base?.quantization].filter(Boolean).join(" · ");
  $("forget").hidden = !token();
  $("token-form").hidden = true;
  state.adapters = listed.adapters.filter((adapter) => adapter.version);
  if (!state.adapters.length) {
    const how = "Train one with “peftrank train --domain news” and start the server on its store.";
    return show("notice", `No adapter is loaded. ${how}`);
  }
  $("work").hidden = false;
  $("domain").replaceChildren(...state.adapters.map((adapter) => el("option", {}, adapter.domain)));
  await domainChanged();
}

new ResizeObserver(drawSlopes).observe($("rankings"));
$("domain").addEventListener("change", domainChanged);
$("request").addEventListener("change", (event) => {
  // A text field says `change` only when it is left; it has been heard by then.
  if (event.target.matches("select, input") && event.target !== $("domain")) formChanged();
});
$("request").addEventListener("input", (event) => {
  if (event.target.tagName === "TEXTAREA") preview();
});
$("request").addEventListener("submit", (event) => {
  event.preventDefault();
  rank();
});
$("request").addEventListener("keydown", (event) => {
  // Enter makes a line in a text field, so ranking has a chord there.
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) rank();
});
$("fill").addEventListener("click", fillFromSample);
$("copy").addEventListener("click", copyCommand);
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken($("token").value.trim());
  start();
});
$("forget").addEventListener("click", () => {
  askToken("The token is forgotten.");
});
start();
