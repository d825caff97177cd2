// The loss over the rounds, as a picture: mean and span over the agents of what they hold out, and what they train on.

import { h } from "./dom.js";
import { redraw } from "./parts.js";
import * as text from "./text.js";

const HEIGHT = 240;
export const NARROW = 640; // of the window: there the picture is drawn smaller, so that its words are not
const EDGE = { left: 46, right: 12, top: 12, bottom: 34 };

// Round numbers that cut [low, high] into about n parts.
export function ticks(low, high, n) {
  const rough = (high - low || 1) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((size) => size >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}

// Of each measured version: mean, lowest and highest of the agents' held-out losses.
export function heldOut(evaluations) {
  return Object.entries(evaluations)
    .map(([version, by]) => {
      const losses = Object.values(by)
        .map((found) => found.loss)
        .filter(Number.isFinite);
      return {
        x: Number(version),
        mean: text.mean(losses),
        low: Math.min(...losses),
        high: Math.max(...losses),
        n: losses.length,
      };
    })
    .filter((point) => point.n)
    .sort((a, b) => a.x - b.x);
}

// The same of those agents alone that measured both the first version and the last: else a mean moves because somebody came
// or went.  Where there is no such agent: what was measured of the last.
export function comparable(evaluations) {
  const versions = Object.keys(evaluations)
    .map(Number)
    .sort((a, b) => a - b);
  if (!versions.length) return {};
  const [first, last] = [evaluations[versions[0]], evaluations[versions.at(-1)]];
  const both = ([agent]) => agent in first && agent in last;
  if (!Object.entries(last).some(both)) return { [versions.at(-1)]: last };
  return Object.fromEntries(
    versions.map((version) => [version, Object.fromEntries(Object.entries(evaluations[version]).filter(both))]),
  );
}

// Training loss of each round that gave a version, at the version that it gave.
export const trained = (rounds) =>
  rounds
    .filter((r) => r.purpose === "train" && r.outcome === "aggregated" && Number.isFinite(r.loss))
    .map((r) => ({ x: r.version + 1, mean: r.loss }));

const at = (point) => `${text.loss(point.mean)} at version ${point.x}`;

function reading(held, train) {
  const span = `${text.loss(held.low)} to ${text.loss(held.high)}, ${text.some(held.n, "agent")}`;
  return `version ${held.x}: held-out ${text.loss(held.mean)} (${span})${train ? `, training ${text.loss(train.mean)}` : ""}`;
}

let pointed = null; // the version under the reader's pointer

export function lossChart(evaluations, rounds, n_rounds) {
  const WIDTH = innerWidth < NARROW ? 330 : 640;
  const [held, train] = [heldOut(evaluations), trained(rounds)];
  const all = [...held.flatMap((p) => [p.low, p.high]), ...train.map((p) => p.mean)];
  const [least, most] = [Math.min(...all), Math.max(...all)];
  const room = (most - least) * 0.06 || 0.1;
  const [low, high] = [Math.max(0, least - room), most + room];
  const last = Math.max(n_rounds, ...[...held, ...train].map((p) => p.x), 1);
  const X = (x) => EDGE.left + (x / last) * (WIDTH - EDGE.left - EDGE.right);
  const Y = (y) => EDGE.top + ((high - y) / (high - low)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const path = (points, y) =>
    points.map((p, i) => `${i ? "L" : "M"}${X(p.x).toFixed(1)} ${Y(p[y]).toFixed(1)}`).join("");
  const band = held.length > 1 ? `${path(held, "high")}${path([...held].reverse(), "low").replace("M", "L")}Z` : "";
  const few = held.length + train.length <= 80;
  const bottom = HEIGHT - EDGE.bottom;
  const shown = held.find((p) => p.x === pointed) ?? held.at(-1);
  const beside = train.find((p) => p.x === shown?.x);
  const point = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const x =
      ((((event.clientX - box.left) / box.width) * WIDTH - EDGE.left) / (WIDTH - EDGE.left - EDGE.right)) * last;
    const nearest = held.reduce((best, p) => (Math.abs(p.x - x) < Math.abs(best.x - x) ? p : best), held[0]);
    if (nearest && pointed !== nearest.x) {
      pointed = nearest.x;
      redraw();
    }
  };
  const leave = () => {
    pointed = null;
    redraw();
  };
  const ends = held.length
    ? `Held-out loss, mean over agents: ${at(held[0])}, ${at(held.at(-1))}.`
    : "No held-out loss yet.";
  return h(
    "figure",
    { class: "chart" },
    h(
      "svg",
      {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
        role: "img",
        "aria-label": `Loss over versions. ${ends}`,
        onpointermove: point,
        onpointerleave: leave,
      },
      ticks(low, high, 4).map((y) => [
        h("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: Y(y), y2: Y(y) }),
        h("text", { x: EDGE.left - 6, y: Y(y) + 3.5, "text-anchor": "end" }, String(y)),
      ]),
      ticks(0, last, Math.min(last, WIDTH / 64))
        .filter(Number.isInteger)
        .map((x) => h("text", { x: X(x), y: bottom + 15, "text-anchor": "middle" }, String(x))),
      h(
        "text",
        { x: (EDGE.left + WIDTH - EDGE.right) / 2, y: HEIGHT - 4, "text-anchor": "middle" },
        "version (0: the base alone)",
      ),
      band ? h("path", { class: "band", d: band }) : null,
      shown ? h("line", { class: "cursor", x1: X(shown.x), x2: X(shown.x), y1: EDGE.top, y2: bottom }) : null,
      h("path", { class: "train", d: path(train, "mean") }),
      h("path", { class: "held", d: path(held, "mean") }),
      few
        ? train.map((p) => h("rect", { class: "train-mark", x: X(p.x) - 2.5, y: Y(p.mean) - 2.5, width: 5, height: 5 }))
        : null,
      few ? held.map((p) => h("circle", { class: "held-mark", cx: X(p.x), cy: Y(p.mean), r: 3 })) : null,
    ),
    h(
      "figcaption",
      {},
      h(
        "span",
        { class: "key held" },
        h(
          "svg",
          { viewBox: "0 0 22 8", "aria-hidden": "true" },
          h("line", { class: "held", x1: 0, x2: 22, y1: 4, y2: 4 }),
          h("circle", { class: "held-mark", cx: 11, cy: 4, r: 3 }),
        ),
        "held-out, mean",
      ),
      h(
        "span",
        { class: "key" },
        h("svg", { viewBox: "0 0 22 8", "aria-hidden": "true" }, h("rect", { class: "band", width: 22, height: 8 })),
        "lowest to highest agent",
      ),
      h(
        "span",
        { class: "key" },
        h(
          "svg",
          { viewBox: "0 0 22 8", "aria-hidden": "true" },
          h("line", { class: "train", x1: 0, x2: 22, y1: 4, y2: 4 }),
          h("rect", { class: "train-mark", x: 8.5, y: 1.5, width: 5, height: 5 }),
        ),
        "training",
      ),
      shown ? h("span", { class: "reading" }, reading(shown, beside)) : null,
    ),
  );
}
