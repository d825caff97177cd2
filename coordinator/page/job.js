// One job: where it stands, how well it does, who does what, what it cost, what went wrong.

import { comparable, heldOut, lossChart, trained } from "./charts.js";
import { h } from "./dom.js";
import { eventLines } from "./events.js";
import { faults, roundsTable, versionsTable } from "./history.js";
import { members } from "./members.js";
import { bar, chip, empty, figure, figures, section } from "./parts.js";
import { planPart } from "./ranks.js";
import { controls } from "./steering.js";
import * as text from "./text.js";
import { timeline } from "./timeline.js";

export function jobPage({ fleet, job, log }, now, name) {
  if (job?.missing) return [h("h1", {}, name), empty(job.missing, " ", h("a", { href: "#/jobs" }, "To the jobs"))];
  if (!job?.view) return [h("h1", {}, name), empty("Reading the job…")];
  const { view, rounds, evaluations } = job;
  return [
    h("p", { class: "crumbs" }, h("a", { href: "#/jobs" }, "Jobs")),
    head(view),
    summary(view, evaluations, now),
    h(
      "div",
      { class: "pair" },
      section(
        "loss",
        "Loss",
        heldOut(evaluations).length || trained(rounds).length
          ? lossChart(evaluations, rounds, view.n_rounds)
          : empty("Nothing is measured yet: the first held-out loss comes when an agent has loaded the base model."),
      ),
      section(
        "current",
        view.current
          ? view.current.purpose === "train"
            ? `Round ${view.current.number} now`
            : "Final measurement now"
          : "Agents",
        members(view, fleet, rounds, evaluations, now),
      ),
    ),
    section("timeline", "Timeline", timeline(job, now)),
    section("plan", "Plan", planPart(job)),
    section("rounds", "Rounds", roundsTable(view, rounds, evaluations)),
    h(
      "div",
      { class: "pair wider-first" },
      section("versions", "Versions", versionsTable(view)),
      section("faults", "What went wrong", faults(view, rounds)),
    ),
    section(
      "log",
      "Events",
      eventLines(
        log.filter((item) => item.job === view.name || (item.event === "agent" && item.agent in view.members)),
      ),
    ),
  ];
}

function head(view) {
  const reason = view.reason || view.text;
  const beyond = view.text.startsWith(`${view.phase}, `) ? view.text.slice(view.phase.length + 2) : view.text;
  return [
    h(
      "div",
      { class: "head" },
      h("h1", {}, view.name),
      chip(view.phase),
      view.ended_at && !view.reason ? null : h("span", { class: "soft" }, view.ended_at ? reason : beyond),
      controls(view),
    ),
    h(
      "p",
      { class: "soft" },
      `${view.method} on ${view.base}, data set ${view.data}, submitted ${text.moment(view.submitted_at)}`,
    ),
  ];
}

function summary(view, evaluations, now) {
  const held = heldOut(comparable(evaluations));
  const [first, last] = [held[0], held.at(-1)];
  const { cost } = view;
  const out = Object.values(view.members).filter((member) => member.excluded).length;
  const n_members = Object.keys(view.members).length;
  return figures(
    figure(
      "Rounds",
      `${view.round} of ${view.n_rounds}`,
      text.duration((view.ended_at || now) - view.submitted_at),
      bar(view.round, view.n_rounds, `${view.round} of ${view.n_rounds} rounds done`),
    ),
    figure(
      "Held-out loss",
      last ? text.loss(last.mean) : text.NONE,
      last && held.length > 1 ? `from ${text.loss(first.mean)} on ${text.some(last.n, "agent")}` : null,
    ),
    figure(
      "Agents",
      text.count(n_members - out),
      [
        out ? `${text.count(out)} out` : "",
        cost.n_failed ? `${cost.n_failed} of ${text.some(cost.n_shares, "share")} failed` : "",
      ]
        .filter(Boolean)
        .join(", ") || null,
    ),
    figure(
      "Training time",
      text.hours(cost.train_s),
      `${cost.gpu_s ? `${text.hours(cost.gpu_s)} of it on GPUs` : "on CPUs"}, ${text.some(cost.samples, "sample")}`,
    ),
    figure(
      "Moved",
      text.size(cost.bytes_up + cost.bytes_down) || "0 B",
      `↓ ${text.size(cost.bytes_down) || "0 B"}  ↑ ${text.size(cost.bytes_up) || "0 B"}`,
    ),
    figure("Energy", text.energy(cost.joules) || text.NONE, known(cost)),
    figure(
      "Cost so far",
      cost.money === null ? text.hours(cost.work_s) : `${text.money(cost.money)} ${cost.currency}`,
      paid(cost),
    ),
  );
}

// What the energy is known from; what nobody measured or declared is said, not guessed.
function known({ joules, declared_j, unmetered_s }) {
  const source =
    declared_j && declared_j < joules ? `${text.energy(declared_j)} declared` : declared_j ? "declared" : "measured";
  const missing = unmetered_s ? `unknown for ${text.duration(unmetered_s)}` : "";
  return [joules ? source : "", missing].filter(Boolean).join(", ") || null;
}

function paid({ money, work_s, unmetered_s }) {
  if (money === null) return "of agents' time; no prices set";
  return `${text.hours(work_s)} of agents' time${unmetered_s ? ", unknown energy not in it" : ""}`;
}
