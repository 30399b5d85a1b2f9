// The page around tune.js: rows from a text box, a curve while the prompt trains, bars while you type.

import { get, Model, readTsv, train, writeNpy } from "./tune.js";

const WINDOW = 20; // steps over which the curve is averaged
const LIVE = 5; // steps after which the answer is drawn anew while the prompt trains
const OWN = "good: The soup was hot and the bread was fresh.\nbad: We waited an hour for cold soup.\n";
const at = id => document.getElementById(id);
const percent = share => (100 * share).toFixed(1) + "%";
const state = { model: null, rows: [], words: [], test: [], losses: [], stop: false, training: false };

function say(id, text, wrong = false) {
  at(id).textContent = text;
  at(id).className = wrong ? "wrong" : "quiet";
}

// ---- 1. rows ----

// "sport: Two goals." as a row. Throws for a line without a label.
function parse(line, number) {
  const [, target, input] = line.match(/^\s*([^:]*[^:\s])\s*:\s*(\S.*)$/) ?? [];
  if (!target) throw Error(`Line ${number}: expected a label, a colon and a text, as in "good: The soup was hot."`);
  return { input: input.trim(), target };
}

function rows() {
  const lines = at("rows").value.split("\n");
  const found = lines.flatMap((line, i) => (line.trim() ? parse(line, i + 1) : []));
  const words = [...new Set(found.map(row => row.target))].sort();
  const most = state.model.about.labels;
  if (words.length < 2 || words.length > most)
    throw Error(`Expected 2 to ${most} different labels, found ${words.length}.`);
  const ids = words.map(word => String(state.model.encodeWord(word)));
  const twin = ids.findIndex((id, i) => ids.indexOf(id) < i);
  if (twin > 0)
    throw Error(
      `The labels ${words[ids.indexOf(ids[twin])]} and ${words[twin]} are the same to the tokenizer; choose others.`,
    );
  return { found, words };
}

// Read the rows, say what they are, and make ready to train; or say what is wrong with them.
function read() {
  at("train").disabled = true;
  try {
    const { found, words } = rows();
    const long = found.filter(row => state.model.encode(row.input).length > state.model.about.input_tokens);
    const cut = long.length
      ? `; ${long.length} longer than ${state.model.about.input_tokens} tokens, the end is cut`
      : "";
    if (String(words) !== String(state.words)) forget();
    Object.assign(state, { rows: found, words });
    say("counted", `${found.length} rows; labels: ${words.join(", ")}${cut}`);
    at("train").disabled = state.training;
    commands();
    answer();
  } catch (error) {
    say("counted", error.message, true);
  }
}

// Show the rows of a demo task, or two to go on from.
async function begin() {
  const task = at("task").value;
  const parts = task ? ["train", "test"] : [];
  try {
    const [all, test] = await Promise.all(
      parts.map(async part => readTsv(await (await get(`${task}.${part}.tsv`)).text())),
    );
    if (task !== at("task").value) return; // another was chosen meanwhile
    at("rows").value = all ? all.map(row => `${row.target}: ${row.input}`).join("\n") : OWN;
    state.test = test ?? [];
    forget();
    read();
  } catch (error) {
    say("counted", error.message, true);
  }
}

// Go back to the first values of the prompt: what was trained is of other labels.
function forget() {
  state.losses = [];
  state.model.prompt.data.set(state.model.first.data);
  draw(at("steps").valueAsNumber || 1);
  say("progress", "Not trained yet: the prompt has its first values.");
  at("save").disabled = true;
}

// ---- 2. train ----

function svg(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

// Draw the loss of each step, and its mean over a window.
function draw(steps) {
  const { clientWidth: width, clientHeight: height } = at("curve");
  const [left, right, top, bottom] = [28, 8, 12, 24];
  const { losses } = state;
  const highest = Math.max(1, ...losses);
  const unit = [0.25, 0.5, 1, 2, 5, 10, 100].find(unit => highest / unit <= 5) ?? highest;
  const most = Math.ceil(highest / unit) * unit;
  const ticks = Array.from({ length: Math.round(most / unit) + 1 }, (_, i) => i * unit);
  const x = step => left + ((width - left - right) * (step - 1)) / Math.max(1, steps - 1);
  const y = loss => height - bottom - ((height - top - bottom) * loss) / most;
  const line = (kind, values, first) =>
    svg("polyline", { class: kind, points: values.map((loss, i) => [x(first + i), y(loss)]).join(" ") });
  const means = losses.slice(WINDOW - 1).map((_, i) => losses.slice(i, i + WINDOW).reduce((a, b) => a + b) / WINDOW);
  at("curve").replaceChildren(
    ...ticks.map(loss => svg("line", { class: "grid", x1: left, x2: width - right, y1: y(loss), y2: y(loss) })),
    ...ticks.map(loss => svg("text", { x: left - 6, y: y(loss) + 4, "text-anchor": "end" }, loss)),
    svg("text", { x: left, y: height - 4 }, "step 1"),
    svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, `step ${steps}`),
    line("each", losses, 1),
    line("mean", means, WINDOW),
  );
  const told = losses.length
    ? `${losses[0].toFixed(2)} at the first, ${losses.at(-1).toFixed(2)} at step ${losses.length}`
    : "nothing yet";
  at("curve").setAttribute("aria-label", `The loss of each step: ${told}`);
}

