// Prompt tuning in JavaScript, around two graphs that tinyprompt exported. Knows no page.
//
// step.onnx: (prompt, rows) -> loss, and its gradient with respect to the prompt.
// rank.onnx: (prompt, one text, label words) -> the log probability of each word.
// The weights of T5 lie in the graphs and never change. Only the prompt does, P vectors of width D, by Adam.
//
// Rows are { input, target }, both texts.

import { Tokenizer } from "./tokenizer.js";

const EOS = 1; // ends every text; 0 is padding

// ---- arrays and files ----

// A .npy file of float32, as numpy.save writes it and numpy.load reads it (numpy.lib.format describes it).
export function readNpy(buffer) {
  const view = new DataView(buffer);
  const length = view.getUint16(8, true); // behind "\x93NUMPY" and the version 1.0
  const header = new TextDecoder().decode(new Uint8Array(buffer, 10, length));
  const shape = header
    .match(/'shape': \(([^)]*)\)/)[1]
    .match(/\d+/g)
    .map(Number);
  if (!header.includes("'<f4'") || header.includes("True"))
    throw Error(`prompt.npy: expected float32, found ${header}`);
  return { data: new Float32Array(buffer.slice(10 + length)), shape };
}

export function writeNpy({ data, shape }) {
  let header = `{'descr': '<f4', 'fortran_order': False, 'shape': (${shape.join(", ")}), }`;
  header = header.padEnd(Math.ceil((header.length + 11) / 64) * 64 - 11) + "\n"; // the data begin at a multiple of 64
  const start = new Uint8Array(10 + header.length);
  start.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length % 256, header.length >> 8]);
  start.set(new TextEncoder().encode(header), 10);
  return new Blob([start, data], { type: "application/octet-stream" });
}

// The rows of a .tsv file with the columns input and target.
export function readTsv(text) {
  const [header, ...lines] = text
    .trim()
    .split("\n")
    .map(line => line.split("\t"));
  return lines.map(fields => Object.fromEntries(header.map((name, i) => [name, fields[i]])));
}

// What lies beside the page.
export async function get(path) {
  const reply = await fetch(path, { cache: "no-cache" }).catch(() => null);
  if (!reply?.ok) throw Error(`${path} cannot be loaded; serve the folder, for example by: python -m http.server`);
  return reply;
}

// ---- Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1) ----

export class Adam {
  constructor(size) {
    this.t = 0;
    this.m = new Float32Array(size);
    this.v = new Float32Array(size);
  }

  // Change params in place.
  update(params, gradient, rate) {
    const [beta1, beta2, eps] = [0.9, 0.999, 1e-8];
    const { m, v } = this;
    const t = ++this.t;
    for (let i = 0; i < params.length; i++) {
      const g = gradient[i];
      m[i] = beta1 * m[i] + (1 - beta1) * g;
      v[i] = beta2 * v[i] + (1 - beta2) * g * g;
      params[i] -= (rate * (m[i] / (1 - beta1 ** t))) / (Math.sqrt(v[i] / (1 - beta2 ** t)) + eps);
    }
  }
}

// ---- the model ----

export class Model {
  // Load everything beside this page. device: "wasm" or "webgpu". said: is told what is going on.
  static async open(device = "wasm", said = () => {}) {
    const self = new Model();
    const ort = (self.ort = await import(`./vendor/ort.${device}.bundle.min.mjs`));
    ort.env.logLevel = "error";
    ort.env.wasm.proxy = device === "wasm"; // compute in a worker, so that the page stays awake
    said("loading the page's data");
    const about = (self.about = await (await get("page.json")).json());
    self.tokenizer = new Tokenizer(await (await get("tokenizer.json")).json());
    for (const { text, ids } of about.probes)
      if (String(self.encode(text)) !== String(ids))
        throw Error(`The tokenizer splits ${JSON.stringify(text)} otherwise than tinyprompt does.`);
    self.first = readNpy(await (await get("prompt.npy")).arrayBuffer());
    self.prompt = { ...self.first, data: self.first.data.slice() };
    said("loading the weights");
    const externalData = await Promise.all(
      about.weights.map(async path => ({ path, data: new Uint8Array(await (await get(path)).arrayBuffer()) })),
    );
    for (const name of ["step", "rank"]) {
      said(`preparing ${name}.onnx`);
      const graph = new Uint8Array(await (await get(`${name}.onnx`)).arrayBuffer());
      self[name] = await ort.InferenceSession.create(graph, { executionProviders: [device], externalData });
    }
    self.queue = Promise.resolve();
    return self;
  }

  async close() {
    await Promise.all([this.step.release(), this.rank.release()]);
  }

