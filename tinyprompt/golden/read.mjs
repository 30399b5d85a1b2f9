// Read a safetensors file: name, type, shape and sum of every array.
// node read.mjs FILE
import { readFileSync } from "node:fs";
import { argv } from "node:process";
import { pathToFileURL } from "node:url";

const KINDS = { F64: Float64Array, F32: Float32Array, I64: BigInt64Array };

// Returns { name: { kind, shape, numbers } }; the numbers are a typed array in the order of C.
export function read(path) {
  const { buffer, byteOffset, length: size } = readFileSync(path);
  const content = buffer.slice(byteOffset, byteOffset + size); // aligned
  const length = Number(new DataView(content).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(content.slice(8, 8 + length)));
  delete header.__metadata__;
  return Object.fromEntries(Object.entries(header).map(([name, entry]) => {
    const [start, end] = entry.data_offsets.map(at => 8 + length + at);
    return [name, { kind: entry.dtype, shape: entry.shape, numbers: new KINDS[entry.dtype](content.slice(start, end)) }];
  }));
}

if (import.meta.url === pathToFileURL(argv[1] ?? "").href)
  for (const [name, { kind, shape, numbers }] of Object.entries(read(argv[2]))) {
    const total = numbers.reduce((sum, x) => sum + Number(x), 0);
    console.log(`${name} ${kind} [${shape.join(", ")}] ${total.toExponential(12)}`);
  }
