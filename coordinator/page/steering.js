// What an operator does with a job: pause it, let it go on, end it, go back to a version.

import { h } from "./dom.js";
import { ask } from "./link.js";
import { confirm } from "./parts.js";
import { refresh } from "./state.js";

const WORDS = {
  pause: {
    title: (name) => `Pause ${name}?`,
    words: () => "The round under way ends as usual, and no other begins. The agents are free for other jobs.",
    go: "Pause the job",
    tone: "primary",
    field: "Reason, kept with the job",
  },
  stop: {
    verb: "pause",
    told: { now: true },
    title: () => "Stop the round under way?",
    words: () =>
      "Agents stop at once. What has arrived is kept, and they keep what they have trained for the next attempt, unless other work comes between.",
    go: "Stop the round",
  },
  cancel: {
    title: (name) => `Cancel ${name}?`,
    words: () =>
      "Agents stop at once and the open round is lost. Finished versions stay. A cancelled job cannot be taken up again.",
    go: "Cancel the job",
  },
  rollback: {
    title: (name, version) => `Take ${name} back to version ${version}?`,
    words: () =>
      "A new version is made with its content. A round under way stops, and what was trained for it is lost. No version is deleted, and rounds are not given back.",
    go: "Go back",
    field: "Reason, kept with the version",
  },
};

const send = (name, verb, told) => ask(`jobs/${encodeURIComponent(name)}/${verb}`, "POST", told).finally(refresh);

function sure(what, name, version) {
  const { verb = what, told, title, words, go, tone, field } = WORDS[what];
  const body = (reason) => ({ ...told, ...(field && { reason }), ...(version && { version }) });
  const act = (reason) => send(name, verb, field || told ? body(reason) : undefined);
  confirm(title(name, version), words(), "Go on training", go, act, { tone, field });
}

const button = (words, onclick, tone) => h("button", { class: tone, onclick }, words);

export function controls({ name, phase, pause, ended_at, current }) {
  if (ended_at) return null;
  const resume = () => send(name, "resume").catch((error) => confirm("Not resumed", error.message, "Close"));
  return h(
    "span",
    { class: "words" },
    pause
      ? button(phase === "paused" ? "Resume" : "Do not pause", resume, "primary")
      : button("Pause the job", () => sure("pause", name)),
    pause && current ? button("Stop the round now", () => sure("stop", name), "danger") : null,
    button("Cancel the job", () => sure("cancel", name), "danger"),
  );
}

// For every version whose files are kept, but the one that the job stands at.
export function wayBack(view, { version, kept }) {
  if (!kept || version === view.version) return null;
  return h(
    "button",
    {
      class: "danger",
      "aria-label": `Go back to version ${version}`,
      onclick: () => sure("rollback", view.name, version),
    },
    "Go back",
  );
}
