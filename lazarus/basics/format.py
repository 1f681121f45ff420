"""Format numbers for people."""

from __future__ import annotations


def bytes_text(count: float) -> str:
    """Format a number of bytes, as 3.3 GiB, 12.0 MiB or 512 B."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def bytes_of_text(text: str) -> int:
    """The number of bytes in a text such as 5GB, 500 MB, 2GiB or 4096. GB is 10^9, GiB 2^30.

    Raises:
        ValueError: The text has another form, or is no positive size.
    """
    number = text.strip().rstrip("BbIiKkMmGgTt")
    unit = text.strip()[len(number) :].upper().removesuffix("B")
    powers = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
    try:
        base = 1024 if unit.endswith("I") else 1000
        count = int(float(number) * base ** powers[unit.removesuffix("I")])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        raise ValueError(f"{text!r} is no size, such as 5GB or 500MB")
    return count


def count_text(count: float) -> str:
    """Format a count, as 181k, 3.2M or 950."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            value = count / size
            return f"{value:.0f}{unit}" if value >= 100 else f"{value:.1f}{unit}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    """Format a duration, as 0.31 s, 42 s, 5 min or 30 h 41 min."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun, as 1 step or 2 steps."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def loss_text(loss: float | None) -> str:
    """Format a loss, as 2.417. Records hold null (None) for a loss that is not finite."""
    return "not finite" if loss is None else f"{loss:.3f}"