  // Whether WebGPU is there, and computes with weights of this type.
  static async runsOnGpu({ weights_dtype }) {
    const adapter = await navigator.gpu?.requestAdapter();
    return (
      Boolean(adapter) &&
      (weights_dtype === "float32" || (weights_dtype === "float16" && adapter.features.has("shader-f16")))
    );
  }

  encode(text) {
    return this.tokenizer.encode(text);
  }

  // The ids of a label word. Throws for one that has more than the graphs take.
  encodeWord(word) {
    const ids = this.encode(word);
    const most = this.about.target_tokens;
    if (ids.length > most)
      throw Error(`The label ${word} has ${ids.length - 1} pieces; at most ${most - 1} fit. Choose a shorter one.`);
    return ids;
  }

  // Texts as input_ids and attention_mask, (texts, L). A longer text loses its end, but keeps eos.
  inputs(texts) {
    const L = this.about.input_tokens;
    const ids = new BigInt64Array(texts.length * L);
    const mask = new BigInt64Array(ids.length);
    texts.forEach((text, row) => {
      const all = this.encode(text);
      const kept = all.length > L ? [...all.slice(0, L - 1), EOS] : all;
      kept.forEach((id, i) => {
        ids[row * L + i] = BigInt(id);
        mask[row * L + i] = 1n;
      });
    });
    return { input_ids: this.tensor(ids, [texts.length, L]), attention_mask: this.tensor(mask, [texts.length, L]) };
  }

  // Words as labels and weights, which are 1 at tokens and 0 at padding. Shape (..., T), with room for all rows of it.
  labels(words, shape) {
    const T = this.about.target_tokens;
    const size = shape.reduce((a, b) => a * b) * T;
    const ids = new BigInt64Array(size);
    const weights = new Float32Array(size);
    words.forEach((word, row) =>
      this.encodeWord(word).forEach((id, i) => {
        ids[row * T + i] = BigInt(id);
        weights[row * T + i] = 1;
      }),
    );
    return { labels: this.tensor(ids, [...shape, T]), weights: this.tensor(weights, [...shape, T]) };
  }

  tensor(data, shape) {
    return new this.ort.Tensor(data instanceof Float32Array ? "float32" : "int64", data, shape);
  }

  // Run a graph with the prompt. One run at a time: the next waits for its turn.
  run(name, inputs) {
    const prompt = () => this.tensor(this.prompt.data.slice(), this.prompt.shape); // a copy: the worker keeps it
    const out = this.queue.then(() => this[name].run({ prompt: prompt(), ...inputs }));
    this.queue = out.catch(() => {});
    return out;
  }

  // The loss of some rows (batch_size of them), and its gradient with respect to the prompt.
  async gradient(rows) {
    const labels = this.labels(
      rows.map(row => row.target),
      [rows.length],
    );
    const { loss, gradient } = await this.run("step", { ...this.inputs(rows.map(row => row.input)), ...labels });
    return { loss: loss.data[0], gradient: gradient.data };
  }

  // The probability of each label word for a text: rank classification.
  async classify(text, words) {
    const labels = this.labels(words, [1, this.about.labels]);
    const { log_probability } = await this.run("rank", { ...this.inputs([text]), ...labels });
    const scores = [...log_probability.data.subarray(0, words.length)];
    const top = Math.max(...scores);
    const shares = scores.map(score => Math.exp(score - top));
    const sum = shares.reduce((a, b) => a + b);
    return shares.map(share => share / sum);
  }
}

// ---- training ----

// Random numbers from 0 to 1 that a seed repeats (mulberry32).
export function random(seed) {
  return () => {
    let t = (seed += 0x6d2b79f5);
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Full batches without end. Every epoch is shuffled; the last rows of one open the next.
export function* batches(rows, size, seed = 0) {
  const next = random(seed);
  for (let waiting = []; ;) {
    while (waiting.length < size) {
      const epoch = [...rows];
      for (let i = epoch.length - 1; i > 0; i--) {
        const j = Math.floor(next() * (i + 1));
        [epoch[i], epoch[j]] = [epoch[j], epoch[i]];
      }
      waiting.push(...epoch);
    }
    yield waiting.splice(0, size);
  }
}

// Train the model's prompt from its first values; yield each step. The learning rate falls to 0. A `break` stops early.
export async function* train(model, rows, { steps, learningRate }) {
  model.prompt.data.set(model.first.data);
  const adam = new Adam(model.prompt.data.length);
  const batch = batches(rows, model.about.batch_size);
  for (let step = 1; step <= steps; step++) {
    const { loss, gradient } = await model.gradient(batch.next().value);
    if (!Number.isFinite(loss)) throw Error(`The loss is ${loss} at step ${step}; lower the learning rate.`);
    adam.update(model.prompt.data, gradient, learningRate * (1 - (step - 1) / steps));
    yield { step, loss };
  }
}
