// The only way to the coordinator: its HTTP API beside this page, with the token of this tab if it needs one.
//
// EventSource can send no header, so server-sent events are read from an ordinary answer as it grows.

const API = new URL("../v1/", import.meta.url);
const TOKEN = "fedpipe-token";
const SILENT_MS = 40_000; // the coordinator says something every 15 s
const ANSWER_MS = 30_000;

export class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export const hasToken = () => sessionStorage.getItem(TOKEN) !== null;
export const keepToken = (token) => sessionStorage.setItem(TOKEN, token);
export const dropToken = () => sessionStorage.removeItem(TOKEN);
export const address = (path) => new URL(path, API).pathname + new URL(path, API).search;

async function request(path, { method = "GET", body, signal } = {}) {
  const headers = hasToken() ? { authorization: `Bearer ${sessionStorage.getItem(TOKEN)}` } : {};
  if (body) headers["content-type"] = "application/json";
  const response = await fetch(new URL(path, API), { method, headers, body, signal, cache: "no-store" });
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Refused(response.status, told.error ?? `the coordinator answers ${response.status}`);
}

export async function ask(path, method = "GET", told = undefined) {
  const body = told && JSON.stringify(told);
  const response = await request(path, { method, body, signal: AbortSignal.timeout(ANSWER_MS) });
  return response.json();
}

// A file that a link cannot fetch because it needs the token.
export async function save(path, name) {
  const url = URL.createObjectURL(await (await request(path)).blob());
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

// News as they come, until the coordinator ends the stream; an error when it falls silent.
export async function* news() {
  const silence = new AbortController();
  let alarm = setTimeout(() => silence.abort(), SILENT_MS);
  try {
    const response = await request("events", { signal: silence.signal });
    let rest = "";
    for (const reader = response.body.pipeThrough(new TextDecoderStream()).getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(alarm);
      alarm = setTimeout(() => silence.abort(), SILENT_MS);
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part
          .split("\n")
          .filter((line) => line.startsWith("data: "))
          .map((line) => line.slice(6));
        if (data.length) yield JSON.parse(data.join("\n"));
      }
    }
  } finally {
    clearTimeout(alarm);
    silence.abort();
  }
}
