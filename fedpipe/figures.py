"""Numbers as people read them: short, with their unit, always the same width class."""

from __future__ import annotations

import math


def size_text(n_bytes: float) -> str:
    """Bytes in decimal units with three digits: 999 B, 1.23 MB, 45.6 GB; nothing for none."""
    if n_bytes <= 0:
        return ""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    for unit in ("kB", "MB", "GB", "TB"):
        n_bytes /= 1000
        if n_bytes < 999.5:
            break
    digits = 2 if n_bytes < 9.995 else 1 if n_bytes < 99.95 else 0
    return f"{n_bytes:.{digits}f} {unit}"


def duration_text(seconds: float) -> str:
    """Seconds as a clock: 0:07, 12:05, 3:04:05; days in front of it if there are any."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def loss_text(loss: float | None) -> str:
    """A loss with three decimals; a dash where there is none."""
    return "–" if loss is None or not math.isfinite(loss) else f"{loss:.3f}"


def sparkline(values: list[float]) -> str:
    """One block per value, the lowest value lowest; the last 24 of them."""
    shown = values[-24:]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    span = (high - low) or 1.0
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span)] for value in shown)
