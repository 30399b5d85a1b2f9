// Drawings in SVG: line charts, a map of squares, paths in a plane. Does not depend on the page.

export function svg(name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
}

const points = list => list.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

// Return about five round numbers from 0 to at least the highest value.
export function ticks(highest) {
  const rough = highest / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = power * [1, 2, 5, 10].find(times => times * power >= rough * (1 - 1e-9));
  const digits = Math.max(0, -Math.floor(Math.log10(unit) + 1e-9));
  return Array.from({ length: Math.ceil(highest / unit - 1e-9) + 1 }, (_, i) => Number((i * unit).toFixed(digits)));
}

// Draw a chart over steps 1 to `steps`. lines: { kind, points: [[step, value]], dots }. The axis begins at 0 and ends
// above the highest value, or at `highest`.
export function chart(node, lines, steps, highest) {
  const { clientWidth: width, clientHeight: height } = node;
  const values = lines.flatMap(({ points }) => points.map(([, value]) => value));
  const marks = ticks(highest ?? (Math.max(0, ...values) || 1));
  const [left, right, top, bottom] = [14 + 7 * Math.max(...marks.map(mark => String(mark).length)), 10, 12, 24];
  const x = step => left + ((width - left - right) * (step - 1)) / Math.max(1, steps - 1);
  const y = value => height - bottom - ((height - top - bottom) * value) / marks.at(-1);
  node.replaceChildren(
    ...marks.map(mark => svg("line", { class: "grid", x1: left, x2: width - right, y1: y(mark), y2: y(mark) })),
    ...marks.map(mark => svg("text", { x: left - 6, y: y(mark) + 4, "text-anchor": "end" }, mark)),
    svg("text", { x: left, y: height - 4 }, "step 1"),
    svg("text", { x: width - right, y: height - 4, "text-anchor": "end" }, `step ${steps}`),
    ...lines.map(({ kind, points: list }) =>
      svg("polyline", { class: kind, points: points(list.map(([step, value]) => [x(step), y(value)])) }),
    ),
    ...lines.flatMap(({ kind, points: list, dots }) =>
      dots ? list.map(([step, value]) => svg("circle", { class: kind, cx: x(step), cy: y(value), r: 4 })) : [],
    ),
  );
}

// Draw a map of squares: a row per name, a numbered column per value. Greater values are darker.
export function squares(node, names, rows) {
  const { clientWidth: width } = node;
  const [left, top, high] = [Math.min(96, width / 4), 18, 16];
  const wide = (width - left - 6) / rows[0].length;
  const most = Math.max(...rows.flat());
  node.style.height = `${top + high * names.length + 2}px`;
  const shown = i => i === 0 || (i + 1) % 5 === 0;
  node.replaceChildren(
    ...rows[0].flatMap((_, i) =>
      shown(i) ? [svg("text", { x: left + wide * (i + 0.5), y: 12, "text-anchor": "middle" }, i + 1)] : [],
    ),
    ...names.map((name, i) =>
      svg(
        "text",
        { x: left - 8, y: top + high * i + 12, "text-anchor": "end" },
        name.length > 12 ? `${name.slice(0, 11)}…` : name,
      ),
    ),
    ...rows.flatMap((row, i) =>
      row.map((value, j) => {
        const cell = {
          class: "cell",
          x: left + wide * j + 0.5,
          y: top + high * i + 0.5,
          width: wide - 1,
          height: high - 1,
        };
        const square = svg("rect", { ...cell, "fill-opacity": (value / most).toFixed(3) });
        square.append(svg("title", {}, `${names[i]}, vector ${j + 1}: ${(100 * value).toFixed(1)}%`));
        return square;
      }),
    ),
  );
}

// Draw paths in a plane, [[x, y], ...] each, from a ring to a numbered dot; `names` label the first rings.
export function paths(node, list, names) {
  const { clientWidth: width, clientHeight: height } = node;
  const [xs, ys] = [0, 1].map(axis => list.flat().map(point => point[axis]));
  const [[x0, x1], [y0, y1]] = [xs, ys].map(values => [Math.min(...values), Math.max(...values)]);
  const scale = Math.min((width - 96) / (x1 - x0 || 1), (height - 48) / (y1 - y0 || 1)); // one scale for both axes
  const place = ([x, y]) => [width / 2 + (x - (x0 + x1) / 2) * scale, height / 2 - (y - (y0 + y1) / 2) * scale];
  const text = ([x, y], said, kind) => svg("text", { class: kind, x: x + 6, y: y + 4 }, said);
  const placed = list.map(path => path.map(place));
  node.replaceChildren(
    ...placed.map(path => svg("polyline", { class: "each", points: points(path) })),
    ...placed.map(([[cx, cy]]) => svg("circle", { class: "ring", cx, cy, r: 3.5 })),
    ...placed.map(path => svg("circle", { class: "dot", cx: path.at(-1)[0], cy: path.at(-1)[1], r: 3.5 })),
    ...placed.map((path, i) => text(path.at(-1), i + 1, "number")),
    ...names.map((name, i) => text([placed[i][0][0], placed[i][0][1] - 10], name, "name")),
  );
}
