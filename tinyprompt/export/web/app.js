// The page on top of tune.js: rows from a text box or a file, curves during training, bars while you type.

import { guessColumns, holdOut, majority, readRow, readTable, rowsOf, writeRow } from "./rows.js";
import { at, bars, curves, inside, say } from "./show.js";
import { get, Model, train, writeNpy } from "./tune.js";

const LIVE = 10; // steps between two updates of the answer and the views of the prompt during training
const LOOKS = 3; // number of parts of a training, each of which ends with a score on held-out rows
const SOME = 20; // held-out rows of such a score; the last score uses all
const PATH = 60; // largest number of prompts of a path
const OWN = "good: The soup was hot and the bread was fresh.\nbad: We waited an hour for cold soup.\n";
const state = {
  model: null,
  rows: [], // training rows
  held: [], // rows for scores only
  words: [],
  test: [], // test rows of the demo task
  tokens: new Map(), // number of tokens of each text
  table: null, // the lines of a file
  notes: "", // remarks about its rows
  name: "mine",
  example: "", // the text to try, unless the visitor typed a text
  losses: [],
  scores: [],
  majority: null,
  path: [], // the prompts so far, beginning with the first values
  seen: null, // the last output of the graph `look`
  stop: false,
  training: false,
};

// ---- 1. rows ----

function rows() {
  const found = at("rows")
    .value.split("\n")
    .flatMap((line, i) => (line.trim() ? readRow(line, i + 1) : []));
  const words = [...new Set(found.map(row => row.target))].sort();
  if (words.length < 2) throw Error(`Expected at least 2 different labels, found ${words.length}.`);
  state.model.check(words);
  return { found, words };
}

// Return the number of tokens of a text. It is cached, since the rows are read at every keystroke.
function tokens(text) {
  if (!state.tokens.has(text)) state.tokens.set(text, state.model.encode(text).length);
  return state.tokens.get(text);
}

// Read the rows, describe them and enable training, or show the error in them.
function read() {
  at("train").disabled = true;
  try {
    const { found, words } = rows();
    const most = state.model.about.input_tokens;
    const long = found.filter(row => tokens(row.input) > most).length;
    const cut = long ? `; ${long} longer than ${most} tokens, the end is cut (export --web --input-tokens)` : "";
    const tested = state.test.length > 0 && state.test.every(row => words.includes(row.target));
    const share = at("share").checkValidity() ? at("share").valueAsNumber / 100 : 0;
    const { rows: kept, held } = tested ? { rows: found, held: state.test } : holdOut(found, share);
    const apart = tested ? "" : `, of which ${held.length} are held out`;
    const others = String(words) !== String(state.words);
    Object.assign(state, { rows: kept, held, tested, words, majority: held.length ? majority(kept, held) : null });
    at("share-label").hidden = tested;
    say("counted", `${found.length} rows${apart}; labels: ${words.join(", ")}${cut}${state.notes}`);
    offer((held[0] ?? kept[0]).input);
    at("train").disabled = state.training;
    if (others) return reset();
    draw();
    commands();
    answer();
  } catch (error) {
    say("counted", error.message, true);
  }
}

// Put an example into the text to try, unless the visitor typed a text.
function offer(example) {
  if (at("text").value === state.example) at("text").value = example;
  state.example = example;
}

// Show the rows of a demo task, or two example rows.
async function begin() {
  const task = at("task").value;
  try {
    const [all, test] = await Promise.all(
      (task ? ["train", "test"] : []).map(async part => demo(await (await get(`${task}.${part}.tsv`)).text())),
    );
    if (task !== at("task").value) return; // another task was chosen meanwhile
    at("rows").value = all ? all.map(writeRow).join("\n") : OWN;
    Object.assign(state, { test: test ?? [], table: null, notes: "", name: task || "mine", words: [] });
    at("columns").hidden = true;
    at("file").value = "";
    read();
  } catch (error) {
    say("counted", error.message, true);
  }
}

// Return the rows of a .tsv file of the demo, with the columns input and target.
function demo(text) {
  const [header, ...lines] = text
    .trim()
    .split("\n")
    .map(line => line.split("\t"));
  return lines.map(fields => Object.fromEntries(header.map((name, i) => [name, fields[i]])));
}

