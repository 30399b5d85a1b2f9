// Prompt tuning in JavaScript with three graphs exported by tinyprompt. Does not depend on the page.
//
// step.onnx: (prompt, rows) -> loss, and its gradient with respect to the prompt.
// rank.onnx: (prompt, one text, label words) -> the log probability of each word.
// look.onnx: (prompt, one text) -> cosines to the vocabulary, attention to the prompt, embeddings of the text.
// The graphs contain the weights of T5, which never change. Adam trains the prompt only: P vectors of width D.
//
// Rows are { input, target }, both texts.

import { nearest } from "./inside.js";
import { Tokenizer } from "./tokenizer.js";

const EOS = 1; // ends every text; 0 is padding
const GRAPHS = ["step", "rank", "look"];
const RUNTIME = { wasm: "ort-wasm-simd-threaded.wasm", webgpu: "ort-wasm-simd-threaded.asyncify.wasm" };

// ---- arrays and files ----

// Read a .npy file of float32 (numpy.lib.format documents the format).
export function readNpy(buffer) {
  const view = new DataView(buffer);
  const length = view.getUint16(8, true); // after "\x93NUMPY" and the version 1.0
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
  header = header.padEnd(Math.ceil((header.length + 11) / 64) * 64 - 11) + "\n"; // align the data to 64 bytes
  const start = new Uint8Array(10 + header.length);
  start.set([0x93, ...new TextEncoder().encode("NUMPY"), 1, 0, header.length % 256, header.length >> 8]);
  start.set(new TextEncoder().encode(header), 10);
  return new Blob([start, data], { type: "application/octet-stream" });
}

// Fetch a file from the folder of the page.
export async function get(path) {
  const reply = await fetch(path, { cache: "no-cache" }).catch(() => null);
  if (!reply?.ok) throw Error(`${path} cannot be loaded; serve the folder, for example by: python -m http.server`);
  return reply;
}

