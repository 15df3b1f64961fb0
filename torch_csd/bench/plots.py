"""Pictures of a report's points: tokens/s and GB/s against the context, with the roof drawn in. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

COLORS = {
    "float32": "#7b5ea7", "bfloat16": "#1f6fb4", "float16": "#1f6fb4", "int8": "#2a9d58", "int4": "#e07b1a",
    "io_uring": "#1f6fb4", "pread": "#2a9d58", "fio": "#e07b1a",
}  # fmt: skip
OTHERS = ("#b0413e", "#6b6b6b", "#a0782c", "#4a7c7e")
METRICS = {"tokens_per_s": "tokens", "gb_per_s": "gbs"}


def draw(report: dict, directory: Path) -> list[Path]:
    """One PNG for each place and metric that has points: NAME-PLACE-METRIC.png. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    points = [point for row in report["rows"] for point in row["points"]]
    paths = []
    for place in dict.fromkeys(point["place"] for point in points):
        for metric in METRICS:
            chosen = [point for point in points if point["place"] == place and point[metric] is not None]
            if chosen:
                paths.append(_draw_one(report, directory, place, metric, chosen))
    return paths


def _draw_one(report: dict, directory: Path, place: str, metric: str, points: list[dict]) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    series: dict[str, list[dict]] = {}
    for point in sorted(points, key=lambda point: point["x"]):
        series.setdefault(point["series"], []).append(point)
    spare = iter(OTHERS * 4)
    for name, line in series.items():
        color = COLORS.get(name.split(",")[0]) or next(spare)
        x = [point["x"] for point in line]
        axes.plot(x, [point[metric] for point in line], marker="o", markersize=4, color=color, label=name)
        if metric == "tokens_per_s":
            roofed = [point for point in line if point["roofs"] and point["gb_per_s"]]
            if roofed:
                axes.plot(
                    [point["x"] for point in roofed],
                    [point[metric] * max(point["roofs"].values()) / point["gb_per_s"] for point in roofed],
                    linestyle="--", linewidth=1, color=color, label=f"{name}: at its best roof's GB/s",
                )  # fmt: skip
    if metric == "gb_per_s":
        _draw_roofs(axes, points)
    axes.set_xscale("log", base=2)
    shown = [y for line in axes.get_lines() for y in line.get_ydata()]
    if metric == "tokens_per_s" and max(shown) > 20 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    ticks = sorted({point["x"] for point in points})
    axes.set_xticks(ticks)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _amount(y)))
    axes.set_xlabel(report["plot_x"])
    axes.set_ylabel(report["plot_tokens"] if metric == "tokens_per_s" else "GB/s")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    machine = report["machine"]
    axes.set_title(f"{report['plot_title']}: {place}", fontsize=11, loc="left")
    figure.supxlabel(
        f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['io_engine']}, {machine['simd']}" + (", --quick" if machine["quick"] else ""),
        fontsize=7, color="#666666",
    )  # fmt: skip
    path = directory / f"{report['name']}-{place.replace(' ', '-')}-{METRICS[metric]}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_roofs(axes, points: list[dict]) -> None:
    """One line for each roof: at each x the median of what its rows stood beside."""
    names = dict.fromkeys(name for point in points for name in point["roofs"])
    for name, style in zip(names, ("--", ":", "-."), strict=False):
        by_x: dict[int, list[float]] = {}
        for point in points:
            if name in point["roofs"]:
                by_x.setdefault(point["x"], []).append(point["roofs"][name])
        x = sorted(by_x)
        y = [sorted(by_x[at])[len(by_x[at]) // 2] for at in x]
        axes.plot(x, y, linestyle=style, linewidth=1.2, color="black", label=f"roof: {name.split(',')[0]}")


def _amount(value: float) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


# ---- accuracy against bytes ------------------------------------------------------------------------------------

FAMILY_STYLES = {
    "exact": ("#222222", "*", "exact"),
    "sparf": ("#b0413e", "o", "SparF"),
    "sparf-sketch": ("#d98c2b", "s", "SparF, sketch"),
    "page": ("#1f6fb4", "D", "page top-k"),
    "page-sketch": ("#3aa7c9", "P", "page top-k, sketch"),
    "adaptive": ("#2a9d58", "^", "adaptive"),
    "adaptive-bounds": ("#8a8f1f", "<", "adaptive, bounds"),
    "h2o": ("#7b5ea7", "v", "H2O, in memory"),
    "window": ("#8a8a8a", "X", "sliding window, in memory"),
}
KL_MIN = 1e-6  # nats; what is below is drawn there


def draw_accuracy(report: dict, directory: Path) -> list[Path]:
    """One PNG for each context: recall and KL above bytes, a column for each kv_dtype. Returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    by_task: dict[str, list[dict]] = {}
    for row in report["rows"]:
        if row["value"] is not None:
            by_task.setdefault(row["figures"]["task"], []).append(row["figures"])
    return [_draw_task(report, directory, task, figures) for task, figures in by_task.items()]


def _draw_task(report: dict, directory: Path, task: str, figures: list[dict]) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    reference = next(each for each in figures if each["family"] == "reference")
    measured = [each for each in figures if each["family"] in FAMILY_STYLES]
    dtypes = list(dict.fromkeys(each["kv_dtype"] for each in measured))
    first = "recall" if reference["recall"] is not None else "perplexity"
    grid = {"sharex": True, "sharey": "row", "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(2, len(dtypes), figsize=(3.4 * len(dtypes) + 2.4, 6.4), **grid)
    for column, dtype in enumerate(dtypes):
        for panel, metric in ((axes[0][column], first), (axes[1][column], "kl")):
            for family, (color, marker, label) in FAMILY_STYLES.items():
                # What keeps tokens in memory knows no kv_dtype: it stands beside each.
                line = [e for e in measured if e["family"] == family and (e["in_memory"] or e["kv_dtype"] == dtype)]
                line.sort(key=_read_bytes)
                panel.plot(
                    [_read_bytes(each) for each in line],
                    [_shown(each, metric) for each in line],
                    color=color, marker=marker, markersize=11 if family == "exact" else 6.5, linewidth=1.3,
                    markerfacecolor="none", markeredgewidth=1.4,  # one may lie on another
                    linestyle="--" if line and line[0]["in_memory"] else "-", label=label,
                )  # fmt: skip
            panel.axvline(_read_bytes(reference), color="#222222", linewidth=0.8, linestyle=":")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _bytes(x)))
            panel.tick_params(axis="x", labelsize=7, rotation=45)
            panel.grid(alpha=0.25)
        axes[0][column].set_title(dtype, fontsize=10)
        axes[1][column].set_yscale("log")
    if first == "recall":
        axes[0][0].set_ylim(-4, 104)
        axes[0][0].set_ylabel(f"answers right, % of {reference['questions']}")
    else:
        axes[0][0].set_ylabel("perplexity")
    axes[1][0].set_ylabel("KL from exact attention, nats")
    handles = [handle for handle in axes[0][0].get_legend_handles_labels()[0] if len(handle.get_xdata())]
    figure.legend(handles=handles, fontsize=8, loc="outside right upper", frameon=False)
    figure.suptitle(f"{report['title'].partition(':')[0]}: {task}", fontsize=11, x=0.01, ha="left")
    machine = report["machine"]
    figure.supxlabel(
        f"{report['plot_x']}, drive and memory together; dotted: all of the {reference['kv_dtype']} cache\n"
        f"{machine['date']}, torch {machine['torch']}, {machine['io_engine']}, {machine['simd']}"
        + (", --quick" if machine["quick"] else ""),
        fontsize=7, color="#444444",
    )  # fmt: skip
    path = directory / f"{report['name']}-{task.replace(' ', '-')}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _shown(figures: dict, metric: str) -> float:
    return {"recall": 100 * (figures["recall"] or 0.0), "kl": max(figures["kl"], KL_MIN)}.get(metric, figures[metric])


def _read_bytes(figures: dict) -> float:
    return figures["drive_bytes_per_token"] + figures["memory_bytes_per_token"]


def _bytes(value: float) -> str:
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"
