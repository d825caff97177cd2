// One round as it went for every agent: receiving and loading, training, uploading, waiting for the others.

import { h } from "./dom.js";
import { choiceField, empty, look, wide } from "./parts.js";
import { NARROW, ticks } from "./charts.js";
import * as text from "./text.js";

const ROWS = 40;
const [NAME, ROW, TOP] = [132, 20, 22];
const KINDS = [
  ["receive", "receives and loads the model, measures it"],
  ["train", "trains"],
  ["upload", "uploads"],
  ["wait", "waits for the others"],
];
const SHAPE = { receive: [5, 8], train: [2, 14], upload: [5, 8], wait: [8.5, 1.5] }; // top and height: no kind by colour alone

// [kind, from, to] of one share, in seconds since the round opened.
export function parts(share, opened_at, end) {
  if (!share.assigned_at) return [];
  const { TRAINING: training, UPLOADING: uploading } = share.entered ?? {};
  const ended = share.ended_at || end;
  const marks = [
    ["receive", share.assigned_at],
    ["train", training],
    ["upload", uploading],
    ["wait", share.ended_at || undefined],
  ].filter(([, at]) => at);
  return marks
    .map(([kind, from], i) => [kind, from, marks[i + 1]?.[1] ?? (kind === "wait" ? end : ended)])
    .map(([kind, from, to]) => [kind, Math.max(0, from - opened_at), Math.max(0, Math.min(to, end) - opened_at)])
    .filter(([, from, to]) => to > from);
}

export function timeline(job, now) {
  const { view, rounds, name } = job;
  const all = rounds.map((r, i) => ({
    id: String(i),
    label: label(r, r.outcome),
    opened_at: r.opened_at,
    end: r.opened_at + r.wall_s,
    shares: r.shares,
  }));
  const open = view.current;
  if (open)
    all.push({
      id: String(rounds.length),
      label: label({ ...open, round: open.number }, "under way"),
      opened_at: open.opened_at,
      end: now,
      shares: open.shares,
    });
  if (!all.length) return empty("No round has begun yet.");
  const way = look(`timeline ${name}`, { round: "" });
  const round = all.find((one) => one.id === way.round) ?? all.at(-1);
  const agents = Object.keys(round.shares).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const n_pages = Math.ceil(agents.length / ROWS);
  const from = ROWS * Math.min(way.page, Math.max(0, n_pages - 1));
  return [
    h(
      "div",
      { class: "fields" },
      choiceField(
        "timeline-round",
        "Round",
        [...all]
          .reverse()
          .slice(0, 200)
          .map((one) => [one.id, one.label]),
        round.id,
        (value) => Object.assign(way, { round: value === all.at(-1).id ? "" : value, page: 0 }),
      ),
      n_pages > 1
        ? choiceField(
            "timeline-agents",
            "Agents",
            Array.from({ length: n_pages }, (_, i) => [
              String(i),
              `${agents[i * ROWS]} to ${agents[Math.min(agents.length, (i + 1) * ROWS) - 1]}`,
            ]),
            String(from / ROWS),
            (value) => Object.assign(way, { page: Number(value) }),
          )
        : null,
    ),
    wide("Timeline", picture(round, agents.slice(from, from + ROWS))),
    h(
      "p",
      { class: "legend" },
      KINDS.map(([kind, words]) =>
        h(
          "span",
          { class: "key" },
          h(
            "svg",
            { viewBox: "0 0 22 18", "aria-hidden": "true" },
            h("rect", { class: `part ${kind}`, x: 0, width: 22, y: SHAPE[kind][0], height: SHAPE[kind][1] }),
          ),
          words,
        ),
      ),
    ),
  ];
}

function label(round, outcome) {
  const which = round.purpose === "train" ? `round ${round.round}` : "final measurement";
  const attempt = round.attempt ? `, attempt ${round.attempt + 1}` : "";
  return `${which}${attempt}: ${outcome.length > 40 ? `${outcome.slice(0, 40)}…` : outcome}`;
}

function picture(round, agents) {
  const WIDTH = innerWidth < NARROW ? 640 : 1280;
  const total = Math.max(0.001, round.end - round.opened_at);
  const X = (s) => NAME + (s / total) * (WIDTH - NAME - 90);
  const bottom = TOP + ROW * agents.length;
  return h(
    "svg",
    {
      class: "timeline",
      viewBox: `0 0 ${WIDTH} ${bottom + 4}`,
      role: "img",
      "aria-label": `${round.label}, ${text.duration(total)} long, ${text.some(Object.keys(round.shares).length, "agent")}`,
    },
    ticks(0, total, 6).map((s) => [
      h("line", { class: "grid", x1: X(s), x2: X(s), y1: TOP - 4, y2: bottom }),
      h("text", { x: X(s), y: 12, "text-anchor": "middle" }, s < 60 ? `${s} s` : text.duration(s)),
    ]),
    agents.map((agent, i) =>
      h(
        "g",
        { transform: `translate(0 ${TOP + ROW * i})` },
        h(
          "text",
          { x: NAME - 8, y: 13, "text-anchor": "end", class: "name" },
          h("title", {}, agent),
          agent.length > 18 ? `${agent.slice(0, 17)}…` : agent,
        ),
        bars(round.shares[agent], round, X),
        h("text", { x: WIDTH - 84, y: 13, class: "state" }, text.words(round.shares[agent].state)),
      ),
    ),
  );
}

function bars(share, round, X) {
  const found = parts(share, round.opened_at, round.end);
  if (!found.length)
    return h(
      "text",
      { x: X(0) + 4, y: 13, class: "none" },
      share.state === "DONE" ? "from an earlier attempt" : "not recorded",
    );
  return found.map(([kind, from, to]) => {
    const wide_px = X(to) - X(from);
    const told = `${kind} ${text.duration(to - from)}`;
    return [
      h(
        "rect",
        {
          class: `part ${kind}`,
          x: X(from).toFixed(1),
          width: Math.max(1, wide_px).toFixed(1),
          y: SHAPE[kind][0],
          height: SHAPE[kind][1],
        },
        h("title", {}, told),
      ),
      kind === "train" && wide_px > 90
        ? h("text", { class: "inside", x: (X(from) + 6).toFixed(1), y: 13 }, told)
        : null,
    ];
  });
}
