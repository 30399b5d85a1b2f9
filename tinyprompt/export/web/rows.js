// Rows of a text box and of files, and held-out rows. Does not depend on the page or the model.
//
// Rows are { input, target }, both texts.

const TEXT = /^(text|input|sentence|review|question|content|message|document|title)s?$/i;
const LABEL = /^(label|target|class|category|topic|sentiment|intent|answer|output|tag|y)(_?name|_?text)?s?$/i;
const QUOTED = /^"(?:[^"]|"")*""(?:[^"]|"")*"$/; // quoted, with a quote inside
const oneLine = text => text.replace(/\s+/g, " ").trim();

// ---- lines: the label, a colon, the text; a label with a colon or a quote is quoted as in CSV ----

export function writeRow({ input, target }) {
  return `${/[:"]/.test(target) ? `"${target.replaceAll('"', '""')}"` : target}: ${input}`;
}

// Throw for a line without a label or a text.
export function readRow(line, number) {
  const [, quoted, plain, input] = line.match(/^\s*(?:"([^"]*(?:""[^"]*)*)"|([^:]*[^:\s]))\s*:\s*(\S.*)$/s) ?? [];
  const target = quoted?.replaceAll('""', '"').trim() ?? plain;
  if (!target) throw Error(`Line ${number}: expected a label, a colon and a text, as in "good: The soup was hot."`);
  return { input: input.trim(), target };
}

// ---- files: fields between tabs, commas or semicolons; between tabs a quote is a character, as in `tune` ----

// Parse a file into { lines, numbers }: the fields of each line, and the line's number. Throw for other encodings,
// misplaced quotes, and lines of different lengths.
export function readTable(bytes) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(bytes); // without the byte order mark
  } catch {
    throw Error("The file is not UTF-8. Save it as UTF-8.");
  }
  if (text.includes("\0")) throw Error("The file is not a text. Save it as .csv or .tsv in UTF-8.");
  const head = text
    .trimStart()
    .split(/\r?\n/, 1)[0]
    .replace(/"[^"]*"/g, "");
  const counts = ["\t", ",", ";"].map(mark => head.split(mark).length);
  const mark = ["\t", ",", ";"][counts.indexOf(Math.max(...counts))];
  const quotes = `"(?<quoted>[^"]*(?:""[^"]*)*)"(?=${mark}|[\\r\\n]|$)|`;
  const field = RegExp(`${mark === "\t" ? "" : quotes}(?<plain>[^${mark}\\r\\n]*)`, "y");
  const [lines, numbers] = [[], []];
  for (let at = 0, number = 1; at < text.length;) {
    const fields = [];
    const start = number;
    do {
      field.lastIndex = at;
      const {
        0: all,
        groups: { quoted, plain },
      } = field.exec(text);
      if (plain?.startsWith('"') && mark !== "\t")
        throw Error(`Line ${number}: a quote is out of place or never closed. Write a quote inside a text as two.`);
      fields.push(quoted?.replaceAll('""', '"') ?? plain);
      number += all.split(/\r\n?|\n/).length - 1;
      at += all.length;
    } while (text[at] === mark && ++at);
    at += text.startsWith("\r\n", at) ? 2 : 1;
    number++;
    if (!fields.some(one => one.trim())) continue;
    lines.push(fields);
    numbers.push(start);
  }
  const wide = lines[0]?.length ?? 0;
  if (wide < 2) throw Error("The file has one column. Expected a text and a label, between them a comma or a tab.");
  const odd = lines.findIndex(fields => fields.length !== wide);
  if (odd > 0) throw Error(`Line ${numbers[odd]}: ${lines[odd].length} fields, but the first line has ${wide}.`);
  return { lines, numbers };
}

// Guess the columns of text and label, and whether the first line is a header: by the names, else by the values.
export function guessColumns({ lines }) {
  const columns = lines[0].map((name, i) => ({
    i,
    name: name.trim(),
    values: lines.slice(1).map(fields => fields[i]),
  }));
  const kinds = ({ values }) => new Set(values).size;
  const length = ({ values }) => values.reduce((sum, value) => sum + value.length, 0);
  const named = names => columns.find(({ name }) => names.test(name));
  const byKinds = columns
    .filter(column => kinds(column) > 1)
    .sort((a, b) => kinds(a) - kinds(b) || length(a) - length(b));
  const label = named(LABEL) ?? byKinds[0] ?? columns.at(-1);
  const others = columns.filter(column => column !== label).sort((a, b) => length(b) - length(a));
  const text = others.find(({ name }) => TEXT.test(name)) ?? others[0];
  return { text: text.i, label: label.i, header: LABEL.test(label.name) || !label.values.includes(lines[0][label.i]) };
}

// Return the rows of two columns, the number of lines without a text or a label, and the number of rows that look
// quoted as in CSV.
export function rowsOf({ lines }, { text, label, header }) {
  const all = lines
    .slice(header ? 1 : 0)
    .map(fields => ({ input: oneLine(fields[text]), target: oneLine(fields[label]) }));
  const rows = all.filter(({ input, target }) => input && target);
  const quoted = rows.filter(({ input, target }) => QUOTED.test(input) || QUOTED.test(target)).length;
  return { rows, empty: all.length - rows.length, quoted };
}

// ---- held-out rows ----

// Hold out a share of the texts of each label. The choice depends on the text only, so the order of the rows or another
// run does not change it. Copies of a text stay together, and every label keeps a text.
export function holdOut(rows, share) {
  const targets = new Map();
  for (const { input, target } of rows) if (!targets.has(input)) targets.set(input, target);
  const texts = new Map();
  for (const [input, target] of targets) texts.set(target, [...(texts.get(target) ?? []), input]);
  const apart = new Set();
  for (const inputs of texts.values()) {
    const order = inputs.map(input => [hash(input), input]).sort(([a, x], [b, y]) => a - b || (x < y ? -1 : 1));
    for (const [, input] of order.slice(0, Math.min(Math.round(share * order.length), order.length - 1)))
      apart.add(input);
  }
  return { rows: rows.filter(row => !apart.has(row.input)), held: rows.filter(row => apart.has(row.input)) };
}

// Hash a text to a number below 2 ** 32 (FNV-1a with a final mix).
function hash(text) {
  let h = 0x811c9dc5;
  for (const byte of new TextEncoder().encode(text)) h = Math.imul(h ^ byte, 0x01000193);
  h = Math.imul(h ^ (h >>> 15), 0x2c1b3c6d);
  return (h ^ (h >>> 13)) >>> 0;
}

// Return the accuracy of the most frequent label of the training rows on held-out rows.
export function majority(rows, others) {
  const times = new Map();
  for (const { target } of rows) times.set(target, (times.get(target) ?? 0) + 1);
  const most = [...times].reduce((a, b) => (b[1] > a[1] ? b : a))[0];
  return others.filter(row => row.target === most).length / others.length;
}
