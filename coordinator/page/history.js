// What a job has behind it: rounds, versions, and what went wrong.

import { heldOut } from "./charts.js";
import { h } from "./dom.js";
import { address, hasToken, save } from "./link.js";
import { chip, confirm, empty, table } from "./parts.js";
import { wayBack } from "./steering.js";
import * as text from "./text.js";

const MAX_FAULTS = 100;

export function roundsTable(view, rounds, evaluations) {
  if (!rounds.length) return empty("No round has ended yet.");
  const held = Object.fromEntries(heldOut(evaluations).map((point) => [point.x, point.mean]));
  const rows = rounds.map((record, i) => {
    const shares = Object.values(record.shares);
    const total = (field) => shares.reduce((sum, share) => sum + share[field], 0);
    const gave = record.purpose === "train" && record.outcome === "aggregated";
    return {
      id: String(i),
      record,
      n: shares.length,
      done: shares.filter((share) => share.state === "DONE").length,
      samples: total("samples"),
      up: total("bytes_up"),
      down: total("bytes_down"),
      held: gave ? held[record.version + 1] : record.purpose === "train" ? undefined : held[record.version],
    };
  });
  return table({
    id: `rounds ${view.name}`,
    label: "Rounds",
    rows,
    keyOf: (r) => r.id,
    size: 50,
    initial: { by: "round", down: true },
    columns: [
      {
        id: "round",
        name: "Round",
        value: (r) => Number(r.id),
        cell: (r) =>
          r.record.purpose === "train"
            ? `${r.record.round}${r.record.attempt ? `, attempt ${r.record.attempt + 1}` : ""}`
            : "final",
      },
      {
        id: "outcome",
        name: "Outcome",
        kind: "long",
        cell: (r) => (r.record.purpose === "train" ? r.record.outcome : "measured"),
      },
      { id: "agents", name: "Done", value: (r) => r.done / r.n, kind: "number", cell: (r) => `${r.done} of ${r.n}` },
      {
        id: "samples",
        name: "Samples",
        value: (r) => r.samples,
        kind: "number",
        rare: true,
        cell: (r) => (r.samples ? text.count(r.samples) : text.NONE),
      },
      {
        id: "loss",
        name: "Training loss",
        value: (r) => r.record.loss,
        kind: "number",
        rare: true,
        cell: (r) => text.loss(r.record.loss),
      },
      { id: "held", name: "Held-out after", value: (r) => r.held, kind: "number", cell: (r) => text.loss(r.held) },
      {
        id: "up",
        name: "Up",
        value: (r) => r.up,
        kind: "number",
        rare: true,
        cell: (r) => text.size(r.up) || text.NONE,
      },
      {
        id: "down",
        name: "Down",
        value: (r) => r.down,
        kind: "number",
        rare: true,
        cell: (r) => text.size(r.down) || text.NONE,
      },
      {
        id: "time",
        name: "Time",
        value: (r) => r.record.wall_s,
        kind: "number",
        cell: (r) => text.duration(r.record.wall_s),
      },
    ],
  });
}

export function versionsTable(view) {
  if (!view.versions.length)
    return empty("There is no version yet: the first comes when the first round is aggregated.");
  return table({
    id: `versions ${view.name}`,
    label: "Versions",
    rows: view.versions,
    keyOf: (v) => String(v.version),
    size: 20,
    initial: { by: "version", down: true },
    columns: [
      {
        id: "version",
        name: "Version",
        value: (v) => v.version,
        kind: "loose",
        cell: (v) => (v.of ? `${v.version}, which is ${v.of}` : String(v.version)),
      },
      {
        id: "loss",
        name: "Held-out",
        value: (v) => v.loss,
        kind: "number",
        cell: (v) => `${text.loss(v.loss)}${v.n_evaluated ? ` (${v.n_evaluated})` : ""}`,
      },
      { id: "rank", name: "Rank", value: (v) => v.rank, kind: "number", rare: true, cell: (v) => String(v.rank) },
      {
        id: "size",
        name: "Size",
        value: (v) => v.size_bytes,
        kind: "number",
        rare: true,
        cell: (v) => text.size(v.size_bytes),
      },
      { id: "at", name: "Made", value: (v) => v.at, kind: "loose", rare: true, cell: (v) => text.moment(v.at) },
      { id: "get", name: "Adapter", cell: (v) => download(view.name, v.version) },
      { id: "back", name: "Rollback", cell: (v) => h("span", { class: "words" }, wayBack(view, v)) },
    ],
  });
}

function download(job, version) {
  const path = `jobs/${encodeURIComponent(job)}/adapter?version=${version}`;
  const name = `${job}-v${version}.tar`;
  const fetched = (event) => {
    event.preventDefault();
    event.target.setAttribute("aria-busy", "true");
    save(path, name)
      .catch((error) => confirm("No download", error.message, "Close"))
      .finally(() => event.target.removeAttribute("aria-busy"));
  };
  return h(
    "a",
    {
      href: address(path),
      download: name,
      "aria-label": `Download version ${version}`,
      onclick: hasToken() ? fetched : null,
    },
    "Download",
  );
}

export function faults(view, rounds) {
  const found = rounds.flatMap((record) =>
    Object.entries(record.shares)
      .filter(([, share]) => share.state !== "DONE")
      .map(([agent, share]) => ({
        where: record.purpose === "train" ? `round ${record.round}` : "final",
        agent,
        state: share.state,
        reason: share.reason,
      })),
  );
  found.push(
    ...Object.entries(view.current?.shares ?? {})
      .filter(([, share]) => ["FAILED", "REJECTED", "TIMED_OUT", "CANCELLED"].includes(share.state))
      .map(([agent, share]) => ({
        where: `round ${view.current.number}`,
        agent,
        state: share.state,
        reason: share.reason,
      })),
  );
  found.reverse();
  for (const [agent, member] of Object.entries(view.members)) {
    if (member.excluded) found.push({ where: "survey", agent, state: "out", reason: member.excluded });
    if (member.uncalibrated) found.push({ where: "survey", agent, state: "unmeasured", reason: member.uncalibrated });
  }
  if (!found.length) return empty("Nothing so far.");
  return [
    h(
      "ul",
      { class: "faults" },
      found
        .slice(0, MAX_FAULTS)
        .map((one) =>
          h(
            "li",
            {},
            h("span", { class: "soft" }, one.where),
            h("strong", {}, one.agent),
            chip(one.state),
            h("span", {}, one.reason),
          ),
        ),
    ),
    found.length > MAX_FAULTS ? h("p", { class: "soft" }, `and ${text.count(found.length - MAX_FAULTS)} more`) : null,
  ];
}
