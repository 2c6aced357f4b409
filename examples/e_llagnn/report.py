"""Rows as Markdown tables and as plots. Differences are of pairs: the same seed, split and model on raw features."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
PNG_DPI = 80


def markdown(rows: Sequence[Row]) -> str:
    """All tables that the rows have anything for."""
    parts = [table(rows) for table in (_budgets, _ablations, _scorers, _depth, _modes)]
    return "\n\n".join(part for part in parts if part)


def raw_row(rows: Iterable[Row], row: Row) -> Row | None:
    """The run on raw features, all neighbours, that a run is compared with."""
    alike = ("split", "model", "num_layers", "seed")
    return next(
        (
            other
            for other in rows
            if other["budget"] == 0
            and other["scorer"] is None
            and all(other[name] == row[name] for name in alike)
        ),
        None,
    )


def mean_and_deviation(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ±{np.std(values, ddof=1):.2f}"


def _against_raw(rows: Sequence[Row], group: Sequence[Row], field: str) -> str:
    """Mean and deviation of a field; mean and standard error of its paired difference to raw features."""
    pairs = [(row[field], raw[field]) for row in group if (raw := raw_row(rows, row)) is not None]
    text = mean_and_deviation([row[field] for row in group])
    if not pairs:
        return text
    differences = np.array([enriched - raw for enriched, raw in pairs])
    if len(pairs) == 1:
        return f"{text} ({differences[0]:+.2f})"
    error = differences.std(ddof=1) / np.sqrt(len(pairs))
    return f"{text} ({differences.mean():+.2f} ±{error:.2f})"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def _distinct(rows: Iterable[Row], of: Callable[[Row], Any]) -> list[Any]:
    return list(dict.fromkeys(of(row) for row in rows))


def _recipe(row: Row) -> str:
    recipe = row["recipe"]
    return (
        f"{recipe['prompt']} by {recipe['model']}, {recipe['join']}, {recipe['max_tokens']} tokens"
    )


def _budgets(rows: Sequence[Row]) -> str:
    parts = []
    studied = [row for row in rows if "budgets" in row["studies"] and row["recipe"]]
    for recipe in _distinct(studied, _recipe):
        chosen = [row for row in studied if _recipe(row) == recipe]
        for split in _distinct(chosen, lambda row: row["split"]):
            for model in _distinct(chosen, lambda row: row["model"]):
                group = [r for r in chosen if r["split"] == split and r["model"] == model]
                if group:
                    title = f"### {model.upper()}, split {split}: {recipe}"
                    parts.append(f"{title}\n\n{_budget_table(rows, group)}")
    return "\n\n".join(parts)


def _budget_table(rows: Sequence[Row], group: Sequence[Row]) -> str:
    budgets = sorted(_distinct(group, lambda row: row["budget"]))
    raws = {row["seed"]: raw for row in group if (raw := raw_row(rows, row)) is not None}
    lines = [["raw", mean_and_deviation([raw["with_llm"] for raw in raws.values()])]]
    lines[0] += [""] * (len(budgets) - 1)
    for field, name in (("with_llm", ""), ("llm_free", ", LLM-free")):
        for strategy in _distinct(group, lambda row: row["strategy"]):
            cells = []
            for budget in budgets:
                same = [
                    row
                    for row in group
                    if row["budget"] == budget and (budget == 1 or row["strategy"] == strategy)
                ]
                cells.append(_against_raw(rows, same, field) if same else "")
            lines.append([strategy + name, *cells])
    return _table(["", *(f"{budget:.0%}" for budget in budgets)], lines)


def _ablations(rows: Sequence[Row]) -> str:
    lines: dict[str, list[list[str]]] = {}
    for study in ("joins", "prompts", "llms"):
        studied = [row for row in rows if row["recipe"] and study in row["studies"]]
        for split in _distinct(studied, lambda row: row["split"]):
            for recipe in _distinct(studied, _recipe):
                group = [r for r in studied if r["split"] == split and _recipe(r) == recipe]
                lines.setdefault(study, []).append(
                    [
                        split,
                        recipe,
                        f"{group[0]['budget']:.0%}",
                        *(_against_raw(rows, group, f) for f in ("val", "with_llm", "llm_free")),
                    ]
                    if group
                    else []
                )
    header = ["split", "enrichment", "nodes", "validation", "test, with LLM", "test, LLM-free"]
    return "\n\n".join(
        f"### {study.capitalize()}\n\n{_table(header, [line for line in found if line])}"
        for study, found in lines.items()
    )


def _scorers(rows: Sequence[Row]) -> str:
    lines = []
    studied = [row for row in rows if row["scorer"] is not None]
    for split in _distinct(studied, lambda row: row["split"]):
        for scorer in _distinct(studied, lambda row: row["scorer"]):
            group = [row for row in studied if row["split"] == split and row["scorer"] == scorer]
            if group:
                cost = group[0]["sample_cost"]
                lines.append(
                    [
                        split,
                        scorer,
                        f"{np.mean([row['num_kept_edges'] for row in group]):,.0f}",
                        f"{cost['num_calls']:,.0f} calls, {cost['prompt_tokens']:,.0f} tokens",
                        *(_against_raw(rows, group, field) for field in ("val", "with_llm")),
                    ]
                )
    if not lines:
        return ""
    header = ["split", "scorer", "kept edges", "cost, first seed", "validation", "test"]
    return f"### Judged neighbourhoods, raw features\n\n{_table(header, lines)}"


def _depth(rows: Sequence[Row]) -> str:
    studied = [row for row in rows if "depth" in row["studies"]]
    lines = []
    for layers in sorted(_distinct(studied, lambda row: row["num_layers"])):
        for budget in sorted(_distinct(studied, lambda row: row["budget"])):
            group = [r for r in studied if r["num_layers"] == layers and r["budget"] == budget]
            if group:
                norms = np.array([row["gradient_norms"] for row in group])
                lines.append(
                    [
                        str(layers),
                        f"{budget:.0%}" if budget else "raw",
                        _against_raw(rows, group, "with_llm")
                        if budget
                        else mean_and_deviation([row["with_llm"] for row in group]),
                        *(f"{value:.3g}" for value in geometric_mean(norms)[[0, layers // 2, -1]]),
                    ]
                )
    if not lines:
        return ""
    header = ["layers", "enriched", "test, with LLM", "‖∂L/∂W₁‖", "middle layer", "last layer"]
    return f"### Depth, GCN\n\n{_table(header, lines)}"


def geometric_mean(values: Any) -> Any:
    """Over the first axis."""
    return np.exp(np.log(np.maximum(values, 1e-30)).mean(axis=0))


def _modes(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if "modes" not in row["studies"]:
            continue
        if row["overlap"]:
            moments = row["moments"]
            ready = next((m[0] for m in moments if m[1] == moments[-1][1]), 0.0)
            lines.append(
                [
                    "overlap",
                    f"{row['num_enriched'] - row['num_known_before']} of {row['num_enriched']}",
                    f"{moments[0][0]:.1f}",
                    f"{ready:.1f}",
                    f"{row['train_seconds']:.1f}",
                    str(row["num_epochs"]),
                    f"{row['with_llm']:.2f}",
                ]
            )
        else:
            wait = row["wait_seconds"]
            lines.append(
                [
                    "blocking",
                    "",
                    f"{wait:.1f}",
                    f"{wait:.1f}",
                    f"{wait + row['train_seconds']:.1f}",
                    str(row["num_epochs"]),
                    f"{row['with_llm']:.2f}",
                ]
            )
    if not lines:
        return ""
    header = ["mode", "asked now", "first epoch, s", "all enriched, s", "end, s", "epochs", "test"]
    return f"### Modes\n\n{_table(header, lines)}"


def plot(rows: Sequence[Row], folder: Path, name: str) -> None:
    """Budgets and depth as PNG files, for what the rows have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    budgets = [row for row in rows if "budgets" in row["studies"] and row["recipe"]]
    splits = _distinct(budgets, lambda row: row["split"])
    models = _distinct(budgets, lambda row: row["model"])
    if budgets:
        figure, axes = pyplot.subplots(
            len(splits),
            len(models),
            figsize=(4 * len(models), 3.2 * len(splits)),
            squeeze=False,
            layout="constrained",
        )
        for split, line in zip(splits, axes, strict=True):
            for model, axis in zip(models, line, strict=True):
                _plot_budgets(
                    axis,
                    rows,
                    [r for r in budgets if r["split"] == split and r["model"] == model],
                    f"{model.upper()}, {split}",
                )
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        _save(figure, folder / f"{name}_budgets.png")
    depth = [row for row in rows if "depth" in row["studies"]]
    if depth:
        figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
        _plot_depth(axes, depth)
        _save(figure, folder / f"{name}_depth.png")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PNG_DPI)
    pyplot.close(figure)


