// The plan: what each agent shall do and why, and the rank of every matrix as a map of layers and kinds.

import { h } from "./dom.js";
import { choiceField, empty, figure, figures, look, table, wide } from "./parts.js";
import * as text from "./text.js";

const [CELL, ROW, LEFT, TOP] = [34, 16, 34, 20];
const FLEET = "";

// Mean rank of each cell's matrices over `plans` (matrix -> rank, one per agent), 0 for one that is not trained.
export function cells(plan, plans) {
  const found = new Map();
  plan.matrices.forEach((name, i) => {
    const [row, column] = plan.places[i];
    const at = `${row}/${column}`;
    if (!found.has(at)) found.set(at, { row, column, ranks: [] });
    for (const ranks of plans) found.get(at).ranks.push(ranks[name] ?? 0);
  });
  return [...found.values()].map(({ row, column, ranks }) => ({
    row,
    column,
    rank: text.mean(ranks) ?? 0,
    n: ranks.filter((rank) => rank > 0).length,
    of: ranks.length,
  }));
}

function heatMap(plan, chosen) {
  const plans = Object.entries(plan.agents)
    .filter(([agent]) => chosen === FLEET || agent === chosen)
    .map(([, one]) => one.choice.ranks);
  let top = 1;
  for (const one of Object.values(plan.agents))
    for (const rank of Object.values(one.choice.ranks)) top = Math.max(top, rank);
  const width = LEFT + CELL * plan.kinds.length;
  const height = TOP + ROW * plan.layers.length;
  return h(
    "svg",
    {
      class: "heat",
      viewBox: `0 0 ${width} ${height}`,
      width,
      height,
      role: "img",
      "aria-label": `Rank of each kind of matrix in each layer, ${chosen || "mean over the fleet"}; the highest is ${top}`,
    },
    plan.kinds.map((kind, x) =>
      h(
        "text",
        { x: LEFT + (x + 0.5) * CELL, y: 12, "text-anchor": "middle" },
        kind.length > 6 ? `${kind.slice(0, 5)}…` : kind,
        h("title", {}, kind),
      ),
    ),
    plan.layers.map((layer, y) =>
      h(
        "text",
        { x: LEFT - 6, y: TOP + y * ROW + 11.5, "text-anchor": "end" },
        layer === null ? text.NONE : String(layer),
      ),
    ),
    cells(plan, plans).map(({ row, column, rank, n, of }) => {
      const strength = Math.log2(1 + rank) / Math.log2(1 + top);
      const [x, y] = [LEFT + column * CELL, TOP + row * ROW];
      return [
        h(
          "rect",
          {
            class: rank > 0 ? "cell" : "cell none",
            x,
            y,
            width: CELL - 1,
            height: ROW - 1,
            rx: 2,
            "fill-opacity": rank > 0 ? (0.12 + 0.88 * strength).toFixed(2) : null,
          },
          h(
            "title",
            {},
            `layer ${plan.layers[row] ?? text.NONE}, ${plan.kinds[column]}: rank ${text.rank(rank)}`,
            of > 1 ? `, trained in ${n} of ${of}` : "",
          ),
        ),
        h(
          "text",
          { class: strength > 0.55 ? "high" : null, x: x + (CELL - 1) / 2, y: y + 11.5, "text-anchor": "middle" },
          text.rank(rank),
        ),
      ];
    }),
  );
}

const sum = (ranks) => Object.values(ranks).reduce((all, rank) => all + rank, 0);
const measured = (one) => one.past.findLast((share) => share.step_s > 0);

