"use strict";

const MODES = { vector: "vectors", bm25: "BM25", fused: "fused", reranked: "reranked" };
const WAIT_MS = 120; // after a key, before a search
const BATCH = 200; // documents of one request
const STOP = new Set("a an and are as at be but by for if in into is it no not of on or such that the their then there these they this to was will with how what who when where why does do did can".split(" "));
const element = (id) => document.getElementById(id);
const panes = [];
let tasks = [];

// Requests.

async function ask(path, options = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { ...(options.headers || {}), ...(key ? { authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  const content = await answer.json().catch(() => ({}));
  if (answer.status === 401) { await login(); return ask(path, options); }
  if (!answer.ok) throw new Error(content.error ? content.error.message : `HTTP ${answer.status}`);
  return content;
}

const post = (path, content, options = {}) =>
  ask(path, { method: "POST", body: JSON.stringify(content), headers: { "content-type": "application/json" }, ...options });

function login() {
  const dialog = element("login");
  if (!dialog.open) dialog.showModal();
  return new Promise((done) => dialog.addEventListener("close", () => {
    sessionStorage.setItem("key", element("key").value.trim());
    done();
  }, { once: true }));
}

function say(text, bad = false) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", bad);
}

// Words of the query in a text.

const wordsOf = (query) => (query.toLowerCase().match(/[\p{L}\p{N}]+/gu) || []).filter((word) => !STOP.has(word));
const stem = (word) => (word.length > 4 ? word.replace(/(ing|ed|es|s)$/u, "") : word);

function marked(text, stems) {
  const parts = document.createDocumentFragment();
  let end = 0;
  for (const match of text.matchAll(/[\p{L}\p{N}]+/gu)) {
    if (!stems.has(stem(match[0].toLowerCase()))) continue;
    parts.append(text.slice(end, match.index));
    const mark = document.createElement("mark");
    mark.textContent = match[0];
    parts.append(mark);
    end = match.index + match[0].length;
  }
  parts.append(text.slice(end));
  return parts;
}

// A pane: a task, a way of ranking, and their hits.

class Pane {
  constructor(task, mode) {
    this.root = element("pane").content.cloneNode(true).firstElementChild;
    for (const name of ["task", "mode", "filter", "about", "hits"]) this[name] = this.root.querySelector(`.${name}`);
    this.rows = [];
    this.wanted = mode;
    this.fill(task);
    this.task.addEventListener("change", () => { this.fill(this.task.value); this.search(); remember(); });
    this.mode.addEventListener("change", () => { this.wanted = this.mode.value; this.search(); remember(); });
    this.filter.addEventListener("input", () => later(this, () => this.search()));
    element("panes").append(this.root);
  }

  fill(task) {
    this.task.replaceChildren(...tasks.map((one) => new Option(one.name, one.name)));
    if (tasks.some((one) => one.name === task)) this.task.value = task;
    const chosen = tasks.find((one) => one.name === this.task.value);
    const modes = chosen ? chosen.modes : [];
    this.mode.replaceChildren(...modes.map((mode) => new Option(MODES[mode], mode)));
    this.mode.value = modes.includes(this.wanted) ? this.wanted : modes[0] || "";
    if (chosen && !query()) this.about.textContent = told(chosen.documents);
  }

  filters() {
    const [name, ...rest] = this.filter.value.split("=");
    if (!rest.length || !name.trim()) return undefined;
    const text = rest.join("=").trim();
    try {
      const value = JSON.parse(text);
      return { [name.trim()]: typeof value === "object" ? text : value };
    } catch { return { [name.trim()]: text }; }
  }

  async search() {
    if (this.running) this.running.abort();
    const text = query();
    if (!text || !this.task.value) { this.show([], ""); this.fill(this.task.value); return; }
    const running = this.running = new AbortController();
    const asked = { query: text, k: 10, mode: this.mode.value, filter: this.filters() };
    const started = performance.now();
    try {
      const found = await post(`/tasks/${this.task.value}/search`, asked, { signal: running.signal });
      this.show(found.hits, text);
      const times = Object.entries(found.seconds).map(([part, seconds]) => `${part} ${(1000 * seconds).toFixed(1)} ms`);
      const cut = found.truncated_tokens ? ` · ${found.truncated_tokens} tokens of the query cut off` : "";
      const whole = `with the network ${(performance.now() - started).toFixed(0)} ms`;
      this.about.textContent = `${times.join(" · ")} · ${whole}${cut} · ${told(found.progress)}`;
      say("");
    } catch (error) {
      if (error.name !== "AbortError") { this.show([], ""); this.about.textContent = ""; say(error.message, true); }
    }
  }

  show(hits, text) {
    const stems = new Set(wordsOf(text).map(stem));
    this.rows = hits.map((hit) => hit.id);
    this.hits.dataset.query = text;
    const focused = this.hits.contains(document.activeElement);
    this.hits.replaceChildren(...hits.map((hit, place) => this.item(hit, place, stems)));
    if (focused) element("query").focus();
    if (text && !hits.length) {
      const none = document.createElement("li");
      none.className = "empty";
      none.textContent = "No document";
      this.hits.replaceChildren(none);
    }
    compareRanks();
  }

  item(hit, place, stems) {
    const { id, score, title, text, ...fields } = hit;
    const item = element("hit").content.cloneNode(true).firstElementChild;
    item.dataset.id = id;
    item.querySelector(".rank").textContent = place + 1;
    item.querySelector(".title").append(marked(title || id, stems));
    item.querySelector(".score").textContent = score.toFixed(4);
    item.querySelector(".text").append(marked(text, stems));
    const list = item.querySelector(".fields");
    for (const [name, value] of Object.entries({ id, ...fields })) {
      const term = document.createElement("dt"), meaning = document.createElement("dd");
      term.textContent = name;
      meaning.textContent = typeof value === "string" ? value : JSON.stringify(value);
      list.append(term, meaning);
    }
    item.addEventListener("click", () => { if (!String(getSelection())) toggle(item); });
    return item;
  }
}

function toggle(item) {
  item.classList.toggle("open");
  item.querySelector(".fields").hidden = !item.classList.contains("open");
}

function compareRanks() {
  panes.forEach((pane, number) => {
    const other = panes.length > 1 ? panes[1 - number] : null;
    for (const item of pane.hits.children) {
      const label = item.querySelector(".other");
      if (!label) continue;
      const place = other ? other.rows.indexOf(item.dataset.id) : -1;
      label.textContent = !other || !other.rows.length ? "" : place < 0 ? "only here" : `there ${place + 1}`;
    }
  });
}

const query = () => element("query").value.trim();

function told(progress) {
  const waiting = progress.pending ? `, ${progress.pending.toLocaleString()} being encoded` : "";
  const failed = progress.failed ? `, ${progress.failed.toLocaleString()} failed` : "";
  return `${progress.documents.toLocaleString()} documents${waiting}${failed}`;
}

const timers = new Map();
function later(owner, work) {
  clearTimeout(timers.get(owner));
  timers.set(owner, setTimeout(work, WAIT_MS));
}

const searchAll = () => panes.forEach((pane) => pane.search());

function remember() {
  const words = new URLSearchParams();
  if (query()) words.set("q", query());
  panes.forEach((pane) => { words.append("task", pane.task.value); words.append("mode", pane.mode.value); });
  history.replaceState(null, "", `?${words}`);
}

function compare(on) {
  element("compare").setAttribute("aria-pressed", String(on));
  element("panes").classList.toggle("two", on);
  if (on && panes.length < 2) {
    const first = panes[0];
    panes.push(new Pane(first.task.value, first.mode.value === "vector" ? "bm25" : "vector"));
    panes[1].search();
  } else if (!on && panes.length > 1) {
    panes.pop().root.remove();
    compareRanks();
  }
  remember();
}

// Documents from a file.

function csvRows(text, separator) {
  const rows = [[]];
  let cell = "", quoted = false;
  for (let place = 0; place < text.length; place++) {
    const letter = text[place];
    if (quoted) {
      if (letter !== '"') cell += letter;
      else if (text[place + 1] === '"') { cell += '"'; place++; } else quoted = false;
    } else if (letter === '"' && cell === "") quoted = true;
    else if (letter === separator) { rows.at(-1).push(cell); cell = ""; }
    else if (letter === "\n") { rows.at(-1).push(cell.replace(/\r$/, "")); cell = ""; rows.push([]); }
    else cell += letter;
  }
  rows.at(-1).push(cell);
  return rows.filter((row) => row.length > 1 || row[0] !== "");
}

function documentsOf(name, text) {
  text = text.replace(/^\uFEFF/, "");
  if (/\.(csv|tsv)$/i.test(name)) {
    const [head, ...rows] = csvRows(text, /\.tsv$/i.test(name) ? "\t" : ",");
    if (!head || !head.includes("text")) throw new Error("the first line must name the columns: id, text, title, …");
    return rows.map((row, number) => {
      const pairs = head.map((column, place) => [column, row[place] ?? ""]).filter(([column]) => column);
      return { id: `${name}-${number + 1}`, ...Object.fromEntries(pairs) };
    });
  }
  const whole = text.trim();
  if (whole.startsWith("[")) return JSON.parse(whole);
  if (whole.startsWith('{"documents"')) return JSON.parse(whole).documents;
  return whole.split("\n").filter((line) => line.trim()).map((line, number) => {
    try { return JSON.parse(line); } catch { throw new Error(`line ${number + 1} is not JSON`); }
  });
}

function showWork(done, text) {
  element("work").hidden = false;
  element("progress").value = done;
  element("progress-text").textContent = text;
}

async function addFile(file) {
  const task = panes[0].task.value;
  try {
    const documents = documentsOf(file.name, await file.text());
    for (let start = 0; start < documents.length; start += BATCH) {
      showWork(0.3 * start / documents.length, `${start.toLocaleString()} of ${documents.length.toLocaleString()} stored`);
      await post(`/tasks/${task}/documents`, { documents: documents.slice(start, start + BATCH) });
    }
    say(`${documents.length.toLocaleString()} documents of ${file.name} are stored in ${task}; BM25 finds them already`);
    await watch(task);
    searchAll();
  } catch (error) {
    say(`${file.name}: ${error.message}`, true);
  }
  element("work").hidden = true;
}

async function watch(task) {
  for (let first = 0; ; ) {
    const progress = await ask(`/tasks/${task}/documents`);
    first = Math.max(first, progress.pending);
    if (!progress.pending) { await refresh(); return; }
    showWork(0.3 + 0.7 * (1 - progress.pending / first), `${progress.pending.toLocaleString()} being encoded`);
    await new Promise((done) => setTimeout(done, 300));
  }
}

async function refresh() {
  tasks = (await ask("/tasks")).tasks;
  panes.forEach((pane) => pane.fill(pane.task.value));
}

// Keys and the start.

function move(step) {
  const active = document.activeElement;
  const pane = panes.find((one) => one.hits.contains(active)) || panes[0];
  const items = [...pane.hits.querySelectorAll("li[tabindex]")];
  const place = items.indexOf(active) + step;
  if (place < 0) element("query").focus();
  else if (items[place]) items[place].focus();
}

function keys(event) {
  const active = document.activeElement;
  const typing = active instanceof HTMLInputElement && active !== element("query");
  if (event.altKey && event.key.toLowerCase() === "c") compare(panes.length < 2);
  else if (event.altKey || event.ctrlKey || event.metaKey || typing || element("login").open) return;
  else if (event.key === "/" && active !== element("query")) element("query").focus();
  else if (event.key === "ArrowDown" && !(active instanceof HTMLSelectElement)) move(1);
  else if (event.key === "ArrowUp" && !(active instanceof HTMLSelectElement)) move(-1);
  else if (event.key === "Escape" && active !== element("query")) element("query").focus();
  else if (event.key === "Enter" && active.matches("li[tabindex]")) toggle(active);
  else return;
  event.preventDefault();
}

function listen() {
  element("query").addEventListener("input", () => later(document, () => { searchAll(); remember(); }));
  element("form").addEventListener("submit", (event) => { event.preventDefault(); searchAll(); });
  element("compare").addEventListener("click", () => compare(panes.length < 2));
  element("add").addEventListener("click", () => element("file").click());
  element("file").addEventListener("change", (event) => { if (event.target.files[0]) addFile(event.target.files[0]); event.target.value = ""; });
  document.addEventListener("keydown", keys);
  document.addEventListener("dragover", (event) => { event.preventDefault(); element("drop").hidden = false; });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) element("drop").hidden = true; });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    element("drop").hidden = true;
    if (event.dataTransfer.files[0]) addFile(event.dataTransfer.files[0]);
  });
}

async function begin() {
  listen();
  const words = new URLSearchParams(location.search);
  element("query").value = words.get("q") || "";
  try {
    tasks = (await ask("/tasks")).tasks;
  } catch (error) { say(error.message, true); }
  if (!tasks.length) say("This server has no task yet: PUT /tasks/NAME adds one");
  const names = words.getAll("task"), modes = words.getAll("mode");
  panes.push(new Pane(names[0], modes[0] || "vector"));
  if (names.length > 1) {
    panes.push(new Pane(names[1], modes[1]));
    compare(true);
  }
  searchAll();
  const waiting = tasks.find((one) => one.name === panes[0].task.value && one.documents.pending);
  if (waiting) watch(waiting.name).then(() => { element("work").hidden = true; });
}

begin();
