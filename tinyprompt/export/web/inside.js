// Views of a prompt from the outputs of the graph `look`: nearest pieces, attention, directions. Does not depend on
// the page.

// Return, for each row, the k ids below `size` with the greatest cosines, best first: [{ id, cosine }, ...].
// values: (rows, columns).
export function nearest(values, columns, size, k) {
  return Array.from({ length: values.length / columns }, (_, row) => {
    const best = [];
    for (let id = 0; id < size; id++) {
      const cosine = values[row * columns + id];
      if (best.length === k && cosine <= best[k - 1].cosine) continue;
      best.splice(best.findLastIndex(one => one.cosine >= cosine) + 1, 0, { id, cosine });
      best.length = Math.min(best.length, k);
    }
    return best;
  });
}

function dot(a, b) {
  let sum = 0;
  for (let d = 0; d < a.length; d++) sum += a[d] * b[d];
  return sum;
}

export const norm = x => Math.sqrt(dot(x, x));

// Return the two directions of greatest variance (PCA), and their share of the variance.
// points: arrays of length D. Orthogonal iteration that starts at `before`, so that a picture does not flip.
export function directions(points, before) {
  const D = points[0].length;
  const mean = new Float64Array(D);
  for (const point of points) for (let d = 0; d < D; d++) mean[d] += point[d] / points.length;
  const centred = points.map(point => Float64Array.from(point, (x, d) => x - mean[d]));
  let axes = before ?? [0, 1].map(k => Float64Array.from({ length: D }, (_, d) => Math.cos((d + 1) * (k + 1))));
  for (let turn = 0; turn < (before ? 5 : 20); turn++) {
    const next = axes.map(() => new Float64Array(D));
    for (const point of centred)
      axes.forEach((axis, k) => {
        const along = dot(point, axis);
        for (let d = 0; d < D; d++) next[k][d] += along * point[d];
      });
    const along = dot(next[0], next[1]) / (dot(next[0], next[0]) || 1);
    next[1] = next[1].map((x, d) => x - along * next[0][d]);
    axes = next.map(axis => {
      const size = norm(axis) || 1;
      return axis.map(x => x / size);
    });
  }
  const total = centred.reduce((sum, point) => sum + dot(point, point), 0);
  const kept = centred.reduce((sum, point) => sum + axes.reduce((s, axis) => s + dot(point, axis) ** 2, 0), 0);
  const mapped = centred.map(point => axes.map(axis => dot(point, axis)));
  return { axes, share: kept / (total || 1), mapped };
}
