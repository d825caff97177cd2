// The fleet: every agent with what it has and what it does or why it does nothing; and one agent alone.

import { h } from "./dom.js";
import { certificate } from "./enrolments.js";
import { jobCells } from "./jobs.js";
import { chip, choiceField, empty, figure, figures, filterField, look, section, table } from "./parts.js";
import * as text from "./text.js";

// ------------------------------------------------------------------------------------------------------- what is known

export function agentState(agent) {
  if (!agent.online) return "offline";
  if (agent.report?.allowance?.paused) return "paused";
  return agent.task ? "at work" : "idle";
}

const gpuOf = (agent) => {
  const { gpus = [], allowance } = agent.report ?? {};
  return gpus.find((gpu) => gpu.name === allowance?.device) ?? (allowance ? undefined : gpus[0]);
};

function device(agent) {
  if (!agent.report) return "";
  const { gpus = [], n_cpus } = agent.report;
  const gpu = gpuOf(agent);
  return gpu ? (gpus.length > 1 ? `${gpus.length} × ` : "") + gpu.name : `CPU, ${text.some(n_cpus, "core")}`;
}

function free(agent) {
  const gpu = gpuOf(agent);
  return gpu ? [gpu.free_bytes, gpu.total_bytes] : [agent.report?.ram_available_bytes, agent.report?.ram_total_bytes];
}

const speed = (bytes_per_s) => (bytes_per_s > 0 ? `${text.size(bytes_per_s)}/s` : text.NONE);
const linkOf = (agent) =>
  agent.report && (agent.report.down_bytes_per_s || agent.report.up_bytes_per_s)
    ? `↓ ${speed(agent.report.down_bytes_per_s)}  ↑ ${speed(agent.report.up_bytes_per_s)}`
    : text.NONE;
const seen = (agent, now) => now - (agent.heard_at ?? (agent.online ? NaN : agent.since));

function doing(agent) {
  if (!agent.online) return agent.reason || "no connection";
  const { progress } = agent;
  const live = progress && agent.task && progress.job === agent.task && progress.n_steps;
  return live
    ? agent.doing.replace(/[a-z]+ \d+\/\d+/, `${progress.phase} ${progress.step}/${progress.n_steps}`)
    : agent.doing;
}

// --------------------------------------------------------------------------------------------------------------- page

function columns(now) {
  return [
    {
      id: "id",
      name: "Agent",
      value: (a) => a.id,
      cell: (a) => h("a", { href: `#/agents/${encodeURIComponent(a.id)}`, title: a.id }, a.id),
    },
    { id: "state", name: "State", value: agentState, cell: (a) => chip(agentState(a)) },
    { id: "doing", name: "Does now, or why not", value: doing, kind: "long", cell: (a) => doing(a) },
    { id: "device", name: "Device", value: device, cell: device, rare: true },
    {
      id: "free",
      name: "Free memory",
      value: (a) => free(a)[0],
      kind: "number",
      rare: true,
      cell: (a) => (free(a)[1] ? `${text.size(free(a)[0])} of ${text.size(free(a)[1])}` : text.NONE),
    },
    {
      id: "may",
      name: "May take",
      value: (a) => a.report?.allowance?.memory_bytes,
      kind: "number",
      rare: true,
      cell: (a) => text.size(a.report?.allowance?.memory_bytes) || text.NONE,
    },
    {
      id: "link",
      name: "Link",
      value: (a) => a.report?.up_bytes_per_s || null,
      kind: "number",
      rare: true,
      cell: linkOf,
    },
    {
      id: "seen",
      name: "Last seen",
      value: (a) => seen(a, now),
      kind: "number",
      rare: true,
      cell: (a) => text.ago(seen(a, now)),
    },
  ];
}

const STATES = ["at work", "idle", "paused", "offline"];

