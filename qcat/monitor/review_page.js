
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const store = `${data.format}:${data.task}`;
const answers = new Map(); // a question's hash to its label, or to null for none of these
const past = []; // what can be undone: where it was, and the answer before it
let at = 0;

// What cannot be seen but turns or hides text around it; joiners shape Persian and Hindi.
function visible(text) {
  return text.replace(/(?![\u200c\u200d])[\p{Cc}\p{Cf}]/gu, (char) => {
    return `\\u${char.codePointAt(0).toString(16).padStart(4, "0")}`;
  });
}

function stored() {
  try {
    return new Map(JSON.parse(localStorage.getItem(store) || "[]"));
  } catch {
    return new Map(); // No storage, or another program's: the answers live as long as the page.
  }
}

function load() {
  const known = new Set(data.entries.map((entry) => entry.hash));
  for (const [hash, label] of stored()) {
    if (known.has(hash) && (label === null || data.labels.includes(label))) {
      answers.set(hash, label);
    }
  }
}

// One answer: another page of the task, or this one in another tab, keeps its own there too.
function keep(hash) {
  const all = stored();
  if (answers.has(hash)) all.set(hash, answers.get(hash));
  else all.delete(hash);
  try {
    localStorage.setItem(store, JSON.stringify([...all]));
  } catch {
    byId("how").textContent = "This browser keeps nothing: save before you close the page.";
  }
}

function waiting(from) {
  const found = data.entries.findIndex((entry, i) => i >= from && !answers.has(entry.hash));
  return found < 0 ? data.entries.length : found;
}

function button(label, key, kind) {
  const made = document.createElement("button");
  const name = document.createElement("bdi");
  name.textContent = visible(label);
  made.append(name);
  if (kind !== undefined) {
    const number = document.createElement("span");
    number.className = "number";
    number.textContent = kind;
    made.append(number);
  }
  if (key) {
    const cap = document.createElement("kbd");
    cap.textContent = key;
    made.append(cap);
  }
  made.addEventListener("click", () => answer(label));
  return made;
}

function show() {
  const entry = data.entries[at];
  const done = answers.size;
  const total = data.entries.length;
  byId("progress").textContent = `${done} of ${total} answered`;
  document.querySelector("progress").max = total || 1;
  document.querySelector("progress").value = done;
  document.querySelector("main").hidden = !entry;
  byId("end").hidden = Boolean(entry);
  byId("end").textContent =
    done === total
      ? "All questions are answered. Save the answers."
      : `That was the last one. Skip shows those again that were skipped: ${total - done}.`;
  byId("none").disabled = !entry;
  byId("skip").disabled = done === total;
  byId("undo").disabled = !past.length;
  byId("save").disabled = !done;
  byId("search").value = "";
  if (!entry) return;
  byId("question").textContent = visible(entry.text);
  const reason = entry.reason ? ` · ${entry.reason.replaceAll("_", " ")}` : "";
  byId("note").textContent = `seen ${entry.seen === 1 ? "once" : `${entry.seen} times`}${reason}`;
  byId("top").replaceChildren(
    ...entry.top.map(([label, share], i) => {
      const made = button(label, String(i + 1), share === null ? "" : share.toFixed(3));
      made.style.setProperty("--share", `${100 * (share || 0)}%`);
      return made;
    }),
  );
  search();
}

function search() {
  const words = byId("search").value.trim().toLowerCase();
  const begins = (label) => label.toLowerCase().startsWith(words);
  const found = data.labels
    .map((label, i) => [label, data.keys[i]])
    .filter(([label]) => label.toLowerCase().includes(words))
    .sort(([one], [two]) => begins(two) - begins(one));
  byId("labels").replaceChildren(...found.map(([label, key]) => button(label, key)));
  if (words && found.length) byId("labels").firstChild.className = "first";
}

function answer(label) {
  const { hash } = data.entries[at];
  past.push({ at, hash });
  answers.set(hash, label);
  keep(hash);
  byId("search").blur();
  at = waiting(at + 1);
  show();
}

function skip() {
  if (answers.size === data.entries.length) return;
  past.push({ at, hash: null });
  at = at < data.entries.length ? waiting(at + 1) : waiting(0);
  show();
}

function undo() {
  const last = past.pop();
  if (!last) return;
  if (last.hash !== null) {
    answers.delete(last.hash);
    keep(last.hash);
  }
  at = last.at;
  show();
}

function save() {
  const rows = data.entries
    .filter((entry) => answers.has(entry.hash))
    .map((entry) => ({ hash: entry.hash, label: answers.get(entry.hash) }));
  const saved = { format: data.format, task: data.task, answers: rows };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(
    new Blob([`${JSON.stringify(saved, null, 1)}\n`], { type: "application/json" }),
  );
  link.download = `${data.task}.review.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key } = event;
  const entry = data.entries[at];
  if (event.target === byId("search")) {
    if (key === "Enter" && byId("labels").firstChild) byId("labels").firstChild.click();
    else if (key === "Escape") byId("search").blur();
    else return;
  } else if (key === "s") skip();
  else if (key === "u") undo();
  else if (!entry) return;
  else if (key === "n") answer(null);
  else if (key === "/") byId("search").focus();
  else if (/^[1-9]$/.test(key) && key <= entry.top.length) answer(entry.top[key - 1][0]);
  else if (key.length === 1 && data.keys.includes(key) && data.labels[data.keys.indexOf(key)]) {
    answer(data.labels[data.keys.indexOf(key)]);
  } else return;
  event.preventDefault();
}

byId("none").addEventListener("click", () => answer(null));
byId("skip").addEventListener("click", skip);
byId("undo").addEventListener("click", undo);
byId("save").addEventListener("click", save);
byId("search").addEventListener("input", search);
document.addEventListener("keydown", press);
load();
at = waiting(0);
show();
