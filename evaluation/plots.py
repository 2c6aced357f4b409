"""Pictures: the rank that each matrix kept and the singular values that decided it; a training run's losses and
refreshes of subspaces.

matplotlib is an extra (`plots`) and is imported when a picture is drawn.
"""

import importlib.util
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy

_IN_BLOCK = re.compile(r"\.(\d+)\.(.+)\Z")


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_ranks(kept: Mapping[str, float]) -> bytes:
    """A heat map, as PNG.

    Args:
        kept: share of the rank that stayed, by module path.
    """
    cells = {(layer, kind): share for name, share in kept.items() for layer, kind in [_split(name)]}
    layers = sorted({layer for layer, _ in cells})
    kinds = sorted({kind for _, kind in cells})
    values = numpy.array([[cells.get((a, b), numpy.nan) for a in layers] for b in kinds])
    figure, axes = _figure(0.28 * len(layers) + 3, 0.4 * len(kinds) + 1.6)
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xticks(range(0, len(layers), 5), layers[::5])
    axes.set_xlabel("block")
    axes.set_title("share of the rank that each matrix kept")
    figure.colorbar(image, ax=axes)
    return _png(figure)


def plot_spectra(spectra: Mapping[str, numpy.ndarray[Any, Any]], threshold: float | None) -> bytes:
    """Min-max normalised singular values, one panel per kind of matrix and one line per block, as PNG."""
    kinds = sorted({_split(name)[1] for name in spectra})
    num_layers = max(_split(name)[0] for name in spectra) + 1
    figure, panels = _figure(3 * len(kinds), 2.8, columns=len(kinds))
    colours = _colours(num_layers)
    for axes, kind in zip(numpy.atleast_1d(panels), kinds, strict=True):
        for name, values in spectra.items():
            layer, its_kind = _split(name)
            if its_kind != kind:
                continue
            low, high = values.min(), values.max()
            normalised = (values - low) / (high - low) if high > low else numpy.ones_like(values)
            x = numpy.linspace(0, 1, len(values))
            axes.plot(x, normalised, color=colours[layer], linewidth=0.7)
        if threshold is not None:
            axes.axhline(threshold, color="crimson", linewidth=0.8)
        axes.set_title(kind, fontsize=8)
        axes.set_xlabel("share of the rank", fontsize=7)
    return _png(figure)


def plot_losses(
    losses: Sequence[tuple[int, float]], evaluations: Sequence[tuple[int, float]]
) -> bytes:
    """Both as (step, loss), as PNG."""
    figure, axes = _figure(7, 3.2)
    if losses:
        axes.plot(*zip(*losses, strict=True), color="steelblue", linewidth=0.8, label="training")
    if evaluations:
        axes.plot(*zip(*evaluations, strict=True), "o-", color="crimson", label="evaluation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.legend()
    return _png(figure)


def plot_refreshes(refreshes: Sequence[tuple[int, int]], fixed: int) -> bytes:
    """Refreshes of subspaces so far, as (step, count), as PNG.

    Args:
        fixed: how many a fixed interval would have made in all.
    """
    figure, axes = _figure(7, 2.6)
    axes.plot(*zip(*refreshes, strict=True), drawstyle="steps-post", label="made")
    axes.axhline(fixed, color="grey", linestyle="--", label="with a fixed interval, at the end")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("refreshes")
    axes.legend()
    return _png(figure)


def _split(name: str) -> tuple[int, str]:
    found = _IN_BLOCK.search(name)
    assert found, name
    return int(found[1]), found[2]


def _figure(width: float, height: float, *, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _colours(count: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](numpy.linspace(0, 1, count))


def _png(figure: Any) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