// Read a file: guess its columns, and offer all columns for selection.
async function take(file) {
  if (!file || state.training) return;
  try {
    const table = readTable(await file.arrayBuffer());
    const guess = guessColumns(table);
    const stem = file.name.replace(/\.[^.]*$/, "").replace(/[^\p{L}\p{N}._-]+/gu, "-");
    Object.assign(state, { table, test: [], name: stem.replace(/^[-.]+/, "") || "mine", words: [] });
    at("task").value = "";
    const names = table.lines[0].map((name, i) => `${i + 1}: ${name.trim().slice(0, 40)}`);
    for (const [id, chosen] of [
      ["text-column", guess.text],
      ["label-column", guess.label],
    ])
      at(id).replaceChildren(...names.map((name, i) => new Option(name, i, i === chosen, i === chosen)));
    at("header").checked = guess.header;
    at("columns").hidden = false;
    fill();
  } catch (error) {
    say("counted", `${file.name}: ${error.message}`, true);
    at("train").disabled = true;
  }
}

// Fill the text box with the chosen columns of the file.
function fill() {
  const [text, label] = ["text-column", "label-column"].map(id => Number(at(id).value));
  const { rows, empty, quoted } = rowsOf(state.table, { text, label, header: at("header").checked });
  at("rows").value = rows.map(writeRow).join("\n");
  state.notes = empty ? `; ${empty} lines without a text or a label are left out` : "";
  if (quoted) state.notes += `; ${quoted} rows look quoted, as in a .csv; the quotes were kept`;
  read();
}

// Set the prompt to its first values. They are kept until the next training.
async function reset() {
  Object.assign(state, { losses: [], scores: [], path: [] });
  at("save").disabled = true;
  draw();
  commands();
  say("progress", "Not trained yet: the prompt has its first values.");
  try {
    if (await state.model.begin(at("init").value === "labels" ? state.words : [])) {
      state.path = [state.model.prompt.data.slice()];
      await answer();
    }
  } catch (error) {
    say("status", error.message, true);
  }
}

// ---- 2. train ----

function draw() {
  curves(state, Math.max(at("steps").valueAsNumber || 1, state.losses.length));
  say(
    "scored",
    state.majority === null
      ? "No row is held out."
      : `Accuracy on held-out rows: bold, on ${Math.min(SOME, state.held.length)} of them while training, on all at the ` +
          `end; dashed, the majority class`,
  );
}

// Append the prompt to its path, and thin the path out if it is too long.
function walk() {
  state.path.push(state.model.prompt.data.slice());
  if (state.path.length > PATH) state.path = state.path.filter((_, i) => i % 2 === 0 || i === state.path.length - 1);
}

async function run() {
  const steps = at("steps").valueAsNumber;
  const learningRate = at("rate").valueAsNumber;
  if (![at("steps"), at("rate"), at("share")].every(field => field.reportValidity())) return;
  Object.assign(state, { stop: false, training: true });
  busy(true);
  let told;
  let wrong = false;
  try {
    await reset();
    const started = performance.now();
    for await (const { step, loss } of train(state.model, state.rows, { steps, learningRate })) {
      state.losses.push(loss);
      state.speed = (1000 * step) / (performance.now() - started);
      const last = state.scores.at(-1);
      const scored = last ? `; accuracy ${last[1].toFixed(3)} at step ${last[0]}, ${beside()}` : "";
      say(
        "progress",
        `step ${step} of ${steps}, loss ${loss.toFixed(3)}, ${state.speed.toFixed(2)} steps a second${scored}`,
      );
      if (step % LIVE === 0) {
        walk();
        answer();
      }
      if (state.held.length && step < steps && step % Math.ceil(steps / LOOKS) === 0)
        state.scores.push([step, (await score(state.held.slice(0, SOME))).accuracy]);
      draw();
      if (state.stop) break;
    }
    walk();
    told = `${state.losses.length} steps, ${state.speed.toFixed(2)} a second; loss ${state.losses.at(-1).toFixed(3)}; `;
    told += await final(told);
  } catch (error) {
    [told, wrong] = [error.message, true];
  }
  state.training = false;
  busy(false);
  say("progress", told, wrong);
  answer();
}

const beside = () => `majority class ${state.majority.toFixed(3)}`;

// Return the accuracy on rows. said: receives the number of answered rows.
async function score(of, said = () => {}) {
  let right = 0;
  let asked = 0;
  for (const { input, target } of of) {
    if (asked && state.stop) break;
    const shares = await state.model.classify(input, state.words);
    right += state.words[shares.indexOf(Math.max(...shares))] === target;
    said(++asked);
  }
  return { accuracy: right / asked, asked };
}

// Return the final accuracy: on the held-out rows, or else on the training rows.
async function final(done) {
  const of = state.held.length ? state.held : state.rows;
  const kind = state.tested
    ? "test rows, which it never saw"
    : state.held.length
      ? "held-out rows"
      : "rows that it was trained on";
  state.stop = false;
  const { accuracy, asked } = await score(of, asked =>
    say("progress", `${done}asked ${asked} of ${of.length} ${kind}`),
  );
  state.accuracy = accuracy;
  if (state.held.length) state.scores.push([state.losses.length, accuracy]);
  draw();
  return `accuracy ${accuracy.toFixed(3)} on ${asked} ${kind}${state.held.length ? `; ${beside()}` : ""}`;
}

