"""How numbers are written in the report and on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(value: float) -> str:
    """Return a share as a percentage with two digits."""
    return f"{100 * value:.2f} %"


def counted(count: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{count} {noun}{'s' * (count != 1)}"


def interval(pair: Sequence[float], scale: float = 1.0, digits: int = 3) -> str:
    """Return an interval in brackets, its ends times `scale`."""
    return f"[{scale * pair[0]:.{digits}f}, {scale * pair[1]:.{digits}f}]"


def ratio(row: dict[str, Any]) -> str:
    """Return a Fréchet ratio with the deviation that its floor gives it."""
    return f"{row['ratio_to_floor']:.2f} ± {row['deviation']:.2f}"


def worse_first(
    judges: dict[str, dict[str, Any]], badness: Callable[[dict[str, Any]], float]
) -> list[tuple[str, dict[str, Any]]]:
    """Return the judges' items, those that find the larger badness first."""
    return sorted(judges.items(), key=lambda item: -badness(item[1]))