async function run() {
  const steps = at("steps").valueAsNumber;
  const learningRate = at("rate").valueAsNumber;
  const { words } = state;
  if (![at("steps"), at("rate")].every(field => field.reportValidity())) return;
  Object.assign(state, { losses: [], stop: false, training: true });
  busy(true);
  let told;
  let wrong = false;
  try {
    const started = performance.now();
    for await (const { step, loss } of train(state.model, state.rows, { steps, learningRate })) {
      state.losses.push(loss);
      state.speed = (1000 * step) / (performance.now() - started);
      say("progress", `step ${step} of ${steps}, loss ${loss.toFixed(3)}, ${state.speed.toFixed(2)} steps a second`);
      draw(steps);
      if (step % LIVE === 0) answer();
      if (state.stop) break;
    }
    told = `${state.losses.length} steps, ${state.speed.toFixed(2)} a second; loss ${state.losses.at(-1).toFixed(3)}; `;
    told += await score(words, told);
  } catch (error) {
    [told, wrong] = [error.message, true];
  }
  state.training = false;
  busy(false);
  say("progress", told, wrong);
  answer();
}

// How many rows are answered right: of the demo's test rows, or, of your own, of those it was trained on.
async function score(words, done) {
  const unseen = state.test.length && state.test.every(row => words.includes(row.target));
  const of = unseen ? state.test : state.rows;
  const kind = unseen ? "test rows, which it never saw" : "rows that it was trained on";
  let right = 0;
  let asked = 0;
  state.stop = false;
  for (const { input, target } of of) {
    const shares = await state.model.classify(input, words);
    right += words[shares.indexOf(Math.max(...shares))] === target;
    say("progress", `${done}asked ${++asked} of ${of.length} ${kind}`);
    if (state.stop) break;
  }
  state.accuracy = right / asked;
  return `accuracy ${state.accuracy.toFixed(3)} on ${asked} ${kind}`;
}

// What cannot be changed while the prompt trains; and no screen reader reads every step aloud.
function busy(training) {
  for (const id of ["train", "task", "rows", "steps", "rate", "device"]) at(id).disabled = training;
  at("stop").disabled = !training;
  at("save").disabled = training || !state.losses.length;
  for (const id of ["progress", "answer"]) at(id).ariaLive = training ? "off" : "polite";
}

// ---- 3. try ----

let asked = 0;
async function answer() {
  const text = at("text").value.trim();
  const { words } = state;
  const turn = ++asked;
  if (!text || !words.length) return at("answer").replaceChildren();
  let shares;
  try {
    shares = await state.model.classify(text, words);
  } catch (error) {
    return say("status", error.message, true);
  }
  if (turn !== asked) return; // a later text is on its way
  const best = Math.max(...shares);
  at("answer").replaceChildren(
    ...words.map((word, i) => {
      const line = document.createElement("li");
      const track = document.createElement("i");
      const bar = document.createElement("b");
      line.className = shares[i] === best ? "best" : "";
      bar.style.width = percent(shares[i]);
      track.setAttribute("aria-hidden", "true");
      track.append(bar);
      line.append(
        ...[word, percent(shares[i])].map(said => Object.assign(document.createElement("span"), { textContent: said })),
        track,
      );
      return line;
    }),
  );
}

// ---- 4. keep ----

const name = () => at("task").value || "mine";

function commands() {
  const quoted = word => (/^[\w./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);
  const words = state.words.map(quoted).join(" ");
  const file = `${name()}.safetensors`;
  const model = `--model ${quoted(state.model.about.model_name)}`;
  at("commands").textContent =
    `tinyprompt convert ${name()}.npy ${file} ${model} \\\n  --label-words ${words}\n` +
    `tinyprompt predict ${file} ${model} \\\n  "Two goals in the last minute."\n` +
    `tinyprompt convert ${file} ${name()}-for-peft`;
}

function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(writeNpy(state.model.prompt));
  link.download = `${name()}.npy`;
  link.click();
  URL.revokeObjectURL(link.href);
}

// ---- the page ----

async function load() {
  const started = performance.now();
  busy(true);
  at("stop").disabled = true;
  try {
    await state.model?.close();
    state.model = await Model.open(at("device").value, text => say("status", text));
    const { about, first } = state.model;
    const [vectors, width] = first.shape;
    const behind = `${vectors} vectors of ${width} numbers`;
    say("about", `The frozen T5 ${about.model} reads a text behind ${behind}. Only these learn.`);
    state.loaded = (performance.now() - started) / 1000;
    busy(false);
    if (at("task").length) {
      forget(); // the same rows on another device
      read();
    } else {
      [at("steps").value, at("rate").value] = [about.steps, about.learning_rate];
      at("task").append(
        ...about.tasks.map(task => new Option(`the demo task ${task}`, task)),
        new Option("your own rows", ""),
      );
      at("device-label").hidden = !(await Model.runsOnGpu(about));
      await begin();
    }
    say("status", `ready in ${state.loaded.toFixed(1)} s`);
  } catch (error) {
    at("device").disabled = false;
    say("status", error.message, true);
  }
}

at("task").addEventListener("change", begin);
at("rows").addEventListener("input", read);
at("train").addEventListener("click", run);
at("stop").addEventListener("click", () => {
  state.stop = true;
});
at("text").addEventListener("input", answer);
at("save").addEventListener("click", save);
at("device").addEventListener("change", load);
addEventListener("resize", () => draw(Math.max(at("steps").valueAsNumber || 1, state.losses.length)));
load();

export { state }; // for a look from the console: (await import("./app.js")).state