// Disable the settings during training, and keep screen readers from reading every step.
function busy(training) {
  for (const field of document.querySelectorAll(
    "#source :is(select, input, textarea), #steps, #rate, #share, #init, #device",
  ))
    field.disabled = training;
  at("train").disabled = at("reset").disabled = training;
  at("stop").disabled = !training;
  at("save").disabled = training || !state.losses.length;
  for (const id of ["progress", "answer"]) at(id).ariaLive = training ? "off" : "polite";
}

// ---- 3. try, and 4. look inside ----

let asked = 0;
async function answer() {
  const text = at("text").value.trim();
  const { model, words } = state;
  const turn = ++asked;
  if (!words.length) return at("answer").replaceChildren();
  if (!text) at("answer").replaceChildren();
  try {
    const shares = text && (await model.classify(text, words));
    if (turn !== asked) return; // a later call has started
    if (text) bars(words, shares);
    const seen = await model.look(text || state.example);
    if (turn !== asked) return;
    state.seen = seen;
    see();
  } catch (error) {
    say("status", error.message, true);
  }
}

// Draw the views of the prompt from the last output of `look`.
function see() {
  const { model, seen, path, words } = state;
  if (!seen || !path.length) return;
  state.axes = inside(model, seen, path, at("init").value === "labels" ? words : [], state.axes);
}

// ---- 5. keep ----

function commands() {
  const quoted = word => (/^[\w./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  const words = state.words.map(quoted).join(" ");
  const [npy, file, peft] = [".npy", ".safetensors", "-for-peft"].map(end => quoted(state.name + end));
  const model = `--model ${quoted(state.model.about.model_name)}`;
  at("commands").textContent =
    `tinyprompt convert ${npy} ${file} ${model} \\\n  --label-words ${words}\n` +
    `tinyprompt predict ${file} ${model} \\\n  ${quoted(state.example)}\n` +
    `tinyprompt convert ${file} ${peft}`;
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(writeNpy(state.model.prompt));
  link.download = `${state.name}.npy`;
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---- the page ----

// Show the current step of loading, or the number of received bytes.
function loading(said, bytes, total) {
  if (!bytes) return say("status", said);
  const mb = count => (count / 1e6).toFixed(1);
  Object.assign(at("loaded"), { max: total, value: bytes });
  at("bytes").textContent = `${mb(bytes)} of ${mb(total)} MB`;
}

async function load() {
  const started = performance.now();
  busy(true);
  at("stop").disabled = true;
  at("loading").hidden = false;
  try {
    await state.model?.close();
    state.model = await Model.open(at("device").value, loading);
    const { about, given } = state.model;
    const [vectors, width] = given.shape;
    const behind = `${vectors} vectors of ${width} numbers`;
    say("about", `The frozen T5 ${about.model} reads a text behind ${behind}. Only these learn.`);
    state.loaded = (performance.now() - started) / 1000;
    busy(false);
    if (at("task").length) {
      state.words = []; // forces `read` to reset the prompt on the new device
      read();
    } else {
      [at("steps").value, at("rate").value, at("init").value] = [about.steps, about.learning_rate, about.init];
      at("task").append(
        ...about.tasks.map(task => new Option(`the demo task ${task}`, task)),
        new Option("your own rows", ""),
      );
      at("device-label").hidden = !(await Model.runsOnGpu(about));
      await begin();
    }
    at("loading").hidden = true;
    say("status", `ready in ${state.loaded.toFixed(1)} s`);
  } catch (error) {
    at("device").disabled = false;
    say("status", error.message, true);
  }
}

at("task").addEventListener("change", begin);
at("rows").addEventListener("input", read);
at("share").addEventListener("input", read);
at("file").addEventListener("change", () => take(at("file").files[0]));
for (const id of ["text-column", "label-column", "header"]) at(id).addEventListener("change", fill);
for (const kind of ["dragover", "dragleave", "drop"])
  at("source").addEventListener(kind, event => {
    event.preventDefault();
    at("source").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files[0]);
  });
at("init").addEventListener("change", reset);
at("train").addEventListener("click", run);
at("reset").addEventListener("click", reset);
at("stop").addEventListener("click", () => {
  state.stop = true;
});
at("text").addEventListener("input", answer);
at("save").addEventListener("click", save);
at("device").addEventListener("change", load);
addEventListener("resize", () => {
  draw();
  see();
});
load();

export { state }; // for the console: (await import("./app.js")).state
