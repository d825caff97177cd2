// One job: where it stands, how well it does, who does what, what it cost, what went wrong.

import { heldOut, lossChart, trained } from "./charts.js";
import { h } from "./dom.js";
import { eventLines } from "./events.js";
import { faults, roundsTable, versionsTable } from "./history.js";
import { ask } from "./link.js";
import { members } from "./members.js";
import { bar, chip, confirm, empty, figure, figures, section } from "./parts.js";
import { planPart } from "./ranks.js";
import { refresh } from "./state.js";
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
      { class: "pair" },
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
  return [
    h(
      "div",
      { class: "head" },
      h("h1", {}, view.name),
      chip(view.phase),
      view.ended_at && !view.reason ? null : h("span", { class: "soft" }, view.ended_at ? reason : view.text),
      view.ended_at
        ? null
        : h("button", { class: "danger", onclick: () => confirmCancel(view.name) }, "Cancel the job"),
    ),
    h(
      "p",
      { class: "soft" },
      `${view.method} on ${view.base}, data set ${view.data}, submitted ${text.moment(view.submitted_at)}`,
    ),
  ];
}

function summary(view, evaluations, now) {
  const held = heldOut(evaluations);
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
      last && held.length > 1 ? `from ${text.loss(first.mean)}` : null,
    ),
    figure("Agents", text.count(n_members - out), out ? `${text.count(out)} out` : null),
    figure(
      "Training time",
      text.hours(cost.train_s),
      cost.gpu_s ? `${text.hours(cost.gpu_s)} of it on GPUs` : "on CPUs",
    ),
    figure(
      "Moved",
      text.size(cost.bytes_up + cost.bytes_down) || "0 B",
      `↓ ${text.size(cost.bytes_down) || "0 B"}  ↑ ${text.size(cost.bytes_up) || "0 B"}`,
    ),
    figure("Samples trained", text.count(cost.samples)),
    figure("Shares failed", text.count(cost.n_failed), `of ${text.count(cost.n_shares)}`),
  );
}

function confirmCancel(name) {
  const words =
    "Agents stop at once and the open round is lost. Finished versions stay. A cancelled job cannot be taken up again.";
  confirm(`Cancel ${name}?`, words, "Go on training", "Cancel the job", () =>
    ask(`jobs/${encodeURIComponent(name)}/cancel`, "POST").finally(refresh),
  );
}