def _plot_budgets(axis: Any, rows: Sequence[Row], group: Sequence[Row], title: str) -> None:
    raws = [raw["with_llm"] for row in group if (raw := raw_row(rows, row)) is not None]
    mean, deviation = np.mean(raws), np.std(raws)
    axis.axhline(mean, color="black", linestyle=":", label="raw, ± one deviation")
    axis.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
    for strategy in _distinct(group, lambda row: row["strategy"]):
        points = []
        for budget in sorted(_distinct(group, lambda row: row["budget"])):
            values = [
                row["with_llm"]
                for row in group
                if row["budget"] == budget and (budget == 1 or row["strategy"] == strategy)
            ]
            if values:
                points.append((100 * budget, np.mean(values)))
        axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=strategy)
    axis.set(xscale="log", title=title, xlabel="% of nodes enriched", ylabel="test accuracy, %")
    budgets = sorted(_distinct(group, lambda row: row["budget"]))
    _set_ticks(axis, [100 * budget for budget in budgets])


def _plot_depth(axes: Any, depth: Sequence[Row]) -> None:
    budgets = sorted(_distinct(depth, lambda row: row["budget"]))
    layers = sorted(_distinct(depth, lambda row: row["num_layers"]))
    for budget in budgets:
        name = f"{budget:.0%} enriched" if budget else "raw"
        groups = [
            [row for row in depth if row["budget"] == budget and row["num_layers"] == number]
            for number in layers
        ]
        accuracy = [np.mean([row["with_llm"] for row in group]) for group in groups]
        norms = [geometric_mean(np.array([r["gradient_norms"] for r in group])) for group in groups]
        axes[0].plot(layers, accuracy, marker="o", label=name)
        axes[1].plot(layers, [norm[0] for norm in norms], marker="o", label=name)
        axes[2].plot(range(1, layers[-1] + 1), norms[-1], label=name)
    axes[0].set(title="GCN by depth", xscale="log", xlabel="layers", ylabel="test accuracy, %")
    axes[1].set(title="first layer's gradient", xscale="log", yscale="log", xlabel="layers")
    _set_ticks(axes[0], layers)
    _set_ticks(axes[1], layers)
    axes[1].set(ylabel="‖∂L/∂W₁‖")
    axes[2].set(title=f"gradients of {layers[-1]} layers", yscale="log", xlabel="layer l")
    axes[2].set(ylabel="‖∂L/∂W_l‖")
    axes[0].legend(fontsize=7)


def _set_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis where there are points, and nowhere else."""
    axis.set_xticks(values, [f"{value:g}" for value in values])
    axis.minorticks_off()
