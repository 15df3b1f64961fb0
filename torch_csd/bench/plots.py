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
