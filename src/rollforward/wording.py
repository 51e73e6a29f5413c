"""How numbers are written for people: counts, bytes, durations."""


def counted(count: int, what: str) -> str:
    """`no steps`, `1 step`, `2 steps`."""
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def in_bytes(count: float) -> str:
    """`3.1 MB`, powers of ten."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def in_minutes(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
