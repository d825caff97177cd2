// Elements as values: h() makes them, patch() makes what is shown like what was made.  Text from elsewhere is only ever
// text.

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "title"]);
const HANDLERS = ["onclick", "oninput", "onchange", "onsubmit", "onpointermove", "onpointerleave"];
const USERS_OWN = new Set(["open"]); // what the reader unfolded stays unfolded

export function h(tag, attributes, ...children) {
  const element = DRAWN.has(tag) ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (HANDLERS.includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  const given = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  element.append(...given.filter((child) => child !== ""));
  return element;
}

const key = (node) => (node.nodeType === Node.ELEMENT_NODE ? node.getAttribute("data-key") : null);
const alike = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName && key(a) === key(b);

// Changes `shown` into the likeness of `made`, element by element, so that focus, scrolling and selections survive.
export function patch(shown, made) {
  if (!alike(shown, made)) return shown.replaceWith(made);
  if (shown.nodeType !== Node.ELEMENT_NODE) {
    if (shown.data !== made.data) shown.data = made.data;
    return undefined;
  }
  for (const { name } of [...shown.attributes]) {
    if (!made.hasAttribute(name) && !USERS_OWN.has(name)) shown.removeAttribute(name);
  }
  for (const { name, value } of [...made.attributes]) {
    if (shown.getAttribute(name) !== value && !USERS_OWN.has(name)) shown.setAttribute(name, value);
  }
  if (shown.nodeName === "OPTION" && shown.selected !== made.selected) shown.selected = made.selected;
  for (const name of HANDLERS) if (shown[name] !== made[name]) shown[name] = made[name];
  return fill(shown, [...made.childNodes]);
}

export function fill(parent, children) {
  const keyed = new Map([...parent.childNodes].filter(key).map((node) => [key(node), node]));
  let at = parent.firstChild;
  for (const child of children) {
    const kept = key(child) === null ? (at && key(at) === null ? at : null) : keyed.get(key(child));
    if (kept && kept.nodeName === child.nodeName) {
      if (kept === at) at = at.nextSibling;
      else parent.insertBefore(kept, at);
      patch(kept, child);
    } else {
      parent.insertBefore(child, at);
    }
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}
