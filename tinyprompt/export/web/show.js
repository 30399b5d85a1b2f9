// Parts of the page that are redrawn often: bars, curves, and the views of the prompt.

import { chart, paths, squares } from "./draw.js";
import { directions, norm } from "./inside.js";

const WINDOW = 20; // steps over which the curve is averaged
const NEAR = 3; // pieces shown for each vector
export const at = id => document.getElementById(id);
const average = values => values.reduce((a, b) => a + b) / values.length;
const percent = share => (100 * share).toFixed(1) + "%";
const make = (name, text = "") => Object.assign(document.createElement(name), { textContent: text });

export function say(id, text, wrong = false) {
  at(id).textContent = text;
  at(id).className = wrong ? "wrong" : at(id).className.includes("small") ? "quiet small" : "quiet";
}

// Draw a bar for each word.
export function bars(words, shares) {
  const best = Math.max(...shares);
  at("answer").replaceChildren(
    ...words.map((word, i) => {
      const line = make("li");
      const track = make("i");
      const bar = make("b");
      line.className = shares[i] === best ? "best" : "";
      bar.style.width = percent(shares[i]);
      track.setAttribute("aria-hidden", "true");
      track.append(bar);
      line.append(make("span", word), make("span", percent(shares[i])), track);
      return line;
    }),
  );
}

// Draw the loss of each step, its mean over a window, and the accuracy on held-out rows. scores: [[step, share]].
export function curves({ losses, scores, majority }, steps) {
  const means = losses.slice(WINDOW - 1).map((_, i) => average(losses.slice(i, i + WINDOW)));
  const each = losses.map((loss, i) => [i + 1, loss]);
  const mean = means.map((loss, i) => [WINDOW + i, loss]);
  chart(
    at("curve"),
    [
      { kind: "each", points: each },
      { kind: "mean", points: mean },
    ],
    steps,
  );
  const told = losses.length
    ? `${losses[0].toFixed(2)} at the first, ${losses.at(-1).toFixed(2)} at step ${losses.length}`
    : "nothing yet";
  at("curve").setAttribute("aria-label", `The loss of each step: ${told}`);
  at("scores").toggleAttribute("hidden", majority === null);
  if (majority === null) return;
  const flat = {
    kind: "majority",
    points: [
      [1, majority],
      [steps, majority],
    ],
  };
  chart(at("scores"), [flat, { kind: "mean", points: scores, dots: true }], steps, 1);
  const last = scores.length ? `${scores.at(-1)[1].toFixed(3)} at step ${scores.at(-1)[0]}` : "nothing yet";
  at("scores").setAttribute("aria-label", `Accuracy: ${last}; majority class ${majority.toFixed(3)}`);
}

// Draw the views of the prompt. seen: the result of `Model.look`. path: the prompts so far, beginning with the first
// values. words: the labels from which the first vectors started. Return the directions of the picture, which the next
// call takes.
export function inside(model, seen, path, words, axes) {
  const [P, D] = model.prompt.shape;
  const near = model.nearest(seen.cosine, NEAR);
  const first = model.firstPieces;
  const now = near.map(([best]) => best.piece);
  const vector = (prompt, i) => prompt.subarray(i * D, (i + 1) * D);
  const moved = now.map((_, i) => {
    const [from, to] = [vector(path[0], i), vector(path.at(-1), i)];
    return norm(to.map((x, d) => x - from[d])) / norm(from);
  });
  at("nearest").replaceChildren(
    ...near.map((pieces, i) => {
      const row = make("tr");
      const words = make("td");
      pieces.forEach(({ piece, cosine }, k) => {
        words.append(k ? ", " : "", make(k ? "span" : "strong", piece), " ", make("small", cosine.toFixed(2)));
      });
      row.append(make("td", i + 1), make("td", first[i]), words, make("td", percent(moved[i])));
      return row;
    }),
  );
  const stayed = now.filter((piece, i) => piece === first[i]).length;
  const mean = average(near.map(([best]) => best.cosine));
  say(
    "stayed",
    `${stayed} of ${P} vectors are still nearest to the word that they began at. The mean cosine to the nearest word ` +
      `is ${mean.toFixed(2)}; that of a random vector is ${model.chance.toFixed(2)}. In ${D} dimensions, almost any two ` +
      "directions are nearly at a right angle. A vector that turns away from its word therefore comes near no other " +
      "word, and a label word stays near because the vector began at it.",
  );

  squares(at("attention"), seen.pieces, seen.attention);
  const total = seen.attention.reduce((sum, row) => sum + row.reduce((a, b) => a + b), 0) / seen.pieces.length;
  const sums = now.map((_, i) => seen.attention.reduce((sum, row) => sum + row[i], 0));
  const most = sums.indexOf(Math.max(...sums));
  const told = `The text gives ${percent(total)} of its attention to the prompt, most to vector ${most + 1}`;
  say(
    "attended",
    `${told}. A row for each token, a column for each vector: the mean over the encoder's layers and heads.`,
  );
  at("attention").setAttribute("aria-label", told);

  const plane = directions(
    path.flatMap(prompt => now.map((_, i) => vector(prompt, i))),
    axes,
  );
  const lines = now.map((_, i) => path.map((_, t) => plane.mapped[t * P + i]));
  paths(at("paths"), lines, words.slice(0, P));
  say(
    "plane",
    `Ring: first values. Dot: now. The plane is that of the two directions in which all these points differ most (PCA), ` +
      `with ${percent(plane.share)} of their variance. It changes as the paths grow.`,
  );
  at("paths").setAttribute("aria-label", `The paths of the vectors: moved by ${percent(average(moved))} in the mean`);
  return plane.axes;
}
