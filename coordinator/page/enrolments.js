// Who may be an agent: servers that wait to be let in, those that were, and those that are out; and the operator's word on each.

import { h } from "./dom.js";
import { ask } from "./link.js";
import { chip, choiceField, confirm, empty, filterField, look, section, table } from "./parts.js";
import { reread } from "./state.js";
import * as text from "./text.js";

const STATES = ["pending", "accepted", "rejected", "revoked"]; // those that wait for a word first
const SOON_S = 14 * 86400; // a healthy agent renews a month before the end
const KEY_DIGITS = 16; // as `fedpipe enrol` shows it

export const waiting = (enrolments) => enrolments?.filter((one) => one.state === "pending").length ?? 0;

// When a certificate ends, with a sign where somebody has to look.
export function certificate(enrolment, now) {
  if (!enrolment?.expires_at) return text.NONE;
  const left = enrolment.expires_at - now;
  const words = left > 0 ? `in ${text.span(left)}` : text.ago(-left);
  return left > SOON_S ? words : chip(left > 0 ? "soon" : "out", words);
}

function columns(now) {
  return [
    {
      id: "agent",
      name: "Agent",
      value: (e) => e.agent,
      cell: (e) => h("a", { href: `#/agents/${encodeURIComponent(e.agent)}`, title: e.agent }, e.agent),
    },
    { id: "state", name: "State", value: (e) => STATES.indexOf(e.state), cell: (e) => chip(e.state) },
    {
      id: "ends",
      name: "Certificate",
      value: (e) => e.expires_at || null,
      kind: "number",
      cell: (e) => certificate(e, now),
    },
    { id: "decide", name: "Decide", cell: buttons },
    { id: "key", name: "Key", rare: true, cell: (e) => h("code", { title: e.key }, e.key.slice(0, KEY_DIGITS)) },
    { id: "from", name: "From", value: (e) => e.address, rare: true, cell: (e) => e.address },
    {
      id: "asked",
      name: "Asked",
      value: (e) => now - e.asked_at,
      kind: "number",
      rare: true,
      cell: (e) => h("span", { title: text.moment(e.asked_at) }, text.ago(now - e.asked_at)),
    },
    { id: "reason", name: "Reason", kind: "long", rare: true, cell: (e) => e.reason },
  ];
}

const WORDS = {
  accept: {
    title: (e) => `Let ${e.agent} in?`,
    words: (e) =>
      `It asked from ${e.address || "an unknown address"} with the key ${e.key.slice(0, KEY_DIGITS)}. ` +
      "Compare the key with the one that fedpipe enrol shows on that server.",
    go: "Let it in",
    tone: "primary",
  },
  reject: {
    title: (e) => `Send ${e.agent} away?`,
    words: () => "It gets no certificate. To ask again it needs a new token.",
    go: "Send it away",
    reason: "Reason, which it is told",
  },
  revoke: {
    title: (e) => `Take back the certificate of ${e.agent}?`,
    words: () =>
      "What it is training ends at once, and nothing of it is taken any more. To come back it needs a new token.",
    go: "Take it back",
    reason: "Reason, which it is told",
  },
};
const OPEN_TO = { pending: ["accept", "reject"], accepted: ["revoke"] };

function buttons(enrolment) {
  return h(
    "span",
    { class: "words" },
    (OPEN_TO[enrolment.state] ?? []).map((verb) =>
      h(
        "button",
        {
          class: WORDS[verb].tone ?? "danger",
          "aria-label": `${verb} ${enrolment.agent}`,
          onclick: () => decide(verb, enrolment),
        },
        verb,
      ),
    ),
  );
}

function decide(verb, enrolment) {
  const { title, words, go, tone, reason } = WORDS[verb];
  const path = `enrolments/${encodeURIComponent(enrolment.agent)}/${verb}`;
  const act = (given) => ask(path, "POST", reason ? { reason: given } : undefined).finally(reread);
  confirm(title(enrolment), words(enrolment), "Not now", go, act, { tone, field: reason });
}

export function enrolmentsPage({ enrolments, noEnrolments }, now) {
  if (!enrolments) return [h("h1", {}, "Enrolments"), empty(noEnrolments || "Reading the enrolments…")];
  const way = look("enrolments", { by: "state" });
  const n = Object.fromEntries(STATES.map((state) => [state, enrolments.filter((one) => one.state === state).length]));
  const wanted = way.filter.toLowerCase();
  const rows = enrolments.filter(
    (e) =>
      (!way.only || e.state === way.only) &&
      (!wanted || [e.agent, e.state, e.address, e.key, e.reason].join(" ").toLowerCase().includes(wanted)),
  );
  return [
    h("h1", { class: "hidden" }, "Enrolments"),
    section(
      "enrolments",
      "Enrolments",
      enrolments.length
        ? [
            h(
              "p",
              { class: "soft" },
              n.pending ? `${text.some(n.pending, "server")} to be let in or sent away.` : "Nobody waits.",
            ),
            h(
              "div",
              { class: "fields" },
              filterField("enrolments-filter", way, "Filter"),
              choiceField(
                "enrolments-state",
                "State",
                [["", `all (${enrolments.length})`], ...STATES.map((s) => [s, `${s} (${n[s]})`])],
                way.only,
                (value) => Object.assign(way, { only: value, page: 0 }),
              ),
            ),
            rows.length
              ? table({ id: "enrolments", label: "Enrolments", columns: columns(now), rows, keyOf: (e) => e.agent })
              : empty("No enrolment fits the filter."),
          ]
        : empty(
            "No server has asked to be an agent. Make a token with ",
            h("code", {}, "fedpipe token"),
            " and use it there with ",
            h("code", {}, "fedpipe enrol"),
            ".",
          ),
    ),
  ];
}