// Return the bytes of a file. arrived: receives the size of each part.
async function bytes(path, arrived = () => {}) {
  const reader = (await get(path)).body.getReader();
  const parts = [];
  for (let part; !(part = await reader.read()).done; parts.push(part.value)) arrived(part.value.length);
  return new Uint8Array(await new Blob(parts).arrayBuffer());
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
  // Load the files of the page. device: "wasm" or "webgpu". said: receives the current step and, while weights and
  // runtime load, the received and the total bytes.
  static async open(device = "wasm", said = () => {}) {
    const self = new Model();
    const ort = (self.ort = await import(`./vendor/ort.${device}.bundle.min.mjs`));
    ort.env.logLevel = "error";
    ort.env.wasm.proxy = device === "wasm"; // compute in a worker, so that the page stays responsive
    said("loading the page's data");
    const about = (self.about = await (await get("page.json")).json());
    self.tokenizer = new Tokenizer(await (await get("tokenizer.json")).json());
    for (const { text, ids } of about.probes)
      if (String(self.encode(text)) !== String(ids))
        throw Error(`The tokenizer splits ${JSON.stringify(text)} otherwise than tinyprompt does.`);
    self.given = readNpy(await (await get("prompt.npy")).arrayBuffer());
    self.first = { ...self.given, data: self.given.data.slice() };
    self.prompt = { ...self.given, data: self.given.data.slice() };
    const runtime = `vendor/${RUNTIME[device]}`;
    const large = [runtime, ...about.weights];
    const total = large.reduce((sum, path) => sum + about.bytes[path], 0);
    let sum = 0;
    const arrived = count => said("loading", (sum += count), total);
    const [wasm, ...weights] = await Promise.all(large.map(path => bytes(path, arrived)));
    ort.env.wasm.wasmBinary = wasm.buffer;
    const externalData = about.weights.map((path, i) => ({ path, data: weights[i] }));
    self.graphs = {};
    for (const name of GRAPHS) {
      said(`preparing ${name}.onnx`);
      const graph = await bytes(`${name}.onnx`);
      self.graphs[name] = await ort.InferenceSession.create(graph, { executionProviders: [device], externalData });
    }
    self.queue = Promise.resolve();
    self.chance = await self.byChance();
    return self;
  }

  async close() {
    await Promise.all(Object.values(this.graphs).map(graph => graph.release()));
  }

  // Return whether WebGPU is available and supports weights of this type.
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

  // Throw for label words that are too long for the graphs, have no token, or have the same tokens.
  check(words) {
    const ids = words.map(word => this.encode(word));
    const most = this.about.target_tokens;
    const longest = ids.reduce((at, one, i) => (one.length > ids[at].length ? i : at), 0);
    const size = ids[longest].length;
    if (size > most)
      throw Error(
        `The label ${words[longest]} has ${size} tokens with the end of the text; the graphs hold ${most}. ` +
          `Choose a shorter label, or write the page again with: tinyprompt export --web DIR --target-tokens ${size}`,
      );
    const empty = ids.findIndex(one => one.length < 2);
    if (empty >= 0) throw Error(`The label ${words[empty]} has no token. Choose another label.`);
    const names = ids.map(String);
    const twin = names.findIndex((name, i) => names.indexOf(name) < i);
    const [first, second] = [words[names.indexOf(names[twin])], words[twin]];
    if (twin > 0) throw Error(`The labels ${first} and ${second} are the same to the tokenizer; choose others.`);
  }

  // Convert texts to input_ids and attention_mask, (texts, L). A longer text is truncated, but keeps eos.
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

  // Convert words to labels and weights, which are 1 at tokens and 0 at padding. Shape (..., T); missing rows are 0.
  labels(words, shape) {
    const T = this.about.target_tokens;
    const size = shape.reduce((a, b) => a * b) * T;
    const ids = new BigInt64Array(size);
    const weights = new Float32Array(size);
    words.forEach((word, row) =>
      this.encode(word).forEach((id, i) => {
        ids[row * T + i] = BigInt(id);
        weights[row * T + i] = 1;
      }),
    );
    return { labels: this.tensor(ids, [...shape, T]), weights: this.tensor(weights, [...shape, T]) };
  }

  tensor(data, shape) {
    return new this.ort.Tensor(data instanceof Float32Array ? "float32" : "int64", data, shape);
  }

  // Run a graph with a prompt. Runs wait for each other.
  run(name, inputs, { data, shape } = this.prompt) {
    const prompt = () => this.tensor(data.slice(), shape); // a copy, since the worker takes it over
    const out = this.queue.then(() => this.graphs[name].run({ prompt: prompt(), ...inputs }));
    this.queue = out.catch(() => {});
    return out;
  }

  // Return the loss of batch_size rows, and its gradient with respect to the prompt.
  async gradient(rows) {
    const labels = this.labels(
      rows.map(row => row.target),
      [rows.length],
    );
    const { loss, gradient } = await this.run("step", { ...this.inputs(rows.map(row => row.input)), ...labels });
    return { loss: loss.data[0], gradient: gradient.data };
  }

  // Return the probability of each label word for a text: rank classification. The graph takes a few words at once.
  async classify(text, words) {
    const most = this.about.labels;
    const scores = [];
    for (let i = 0; i < words.length; i += most) {
      const some = words.slice(i, i + most);
      const { log_probability } = await this.run("rank", { ...this.inputs([text]), ...this.labels(some, [1, most]) });
      scores.push(...log_probability.data.subarray(0, some.length));
    }
    const top = Math.max(...scores);
    const shares = scores.map(score => Math.exp(score - top));
    const sum = shares.reduce((a, b) => a + b);
    return shares.map(share => share / sum);
  }

  // Return a prompt's cosines to the vocabulary (P, V), and the attention of each token of a text to it (tokens, P).
  async look(text, prompt = this.prompt) {
    const { cosine, attention } = await this.run("look", this.inputs([text]), prompt);
    const ids = this.encode(text).slice(0, this.about.input_tokens);
    const P = prompt.shape[0];
    return {
      cosine: cosine.data,
      pieces: ids.map(id => this.tokenizer.piece(id)),
      attention: ids.map((_, i) => [...attention.data.subarray(i * P, (i + 1) * P)]),
    };
  }

  // Return the k nearest pieces of each vector, best first: [{ piece, cosine }, ...]. cosine: (P, V).
  nearest(cosine, k) {
    const found = nearest(cosine, cosine.length / this.given.shape[0], this.tokenizer.size, k);
    return found.map(row => row.map(({ id, cosine }) => ({ piece: this.tokenizer.piece(id), cosine })));
  }

  // Return the mean cosine of random vectors to their nearest pieces.
  async byChance() {
    const { data, shape } = this.given;
    const next = random(1);
    const normal = () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next());
    const { cosine } = await this.look("", { data: data.map(normal), shape });
    return this.nearest(cosine, 1).reduce((sum, [best]) => sum + best.cosine, 0) / shape[0];
  }

  // Return the mean embedding of a word's pieces, (D,).
  async embed(word) {
    const D = this.first.shape[1];
    const { embedding } = await this.run("look", this.inputs([word]));
    const pieces = Math.min(this.encode(word).length, this.about.input_tokens) - 1;
    return Float32Array.from({ length: D }, (_, d) => {
      let sum = 0;
      for (let i = 0; i < pieces; i++) sum += embedding.data[i * D + d];
      return sum / pieces;
    });
  }

  // Set the prompt to its first values: the embeddings of words, then the vectors of prompt.npy. If two calls overlap,
  // the later call wins. Return whether this call won.
  async begin(words = []) {
    const turn = (this.turn = (this.turn ?? 0) + 1);
    const vectors = [];
    for (const word of words.slice(0, this.first.shape[0])) vectors.push(await this.embed(word));
    if (turn !== this.turn) return false;
    this.first.data.set(this.given.data);
    vectors.forEach((vector, i) => this.first.data.set(vector, i * vector.length));
    this.prompt.data.set(this.first.data);
    this.firstPieces = this.nearest((await this.look("")).cosine, 1).map(([best]) => best.piece);
    return turn === this.turn;
  }
}

// ---- training ----

// Return a seeded generator of random numbers from 0 to 1 (mulberry32).
export function random(seed) {
  return () => {
    let t = (seed += 0x6d2b79f5);
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// Yield full batches endlessly. Every epoch is shuffled; its last rows begin the first batch of the next epoch.
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
