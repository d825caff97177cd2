// What happened while this page was open, newest first, in words.

import { chip, empty, section } from "./parts.js";
import { h } from "./dom.js";
import * as text from "./text.js";

const SHOWN = 200;

function line(item) {
  switch (item.event) {
    case "listening":
      return ["", "listening: what was before is in the views"];
    case "missed":
      return ["warn", `${text.some(item.n, "event")} lost: this page read too slowly`];
    case "job":
      return [
        chip(item.phase),
        [jobLink(item.job), ` after ${text.some(item.round, "round")} of ${item.n_rounds}`, reason(item)],
      ];
    case "share":
      return [
        chip(item.state),
        [jobLink(item.job), item.round ? ` round ${item.round}: ` : " survey: ", item.agent, reason(item)],
      ];
    case "agent":
      return [chip(item.online ? "online" : "offline"), [item.agent, reason(item)]];
    case "round":
      return [
        chip(
          item.record.outcome === "aggregated" || item.record.outcome === "completed" ? "DONE" : "warn",
          "round closed",
        ),
        [jobLink(item.job), ` round ${item.record.round}: ${item.record.outcome}`, lossOf(item.record)],
      ];
    case "broker":
      return [chip(item.connected ? "online" : "offline"), ["broker", item.fault ? `: ${item.fault}` : ""]];
    default:
      return ["", item.event];
  }
}

const jobLink = (name) => h("a", { href: `#/jobs/${encodeURIComponent(name)}` }, name);
const reason = (item) => (item.reason ? `: ${item.reason}` : "");
const lossOf = (record) => (record.loss === null ? "" : `, training loss ${text.loss(record.loss)}`);

export function eventLines(items) {
  if (!items.length) return empty("Nothing has happened since this page was opened.");
  const lines = items
    .slice(-SHOWN)
    .reverse()
    .map((item) => {
      const [state, words] = line(item);
      return h(
        "li",
        {},
        h("time", { datetime: new Date(1000 * item.at).toISOString() }, text.clock(item.at)),
        h("span", {}, state),
        h("span", {}, words),
      );
    });
  return h("ol", { class: "log", tabindex: "0", "aria-label": "Events" }, lines);
}

export const eventsPage = ({ log }) => [
  h("h1", { class: "hidden" }, "Events"),
  section("events", "Events", eventLines(log)),
];
