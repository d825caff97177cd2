// The operator's page: what is looked at is in the address (#/, #/jobs/NAME, ...), what is shown is drawn from the state.

import { enrolmentsPage, waiting } from "./enrolments.js";
import { eventsPage } from "./events.js";
import { agentPage, fleetPage } from "./fleet.js";
import { fill, h } from "./dom.js";
import { jobPage } from "./job.js";
import { jobsPage } from "./jobs.js";
import { dropToken, hasToken } from "./link.js";
import { listen, login, lookAt, now, onChange, refresh, state } from "./state.js";
import * as text from "./text.js";

const DRAW_MS = 200;

const PAGES = [
  [/^\/?$/, fleetPage, "Fleet"],
  [/^\/jobs$/, jobsPage, "Jobs"],
  [/^\/jobs\/(.+)$/, jobPage, "Jobs"],
  [/^\/agents\/(.+)$/, agentPage, "Fleet"],
  [/^\/enrolments$/, enrolmentsPage, "Enrolments"],
  [/^\/events$/, eventsPage, "Events"],
];

function place() {
  const path = location.hash.slice(1);
  for (const [pattern, page, part] of PAGES) {
    const found = pattern.exec(path);
    if (found) return { page, part, name: found[1] === undefined ? null : decoded(found[1]) };
  }
  return { page: nowhere, part: "", name: null };
}

function decoded(name) {
  try {
    return decodeURIComponent(name);
  } catch {
    return name; // there is no such thing, and the page of it will say so
  }
}

const nowhere = () => [
  h("h1", {}, "There is nothing here"),
  h("p", { class: "empty" }, h("a", { href: "#/" }, "To the fleet")),
];

// ------------------------------------------------------------------------------------------------------------- frame

function header(part) {
  const links = [
    ["Fleet", "#/"],
    ["Jobs", "#/jobs"],
    ["Events", "#/events"],
  ];
  const { fleet, enrolments } = state;
  if (enrolments) links.splice(2, 0, ["Enrolments", "#/enrolments"]);
  const n = waiting(enrolments);
  return [
    h("a", { class: "brand", href: "#/" }, h("strong", {}, "fedpipe"), fleet ? h("span", {}, fleet.fleet) : null),
    h(
      "nav",
      { "aria-label": "Parts" },
      links.map(([name, href]) =>
        h(
          "a",
          { href, "aria-current": name === part ? "page" : null },
          name,
          name === "Enrolments" && n ? h("span", { class: "badge", title: `${n} to be decided` }, text.count(n)) : null,
        ),
      ),
    ),
    h(
      "span",
      { class: "link" },
      linkText(fleet),
      hasToken() ? h("button", { class: "quiet", onclick: logout }, "Log out") : null,
    ),
  ];
}

function linkText(fleet) {
  if (state.away) return h("span", { class: "chip bad" }, "coordinator away");
  if (!fleet) return null;
  const { connected, address } = fleet.broker;
  return h(
    "span",
    { class: `chip ${connected ? "good" : "bad"}`, title: `MQTT broker at ${address}` },
    connected ? "broker connected" : "no broker",
  );
}

function logout() {
  dropToken();
  location.reload();
}

const warning = (head, words) => h("p", { class: "warning" }, h("strong", {}, `${head} `), words);

const faultOf = ({ address, fault }) => (fault.includes(address) ? fault : `${address}: ${fault}`);

// What stands in the way of everything else.
function banner() {
  if (state.login) return [];
  if (state.away)
    return [
      warning(
        "The coordinator is away.",
        `Since ${text.clock(state.awaySince)}: ${state.away}. Trying again; what is shown is from before.`,
      ),
    ];
  const { broker, disk, disk_reason } = state.fleet ?? {};
  return [
    broker && !broker.connected
      ? warning("No connection to the broker.", `${faultOf(broker)}. Agents train on; their updates wait.`)
      : null,
    disk && disk !== "ok" ? warning(`The coordinator's disk: ${disk}.`, disk_reason) : null,
  ].filter(Boolean);
}

function loginForm() {
  const submit = (event) => {
    event.preventDefault();
    const field = event.target.elements.token;
    if (field.value.trim()) login(field.value.trim());
    field.value = "";
  };
  return h(
    "form",
    { class: "login", onsubmit: submit },
    h("h1", {}, "Log in"),
    h("p", {}, state.login),
    h("label", { for: "token" }, "Token"),
    h("input", { id: "token", name: "token", type: "password", autocomplete: "current-password", required: true }),
    h("button", { class: "primary" }, "Log in"),
    h(
      "p",
      { class: "soft" },
      "It is the word in the coordinator's ",
      h("code", {}, "web.token_file"),
      ", and is kept in this tab only.",
    ),
  );
}

// ------------------------------------------------------------------------------------------------------------ drawing

let scheduled = false;
let drawnAt = 0;

function draw() {
  scheduled = false;
  drawnAt = performance.now();
  const { page, part, name } = place();
  lookAt(page === jobPage ? name : null);
  const main = document.getElementById("main");
  main.classList.toggle("stale", Boolean(state.away));
  fill(document.getElementById("header"), header(part));
  fill(document.getElementById("banner"), banner()); // patched in place: what did not change is not read out again
  if (state.login) fill(main, [loginForm()]);
  else if (state.fleet) fill(main, page(state, now(), name).flat(Infinity).filter(Boolean));
  else if (state.away)
    fill(main, [
      h(
        "p",
        { class: "empty" },
        "Nothing was read yet. Start the coordinator, or wait: this page tries again by itself.",
      ),
    ]);
  document.title = [name, part, "fedpipe"].filter(Boolean).join(" · ");
}

function schedule() {
  if (scheduled) return;
  scheduled = true;
  setTimeout(() => requestAnimationFrame(draw), Math.max(0, drawnAt + DRAW_MS - performance.now()));
}

onChange(schedule);
document.addEventListener("redraw", draw); // a view's own choice, such as a sort order, changed
addEventListener("hashchange", () => {
  draw();
  document.getElementById("main").focus({ preventScroll: true });
  scrollTo(0, 0);
});
addEventListener("online", refresh);
addEventListener("resize", schedule);
setInterval(schedule, 1000);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  document.getElementById("main").focus();
});
refresh();
listen();
