// Pieces that several views are made of: tables with an order and pages, chips, bars, figures, sections.

import { h } from "./dom.js";
import * as text from "./text.js";

export const redraw = () => document.dispatchEvent(new Event("redraw"));

const TONES = {
  DONE: "good",
  completed: "good",
  accepted: "good",
  online: "good",
  aggregated: "good",
  TRAINING: "busy",
  UPLOADING: "busy",
  PREPARING: "busy",
  ACCEPTED: "busy",
  collecting: "busy",
  aggregating: "busy",
  evaluating: "busy",
  planning: "busy",
  "at work": "busy",
  FAILED: "bad",
  REJECTED: "bad",
  failed: "bad",
  out: "bad",
  rejected: "bad",
  revoked: "bad",
  offline: "bad",
  TIMED_OUT: "warn",
  CANCELLED: "warn",
  cancelled: "warn",
  paused: "warn",
  pending: "warn",
  soon: "warn",
};
const SIGNS = { good: "✓", busy: "▸", bad: "✕", warn: "!" };

// A state is a word with a sign; its colour only repeats them.
export function chip(state, word = text.words(state)) {
  const tone = TONES[state] ?? "calm";
  return h(
    "span",
    { class: `chip ${tone}` },
    h("span", { class: "sign", "aria-hidden": "true" }, SIGNS[tone] ?? "·"),
    word,
  );
}

export function bar(done, total, label) {
  return h("progress", { max: String(total || 1), value: String(Math.min(done, total || 1)), "aria-label": label });
}

export const figure = (name, value, more, extra) =>
  h(
    "div",
    { class: "figure" },
    h("dt", {}, name),
    h("dd", {}, h("strong", {}, value), more ? h("span", {}, more) : null, extra ?? null),
  );
export const figures = (...given) => h("dl", { class: "figures" }, given.filter(Boolean));

export function section(id, title, ...content) {
  return h(
    "section",
    { "data-key": id, id, "aria-labelledby": `${id}-title` },
    h("h2", { id: `${id}-title` }, title),
    content,
  );
}

// Asks or tells something that has to be answered before anything else; with a `field` of this label, `act` gets what is in it.
export function confirm(title, words, stay, go, act, { tone = "danger", field = "" } = {}) {
  const dialog = document.getElementById("dialog");
  const fault = h("p", { role: "alert" });
  const input = field ? h("input", { id: "dialog-field", maxlength: "500", spellcheck: "true" }) : null;
  const acted = () =>
    act(input?.value.trim()).then(
      () => dialog.close(),
      (error) => {
        fault.textContent = error.message;
      },
    );
  dialog.replaceChildren(
    h("h2", { id: "dialog-title" }, title),
    h("p", {}, words),
    ...(input ? [h("p", { class: "field" }, h("label", { for: "dialog-field" }, field), input)] : []),
    fault,
    h(
      "div",
      { class: "buttons" },
      h("button", { onclick: () => dialog.close(), autofocus: true }, stay),
      go ? h("button", { class: tone, onclick: acted }, go) : "",
    ),
  );
  dialog.showModal();
}

export const empty = (...content) => h("p", { class: "empty" }, content);

// A box that scrolls sideways by itself, so that the page never does.
export const wide = (label, content) =>
  h("div", { class: "wide", role: "group", "aria-label": label, tabindex: "0" }, content);

// ------------------------------------------------------------------------------------------------------------ tables

// How a table is looked at: by which column, which page, which filter.  Kept per table for as long as the tab lives.
const looks = new Map();
export function look(id, initial) {
  if (!looks.has(id)) looks.set(id, { by: "", down: false, page: 0, filter: "", only: "", ...initial });
  return looks.get(id);
}

