"""Figures as people read them: tokens, bytes, seconds, speeds."""


def tokens(count: int) -> str:
    """Write a token count with its unit: `1 token`, `8,192 tokens`."""
    return counted(count, "token")


def counted(count: int, thing: str) -> str:
    """Write a count of things: `1 question`, `1,024 questions`."""
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def size(num_bytes: int) -> str:
    """Write a number of bytes in binary units: `512 B`, `1.4 MiB`."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def speed(num_tokens: int, elapsed_s: float) -> str:
    """Write tokens per second; `-` before anything was measured."""
    if num_tokens <= 0 or elapsed_s <= 0:
        return "-"
    value = num_tokens / elapsed_s
    return f"{value:,.0f} tokens/s" if value >= 100 else f"{value:.1f} tokens/s"


def duration(seconds: float) -> str:
    """Write a duration: `0.4 s`, `12 s`, `3:05 min`, `1:02:03 h`, `3 days 4 h`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d} h"
