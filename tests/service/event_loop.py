"""Where work runs that must not hold up the event loop."""

import asyncio
from typing import Any

import pytest


def watch_off_loop(monkeypatch: pytest.MonkeyPatch, seen: list[str], place: Any, name: str) -> None:
    """Have each call of `place.name` be noted in `seen`, and refused on an event loop's thread."""
    work = getattr(place, name)

    def watched(*given: Any, **options: Any) -> Any:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        seen.append(name)
        return work(*given, **options)

    monkeypatch.setattr(place, name, watched)