// A column is {id, name, value(row) for the order, cell(row), kind: "number", "long", "loose" or undefined, rare: not shown on a phone}.
export function table({ id, label, columns, rows, keyOf, size = 100, initial }) {
  const way = look(id, initial);
  const ordered = sorted(
    rows,
    columns.find((column) => column.id === way.by),
    way.down,
  );
  const n_pages = Math.max(1, Math.ceil(rows.length / size));
  way.page = Math.min(way.page, n_pages - 1);
  const shown = ordered.slice(way.page * size, (way.page + 1) * size);
  const kind = (column) => [column.kind, column.rare ? "rare" : ""].filter(Boolean).join(" ") || null;
  const head = columns.map((column) =>
    h("th", { scope: "col", class: kind(column), "aria-sort": order(way, column) }, title(way, column)),
  );
  const body = shown.map((row) =>
    h(
      "tr",
      { "data-key": keyOf(row) },
      columns.map((column, i) =>
        h(i ? "td" : "th", { class: kind(column), scope: i ? null : "row" }, clamped(column, column.cell(row))),
      ),
    ),
  );
  return [
    wide(label, h("table", { "data-key": id }, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body))),
    n_pages > 1 ? pager(way, rows.length, size, n_pages, label) : null,
  ];
}

// A few lines of a long text; all of it under the pointer, and where the thing itself is shown.
const clamped = (column, cell) =>
  column.kind === "long" && typeof cell === "string" ? h("div", { class: "clamp", title: cell }, cell) : cell;

function sorted(rows, column, down) {
  if (!column) return rows;
  const decorated = rows.map((row) => [column.value(row), row]);
  decorated.sort(([a], [b]) => compare(a, b, down));
  return decorated.map(([, row]) => row);
}

// What is not known comes last, whichever way the column is ordered.
function compare(a, b, down) {
  const [none_a, none_b] = [a, b].map((x) => x === null || x === undefined || Number.isNaN(x));
  if (none_a || none_b) return none_a - none_b;
  const found = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return down ? -found : found;
}

const order = (way, column) =>
  column.value ? (way.by === column.id ? (way.down ? "descending" : "ascending") : "none") : null;

function title(way, column) {
  if (!column.value) return column.name;
  const turn = () => {
    Object.assign(way, { down: way.by === column.id && !way.down, by: column.id, page: 0 });
    redraw();
  };
  const arrow = way.by === column.id ? (way.down ? "▾" : "▴") : "";
  return h("button", { class: "sort", onclick: turn }, column.name, h("span", { "aria-hidden": "true" }, arrow));
}

function pager(way, n_rows, size, n_pages, label) {
  const turn = (to) => () => {
    way.page = to;
    redraw();
  };
  const step = (word, to) =>
    h("button", { onclick: turn(to), "aria-disabled": to < 0 || to >= n_pages ? "true" : null, class: "quiet" }, word);
  const bounded = (to) => Math.min(n_pages - 1, Math.max(0, to));
  return h(
    "nav",
    { class: "pager", "aria-label": `Pages: ${label}` },
    step("Previous", way.page - 1 < 0 ? bounded(-1) : way.page - 1),
    h(
      "span",
      {},
      `${text.count(way.page * size + 1)}–${text.count(Math.min(n_rows, (way.page + 1) * size))} of ${text.count(n_rows)}`,
    ),
    step("Next", way.page + 1 >= n_pages ? bounded(n_pages) : way.page + 1),
  );
}

export function filterField(id, way, label) {
  const type = (event) => {
    Object.assign(way, { filter: event.target.value, page: 0 });
    redraw();
  };
  return h(
    "span",
    { class: "field" },
    h("label", { for: id }, label),
    h("input", { id, type: "search", value: way.filter, oninput: type, placeholder: "any word", spellcheck: "false" }),
  );
}

export function choiceField(id, label, options, chosen, pick) {
  return h(
    "span",
    { class: "field" },
    h("label", { for: id }, label),
    h(
      "select",
      {
        id,
        onchange: (event) => {
          pick(event.target.value);
          redraw();
        },
      },
      options.map(([value, name]) => h("option", { value, selected: value === chosen }, name)),
    ),
  );
}