function columns(way) {
  const pick = (agent) =>
    h(
      "button",
      {
        class: "pick",
        title: agent,
        "aria-pressed": String(way.agent === agent),
        onclick: () => {
          way.agent = way.agent === agent ? FLEET : agent;
          document.dispatchEvent(new Event("redraw"));
        },
      },
      agent,
    );
  const predicted = (one, field, show) => (one.choice.predicted ? show(one.choice.predicted[field]) : text.NONE);
  return [
    { id: "agent", name: "Agent", value: ([agent]) => agent, cell: ([agent]) => pick(agent) },
    { id: "bits", name: "Base", value: ([, one]) => one.choice.bits, cell: ([, one]) => one.choice.bits },
    {
      id: "ranks",
      name: "Ranks",
      value: ([, one]) => sum(one.choice.ranks),
      kind: "number",
      cell: ([, one]) => `${text.count(sum(one.choice.ranks))} in ${Object.keys(one.choice.ranks).length}`,
    },
    {
      id: "steps",
      name: "Steps × batch",
      value: ([, one]) => one.choice.n_steps * one.choice.batch * one.choice.accumulation,
      kind: "number",
      cell: ([, one]) => `${one.choice.n_steps} × ${one.choice.batch * one.choice.accumulation}`,
    },
    {
      id: "memory",
      name: "Memory",
      value: ([, one]) => one.choice.predicted?.peak_bytes,
      kind: "number",
      rare: true,
      cell: ([, one]) => predicted(one, "peak_bytes", text.size),
    },
    {
      id: "time",
      name: "Training",
      value: ([, one]) => one.choice.predicted?.train_s,
      kind: "number",
      rare: true,
      cell: ([, one]) => predicted(one, "train_s", text.duration),
    },
    {
      id: "step",
      name: "Step",
      value: ([, one]) => measured(one)?.step_s,
      kind: "number",
      rare: true,
      cell: ([, one]) => (measured(one) ? `${measured(one).step_s.toPrecision(3)} s` : text.NONE),
    },
    {
      id: "limit",
      name: "Limit",
      value: ([, one]) => one.choice.limit,
      cell: ([, one]) => one.choice.limit || text.NONE,
    },
    { id: "why", name: "Why", kind: "long", rare: true, cell: ([, one]) => one.choice.why },
  ];
}

export function planPart(job) {
  const { plan, name, view } = job;
  if (!plan)
    return empty(
      view.has_plan
        ? "Reading the plan…"
        : view.ended_at
          ? "The job ended before it had a plan."
          : "There is no plan yet: it is made when enough agents have answered the survey.",
    );
  const way = look(`plan ${name}`, { agent: FLEET });
  if (!(way.agent in plan.agents)) way.agent = FLEET;
  const agents = Object.entries(plan.agents);
  const left = Object.entries(plan.left_out);
  return [
    h(
      "p",
      { class: "soft" },
      `Made for round ${plan.round}${plan.reason ? `: ${plan.reason}` : ""}.`,
      plan.pinned ? " The job file decides everything." : "",
    ),
    figures(
      figure("Training of a round", plan.train_s === null ? "no limit" : text.duration(plan.train_s)),
      figure("A whole round", plan.round_s ? text.duration(plan.round_s) : text.NONE, "predicted"),
      figure("Transfers of it", plan.transfer_s ? text.duration(plan.transfer_s) : text.NONE, "predicted"),
      figure(
        "Planned but not trained",
        plan.under_training === null ? text.NONE : text.percent(plan.under_training),
        "so far",
      ),
    ),
    h(
      "div",
      { class: "pair" },
      h(
        "div",
        {},
        table({
          id: `plan ${name}`,
          label: "Plan of each agent",
          columns: columns(way),
          rows: agents,
          keyOf: ([agent]) => agent,
          size: 25,
        }),
        left.length
          ? h(
              "details",
              {},
              h("summary", {}, `${text.some(left.length, "agent")} left out`),
              h(
                "ul",
                {},
                left.slice(0, 200).map(([agent, why]) => h("li", {}, `${agent}: ${why}`)),
              ),
            )
          : null,
        plan.notes.length
          ? h(
              "ul",
              { class: "soft" },
              plan.notes.map((note) => h("li", {}, note)),
            )
          : null,
      ),
      h(
        "div",
        { class: "map" },
        choiceField(
          "map-agent",
          "Rank of each matrix",
          [[FLEET, "mean over the fleet"], ...agents.slice(0, 500).map(([agent]) => [agent, agent])],
          way.agent,
          (value) => Object.assign(way, { agent: value }),
        ),
        plan.kinds?.length
          ? wide("Rank map", heatMap(plan, way.agent))
          : empty("This coordinator does not tell where the matrices belong."),
        h("p", { class: "soft" }, "rows: layers; ·: not trained"),
      ),
    ),
  ];
}
