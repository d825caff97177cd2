// All jobs, newest first, one line each.

import { bar, chip, empty, section, table } from "./parts.js";
import { h } from "./dom.js";
import * as text from "./text.js";

export const jobCells = (now) => [
  {
    id: "job",
    name: "Job",
    value: (job) => job.name,
    cell: (job) => h("a", { href: `#/jobs/${encodeURIComponent(job.name)}`, title: job.name }, job.name),
  },
  { id: "phase", name: "State", value: (job) => job.phase, cell: (job) => chip(job.phase) },
  {
    id: "round",
    name: "Rounds",
    value: (job) => job.round / job.n_rounds,
    kind: "number",
    cell: (job) => [
      bar(job.round, job.n_rounds, `${job.round} of ${job.n_rounds} rounds done`),
      ` ${job.round}/${job.n_rounds}`,
    ],
  },
  {
    id: "agents",
    name: "Done",
    value: (job) => job.n_done,
    kind: "number",
    rare: true,
    cell: (job) => (job.n_agents ? `${job.n_done} of ${job.n_agents}` : text.NONE),
  },
  {
    id: "version",
    name: "Version",
    value: (job) => job.version,
    kind: "number",
    rare: true,
    cell: (job) => (job.version ? String(job.version) : text.NONE),
  },
  {
    id: "age",
    name: "Age",
    value: (job) => now - job.submitted_at,
    kind: "number",
    cell: (job) => text.duration((job.ended_at || now) - job.submitted_at),
  },
  { id: "text", name: "Where it stands", kind: "long", rare: true, cell: (job) => job.text },
];

export function jobsPage({ fleet }, now) {
  const jobs = [...fleet.jobs].reverse();
  return [
    h("h1", { class: "hidden" }, "Jobs"),
    section(
      "jobs",
      "Jobs",
      jobs.length
        ? table({ id: "jobs", label: "Jobs", columns: jobCells(now), rows: jobs, keyOf: (job) => job.name })
        : empty("There is no job yet. Submit one: ", h("code", {}, "fedpipe submit job.toml")),
    ),
  ];
}
