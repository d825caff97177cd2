// The agents of a job: what each of them does in the open round, or how it ended.

import { h } from "./dom.js";
import { bar, chip, empty, table } from "./parts.js";
import * as text from "./text.js";

export function members(view, fleet, rounds, evaluations, now) {
  const names = Object.keys(view.members);
  if (!names.length)
    return empty(
      "No agent is in the job yet. Agents that are online, have its method and may train are asked by themselves: see the ",
      h("a", { href: "#/" }, "fleet"),
      ".",
    );
  const known = new Map(fleet.agents.map((agent) => [agent.id, agent]));
  const versions = Object.keys(evaluations)
    .map(Number)
    .sort((a, b) => b - a);
  const last = view.ended_at ? (rounds.at(-1)?.shares ?? {}) : {};
  const rows = names.map((agent) =>
    row(agent, view, known.get(agent), last[agent], versions.map((v) => evaluations[v][agent]).find(Boolean), now),
  );
  return table({
    id: `members ${view.name}`,
    label: "Agents of the job",
    rows,
    keyOf: (r) => r.agent,
    size: 25,
    columns: [
      {
        id: "agent",
        name: "Agent",
        value: (r) => r.agent,
        cell: (r) => h("a", { href: `#/agents/${encodeURIComponent(r.agent)}`, title: r.agent }, r.agent),
      },
      { id: "state", name: "State", value: (r) => r.state, cell: (r) => chip(r.state) },
      {
        id: "progress",
        name: "Progress",
        value: (r) => (r.total ? r.done / r.total : null),
        cell: (r) => (r.total ? [bar(r.done, r.total, `${r.agent}: ${r.told}`), ` ${r.told}`] : r.told),
      },
      {
        id: "loss",
        name: "Training",
        value: (r) => r.loss,
        kind: "number",
        rare: true,
        cell: (r) => text.loss(r.loss),
      },
      {
        id: "held",
        name: "Held-out",
        value: (r) => r.held,
        kind: "number",
        rare: true,
        cell: (r) => text.loss(r.held),
      },
      { id: "note", name: "Note", kind: "long", cell: (r) => r.note },
    ],
  });
}

function row(agent, view, seen, last, evaluated, now) {
  const member = view.members[agent];
  const share = view.current?.shares[agent];
  const base = {
    agent,
    state: "idle",
    done: 0,
    total: 0,
    told: "",
    loss: share?.loss ?? null,
    held: evaluated?.loss ?? null,
    note: "",
  };
  const away =
    seen && !seen.online && !view.ended_at ? `offline for ${text.duration(now - seen.since)}: ${seen.reason}` : "";
  if (member.excluded) return { ...base, state: "out", note: member.excluded };
  if (view.ended_at)
    return { ...base, state: last?.state ?? "idle", loss: last?.loss ?? null, note: last?.reason ?? "" };
  if (!share && member.survey && member.survey !== "DONE")
    return { ...base, state: away ? "offline" : "PREPARING", told: "survey", note: away };
  if (!share)
    return {
      ...base,
      state: away ? "offline" : "idle",
      note: away || (seen?.doing ?? "").replace(`${view.name}: `, ""),
    };
  const live =
    seen?.progress?.job === view.name && seen.progress.round === view.current.number ? seen.progress : share.progress;
  const note = [share.reason, away].filter(Boolean).join("; ");
  switch (share.state) {
    case "TRAINING":
      return {
        ...base,
        state: live?.phase === "paused" ? "paused" : share.state,
        loss: live?.loss ?? base.loss,
        done: live?.step ?? 0,
        total: live?.n_steps || share.n_steps,
        told: `${live?.step ?? 0}/${live?.n_steps || share.n_steps}`,
        note,
      };
    case "UPLOADING":
      return {
        ...base,
        state: share.state,
        done: share.bytes_up,
        total: share.size_up,
        told: `${text.size(share.bytes_up) || "0 B"} of ${text.size(share.size_up)}`,
        note,
      };
    case "DONE":
      return {
        ...base,
        state: share.state,
        told: share.train_s ? `trained ${text.duration(share.train_s)}` : "",
        note,
      };
    default:
      return { ...base, state: share.state, told: live?.phase ?? "", note };
  }
}
