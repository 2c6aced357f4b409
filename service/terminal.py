"""What a person sees in the terminal: finished lines, and one live line below them while something takes long.

On a terminal the live line is redrawn in place; anywhere else (a log, CI) it is printed now and then.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TextIO

BAR_WIDTH = 24
SILENT_SECONDS = 2.0
"""What is done sooner needs no progress."""
REDRAW_SECONDS = 0.1
PLAIN_SECONDS = 5.0
"""Between two lines of progress where nothing can be redrawn."""


def bar(fraction: float) -> str:
    """Draw a share in [0, 1] as `[#####...] 21%`."""
    filled = round(max(0.0, min(1.0, fraction)) * BAR_WIDTH)
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {fraction:4.0%}"


_LEVELS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 20) -> str:
    """The course of some numbers, between their least and their largest; each mark is the mean of its share."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _LEVELS[0] * width
    steps = len(_LEVELS) - 1
    return "".join(_LEVELS[round((mean - low) / (high - low) * steps)] for mean in means)


def clock(seconds: float) -> str:
    """A duration as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _wandering_bar(seconds: float) -> str:
    """For what cannot say how far it is: shows only that time passes."""
    place = round(seconds / (2 * REDRAW_SECONDS)) % BAR_WIDTH
    return f"[{'.' * place}#{'.' * (BAR_WIDTH - 1 - place)}]"


class Terminal:
    """Writes lines and at most one live line. Not thread-safe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._redraws = self._stream.isatty()
        self._live = ""
        self._drawn_at = float("-inf")

    @property
    def can_draw_lines(self) -> bool:
        """Whether the characters of `sparkline` get through."""
        return (self._stream.encoding or "").lower().startswith("utf")

    def line(self, text: str = "") -> None:
        """Print a line that stays."""
        self._clear()
        self._stream.write(text + "\n")
        self._stream.flush()

    def progress(self, label: str, fraction: float | None, since: float) -> None:
        """Show how far something is; nothing in its first two seconds.

        Args:
            fraction: share done in [0, 1], or None where it is unknown.
            since: `time.monotonic()` at its start.
        """
        seconds = time.monotonic() - since
        if seconds >= SILENT_SECONDS:
            drawing = bar(fraction) if fraction is not None else _wandering_bar(seconds)
            self.live(f"{label} {drawing} {seconds:.0f} s")

    def live(self, text: str) -> None:
        """Show a text on the live line, unless it was drawn just now."""
        now = time.monotonic()
        if now - self._drawn_at < (REDRAW_SECONDS if self._redraws else PLAIN_SECONDS):
            return
        self._drawn_at = now
        if self._redraws:
            text = text[: shutil.get_terminal_size().columns - 1]  # what wraps cannot be redrawn
            self._stream.write("\r\x1b[K" + text)
            self._live = text
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._live = ""
