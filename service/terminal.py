"""What a person sees in the terminal: finished lines, and one live line below them while something takes long.

On a terminal the live line is redrawn in place; anywhere else (a log, CI) it is printed now and then.
"""

import sys
import time
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
        self._drawn_at = 0.0

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
        now = time.monotonic()
        interval = REDRAW_SECONDS if self._redraws else PLAIN_SECONDS
        if now - since < SILENT_SECONDS or now - self._drawn_at < interval:
            return
        self._drawn_at = now
        drawing = bar(fraction) if fraction is not None else _wandering_bar(now - since)
        text = f"{label} {drawing} {now - since:.0f} s"
        if self._redraws:
            self._stream.write("\r\x1b[K" + text)
            self._live = text
        else:
            self._stream.write(text + "\n")
        self._stream.flush()

    def _clear(self) -> None:
        if self._live:
            self._stream.write("\r\x1b[K")
            self._live = ""
