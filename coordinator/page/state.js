// What this page knows: the views it read last, the news since, and how it keeps both fresh.
//
// News say that something changed, the views say what is so.  Each view is read again when there is news of it, but never
// sooner than four times as long as readings take: a large fleet is read less often, not slower.

import * as link from "./link.js";

const LEAST_MS = 500;
const PATIENCE = 4;
const EVERY_MS = 15_000; // free memory and the like change without news
const BROKER_MS = 2000;
const RETRY_MS = [500, 1000, 2000, 4000, 8000];
const MAX_LOG = 500;

export const state = {
  fleet: null,
  skew: 0, // the coordinator's clock minus ours, seconds
  away: "", // why the coordinator cannot be reached
  awaySince: 0,
  login: "", // why a token is asked for
  log: [],
  enrolments: null,
  noEnrolments: "", // why there are none: this coordinator has no authority
  job: null, // the one that is looked at: {name, view, rounds, evaluations, plan, missing}
};

let changed = () => {};
export const onChange = (listener) => {
  changed = listener;
};
export const now = () => Date.now() / 1000 + state.skew;

class Reading {
  constructor(read) {
    this.read = read;
    this.wanted = false;
    this.running = false;
    this.next = 0;
    this.took = 0;
  }

  want() {
    this.wanted = true;
    if (!this.running) this.run();
  }

  async run() {
    this.running = true;
    while (this.wanted) {
      await pause(this.next - performance.now());
      this.wanted = false;
      const began = performance.now();
      let took = 0;
      try {
        await this.read();
        took = performance.now() - began;
      } catch (error) {
        failed(error);
      }
      // of the last two the quicker: one that stalled says nothing of the next
      this.next = performance.now() + Math.min(EVERY_MS, Math.max(LEAST_MS, PATIENCE * Math.min(took, this.took)));
      this.took = took;
      changed();
    }
    this.running = false;
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));

function failed(error) {
  if (error instanceof link.Refused && error.status === 401) {
    state.login ||= link.hasToken() ? "This token is not the right one." : "This coordinator asks for its token.";
    link.dropToken();
  } else if (error instanceof link.Refused) {
    lost(error.message);
  } else {
    lost("it does not answer");
  }
}

function lost(why) {
  if (!state.away) state.awaySince = Date.now() / 1000;
  state.away = why;
}

const fleet = new Reading(async () => {
  const view = await link.ask("fleet");
  state.fleet = view;
  state.skew = view.now - Date.now() / 1000;
  state.away = "";
  state.login = "";
});

const enrolments = new Reading(async () => {
  try {
    state.enrolments = await link.ask("enrolments");
    state.noEnrolments = "";
  } catch (error) {
    if (!(error instanceof link.Refused) || error.status !== 409) throw error;
    state.enrolments = null;
    state.noEnrolments = error.message;
  }
});

// After a word of the operator, which is no news of a job.
export const reread = () => enrolments.want();

const job = new Reading(async () => {
  const told = state.job;
  if (!told) return;
  try {
    const view = await link.ask(`jobs/${encodeURIComponent(told.name)}?skip=${told.rounds.length}`);
    if (view.n_skipped !== told.rounds.length) {
      Object.assign(told, { rounds: [], evaluations: {} });
      job.wanted = true;
      return;
    }
    told.rounds.push(...view.history);
    for (const [version, found] of Object.entries(view.evaluations)) {
      told.evaluations[version] = { ...told.evaluations[version], ...found };
    }
    told.missing = "";
    told.view = view;
    const wanted = `${view.round}.${view.attempt}.${view.phase}`;
    if (view.has_plan && told.planAsOf !== wanted) {
      told.plan = await link.ask(`jobs/${encodeURIComponent(told.name)}/plan`);
      told.planAsOf = wanted;
    }
  } catch (error) {
    if (!(error instanceof link.Refused) || error.status !== 404) throw error;
    told.missing = error.message;
  }
});

export function lookAt(name) {
  if (state.job?.name === name) return;
  state.job =
    name === null ? null : { name, view: null, rounds: [], evaluations: {}, plan: null, missing: "" };
  job.next = 0;
  if (name !== null) job.want();
}

export function refresh() {
  if (state.login) return;
  fleet.want();
  if (!state.noEnrolments) enrolments.want();
  if (state.job) job.want();
}

// A share is told whenever something happens to it, also when its state stays: an update that is offered is uploading before
// and after it.
function isRepeated(item) {
  const same = (other) => ["event", "job", "agent", "round", "attempt"].every((name) => other[name] === item[name]);
  const before = item.event === "share" ? state.log.findLast(same) : undefined;
  return before !== undefined && before.state === item.state && before.reason === item.reason;
}

function heard(item) {
  switch (item.event) {
    case "listening":
      state.noEnrolments = ""; // it may have been restarted with an authority
      return refresh();
    case "missed":
      return refresh();
    case "progress":
      for (const agent of state.fleet?.agents ?? []) {
        if (item.agents[agent.id]) Object.assign(agent, { progress: item.agents[agent.id], heard_at: item.at });
      }
      break;
    case "agent":
      for (const agent of state.fleet?.agents ?? []) {
        if (agent.id === item.agent) Object.assign(agent, { online: item.online, reason: item.reason, since: item.at });
      }
      break;
    default:
  }
  if (item.event !== "progress" && !isRepeated(item)) {
    state.log.push(item);
    if (state.log.length > MAX_LOG) state.log.splice(0, state.log.length - MAX_LOG);
  }
  fleet.want();
  if (state.job && (item.job ?? state.job.name) === state.job.name) job.want();
  return changed();
}

// Listens for ever.  After each end of the stream everything is read again: what happened meanwhile is not told twice.
export async function listen() {
  setInterval(refresh, EVERY_MS);
  setInterval(() => {
    // a connection that is back before anyone could tell that it was gone is no news
    if (state.fleet && !state.fleet.broker.connected && !state.login) fleet.want();
  }, BROKER_MS);
  for (let failures = 0; ;) {
    try {
      for await (const item of link.news()) {
        failures = 0;
        state.away = "";
        heard(item);
      }
      lost("it ended the connection: is it being restarted?");
    } catch (error) {
      failed(error.name === "AbortError" ? new Error("silent") : error);
    }
    changed();
    await (state.login ? loggedIn() : pause(RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
    failures += 1;
  }
}

let admitted = () => {};
const loggedIn = () =>
  new Promise((resolve) => {
    admitted = resolve;
  });

export function login(token) {
  link.keepToken(token);
  state.login = "";
  admitted();
  refresh();
}
