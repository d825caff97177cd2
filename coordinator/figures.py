"""Numbers and foreign text as people read them: numbers short and with their unit, text without surprises."""

from __future__ import annotations

import math


def size_text(n_bytes: float) -> str:
    """Bytes in decimal units with two digits at least: 999 B, 1.2 MB, 456 GB; nothing for none."""
    if n_bytes <= 0:
        return ""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    power = min(4, int(math.log10(n_bytes) + 0.0003) // 3)  # 999.5 kB reads 1.0 MB
    value = n_bytes / 1000**power
    return f"{value:.{1 if value < 9.95 else 0}f} {('', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration_text(seconds: float) -> str:
    """Seconds as a clock: 0:07, 12:05, 3:04:05; days in front of it if there are any."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def energy_text(joules: float) -> str:
    """Joules in watt hours with two digits at least: 0.42 Wh, 35 Wh, 1.2 kWh; nothing for none."""
    hours = joules / 3600
    if hours < 0.005:
        return ""
    if hours < 0.95:
        return f"{hours:.2f} Wh"
    power = min(2, int(math.log10(hours) + 0.0003) // 3) if hours >= 1 else 0
    value = hours / 1000**power
    return f"{value:.{1 if value < 9.95 else 0}f} {('', 'k', 'M')[power]}Wh"


def loss_text(loss: float | None) -> str:
    """A loss with three decimals; a dash where there is none."""
    return "–" if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def plain(text: str) -> str:
    """Text from elsewhere for a terminal: one line, and no character that could steer the terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def sparkline(values: list[float]) -> str:
    """One block per value, the lowest value lowest; the last 24 of them."""
    shown = values[-24:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in shown)


def step_text(seconds: float) -> str:
    """Seconds of one step with three digits: 0.82 s, 14.2 s; nothing for none."""
    return f"{seconds:.3g} s" if seconds > 0 else ""


def share_text(ratio: float | None) -> str:
    """A ratio in percent; a dash where there is none."""
    return "–" if ratio is None or not math.isfinite(ratio) else f"{100 * ratio:.3g} %"


def error_text(measured: float, predicted: float) -> str:
    """How far a measurement is from its prediction: +12 %; nothing where one of them is missing."""
    if measured <= 0 or predicted <= 0:
        return ""
    return f"{100 * (measured / predicted - 1):+.0f} %".replace("-", "\N{MINUS SIGN}")