export function fleetPage({ fleet }, now) {
  const { agents } = fleet;
  const way = look("agents", { by: "id" });
  const n = Object.fromEntries(
    STATES.map((state) => [state, agents.filter((agent) => agentState(agent) === state).length]),
  );
  const wanted = way.filter.toLowerCase();
  const rows = agents.filter(
    (a) =>
      (!way.only || agentState(a) === way.only) &&
      (!wanted || [a.id, agentState(a), device(a), doing(a)].join(" ").toLowerCase().includes(wanted)),
  );
  const going = fleet.jobs.filter((job) => !job.ended_at);
  return [
    h("h1", { class: "hidden" }, "Fleet"),
    figures(
      figure("Agents online", text.count(agents.length - n.offline), `of ${text.count(agents.length)}`),
      figure("At work", text.count(n["at work"]), n.paused ? `${text.count(n.paused)} paused` : null),
      figure("With a GPU", text.count(agents.filter((agent) => agent.online && gpuOf(agent)).length), "online"),
      figure("Jobs under way", text.count(going.length), `of ${text.count(fleet.jobs.length)}`),
      figure(
        "Traffic since restart",
        text.size(fleet.sent_bytes + fleet.received_bytes) || "0 B",
        `↓ ${text.size(fleet.sent_bytes) || "0 B"}  ↑ ${text.size(fleet.received_bytes) || "0 B"}`,
      ),
    ),
    going.length
      ? section(
          "going",
          "Jobs under way",
          table({
            id: "going-jobs",
            label: "Jobs under way",
            columns: jobCells(now),
            rows: going,
            keyOf: (job) => job.name,
            size: 10,
          }),
        )
      : null,
    section(
      "agents",
      "Agents",
      agents.length
        ? [
            h(
              "div",
              { class: "fields" },
              filterField("agents-filter", way, "Filter"),
              choiceField(
                "agents-state",
                "State",
                [["", `all (${agents.length})`], ...STATES.map((s) => [s, `${s} (${n[s]})`])],
                way.only,
                (value) => Object.assign(way, { only: value, page: 0 }),
              ),
            ),
            rows.length
              ? table({ id: "agents", label: "Agents", columns: columns(now), rows, keyOf: (a) => a.id })
              : empty("No agent fits the filter."),
          ]
        : empty(
            "No agent has ever said that it is there. Start one on an edge server: ",
            h("code", {}, "fedpipe-agent run --config agent.toml"),
          ),
    ),
    Object.keys(fleet.counts).length
      ? section(
          "counts",
          "Refused and repeated",
          h("p", { class: "soft" }, "What peers did wrong or twice, since the fleet began."),
          h(
            "ul",
            { class: "counts" },
            Object.entries(fleet.counts)
              .sort()
              .map(([kind, value]) => h("li", {}, `${text.words(kind)} `, h("strong", {}, text.count(value)))),
          ),
        )
      : null,
  ];
}

const allowed = ({ memory_bytes, max_rank, max_batch }) =>
  `${text.size(memory_bytes) || "nothing"}, rank to ${max_rank}, batch to ${max_batch}`;

export function agentPage({ fleet, enrolments }, now, name) {
  const agent = fleet.agents.find((one) => one.id === name);
  if (!agent)
    return [h("h1", {}, name), empty("No agent of this name was ever seen. ", h("a", { href: "#/" }, "To the fleet"))];
  const report = agent.report;
  const row = (label, value) => (value ? [h("dt", {}, label), h("dd", {}, value)] : null);
  return [
    h("p", { class: "crumbs" }, h("a", { href: "#/" }, "Fleet")),
    h(
      "div",
      { class: "head" },
      h("h1", {}, agent.id),
      chip(agentState(agent)),
      h("span", { class: "soft" }, doing(agent)),
    ),
    h(
      "dl",
      { class: "facts" },
      row(agent.online ? "Online since" : "Offline since", agent.since ? text.moment(agent.since) : ""),
      row("Last seen", text.ago(seen(agent, now))),
      row("Works for", agent.task ? h("a", { href: `#/jobs/${encodeURIComponent(agent.task)}` }, agent.task) : ""),
      row(
        "Certificate ends",
        enrolments
          ? certificate(
              enrolments.find((one) => one.agent === name),
              now,
            )
          : "",
      ),
      row("Software", agent.software),
      row("Methods", agent.methods.join(", ")),
      report
        ? [
            row("Trains on", report.allowance?.device ?? ""),
            row("May take", report.allowance ? allowed(report.allowance) : ""),
            row("Paused", report.allowance?.paused),
            row("CPUs", `${report.n_cpus}, load ${text.percent(report.cpu_load_ratio)}`),
            row("Memory", `${text.size(report.ram_available_bytes)} free of ${text.size(report.ram_total_bytes)}`),
            row("Disk", text.size(report.disk_free_bytes) ? `${text.size(report.disk_free_bytes)} free` : ""),
            row("Link", linkOf(agent)),
            row("Driver", report.driver),
            row("Widths of the base", report.bits.join(", ")),
            row(
              "Notes",
              report.notes.length
                ? h(
                    "ul",
                    {},
                    report.notes.map((note) => h("li", {}, note)),
                  )
                : "",
            ),
          ]
        : row("Report", "none yet"),
    ),
    report?.gpus.length
      ? section(
          "gpus",
          "GPUs",
          table({
            id: "gpus",
            label: "GPUs",
            keyOf: (gpu) => String(gpu.index),
            rows: report.gpus,
            columns: [
              { id: "gpu", name: "GPU", cell: (g) => `${g.index}: ${g.name}` },
              {
                id: "free",
                name: "Free",
                kind: "number",
                cell: (g) => `${text.size(g.free_bytes)} of ${text.size(g.total_bytes)}`,
              },
              { id: "busy", name: "Busy", kind: "number", cell: (g) => text.percent(g.utilization_ratio) },
              { id: "others", name: "Other processes", kind: "number", cell: (g) => text.count(g.n_other_processes) },
              {
                id: "power",
                name: "Power",
                kind: "number",
                cell: (g) => (g.power_w ? `${g.power_w.toFixed(0)} W` : text.NONE),
              },
              {
                id: "heat",
                name: "Temperature",
                kind: "number",
                cell: (g) => (g.temperature_c ? `${g.temperature_c.toFixed(0)} °C` : text.NONE),
              },
            ],
          }),
        )
      : null,
  ];
}
