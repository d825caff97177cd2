// Numbers as people read them, with the same digits as the command line's (coordinator/figures.py).

const UNITS = ["", "kB", "MB", "GB", "TB"];
export const NONE = "–";

export function size(bytes) {
  if (!(bytes > 0)) return "";
  if (bytes < 1000) return `${bytes.toFixed(0)} B`;
  const power = Math.min(4, Math.floor(Math.floor(Math.log10(bytes) + 0.0003) / 3));
  const value = bytes / 1000 ** power;
  return `${value.toFixed(value < 9.95 ? 1 : 0)} ${UNITS[power]}`;
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const two = (n) => String(n).padStart(2, "0");
  const [second, minute, hour, day] = [
    whole % 60,
    Math.floor(whole / 60) % 60,
    Math.floor(whole / 3600) % 24,
    Math.floor(whole / 86400),
  ];
  if (day) return `${day} d ${hour}:${two(minute)}`;
  return hour ? `${hour}:${two(minute)}:${two(second)}` : `${minute}:${two(second)}`;
}

export function ago(seconds) {
  if (!(seconds >= 0)) return NONE;
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 3600) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 86400 ? `${(seconds / 3600).toFixed(1)} h ago` : `${(seconds / 86400).toFixed(1)} d ago`;
}

// A time to come, in its largest unit.
export function span(seconds) {
  if (seconds < 3600) return `${Math.round(seconds / 60)} min`;
  return seconds < 172_800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

export const loss = (value) => (Number.isFinite(value) ? value.toFixed(3) : NONE);
export const count = (value) => value.toLocaleString("en-US");
export const percent = (ratio) => (Number.isFinite(ratio) ? `${Number((100 * ratio).toPrecision(3))} %` : NONE);
export const money = (value) => value.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });

export function energy(joules) {
  const hours = joules / 3600;
  if (!(hours >= 0.005)) return "";
  if (hours < 0.95) return `${hours.toFixed(2)} Wh`;
  const power = Math.min(2, Math.floor(Math.floor(Math.log10(Math.max(1, hours)) + 0.0003) / 3));
  const value = hours / 1000 ** power;
  return `${value.toFixed(value < 9.95 ? 1 : 0)} ${["", "k", "M"][power]}Wh`;
}

export const hours = (seconds) => `${(seconds / 3600).toFixed(seconds < 36000 ? 2 : 0)} h`;
export const clock = (at) => new Date(1000 * at).toLocaleTimeString("en-GB");
export const moment = (at) => new Date(1000 * at).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
export const rank = (value) =>
  value <= 0 ? "·" : value >= 100 || value === Math.round(value) ? value.toFixed(0) : value.toFixed(1);
export const words = (state) => state.toLowerCase().replaceAll("_", " ");
export const some = (n, thing) => `${count(n)} ${thing}${n === 1 ? "" : "s"}`;
export const mean = (values) =>
  values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : undefined;
