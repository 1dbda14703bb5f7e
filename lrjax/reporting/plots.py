"""The pictures of the report: every function takes plain numbers and returns the bytes of a PNG.

    png = needle_heat_map({"base": cells, "longrecipe": cells}, window=64)
    png = needle_heat_map({"base": cells, "longrecipe": cells}, window=64, theme="dark")

The same numbers give the same bytes. Pictures are drawn at twice the density of the page they stand on (WIDTH
inches of 100 page pixels), in a light and a dark theme whose paper is that of `report.html.jinja`. Colours are
those of Okabe and Ito and the map cividis, which the colour-blind tell apart.
"""

import functools
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

WIDTH = 10.4  # inches
DENSITY = 200  # dots per inch: two for each pixel of the page
THEMES = {
    "light": {"ink": "#1c2530", "muted": "#5b6875", "grid": "#e2e6ea", "paper": "#ffffff"},
    "dark": {"ink": "#e8ebef", "muted": "#9aa6b3", "grid": "#323a44", "paper": "#181d23"},
}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C")
WINDOW_COLOUR = "#D55E00"
DASHES = ("-", "--", ":", "-.")


def _picture(draw):
    """Makes a function that draws and returns a figure one that returns a PNG, with a keyword `theme`."""

    @functools.wraps(draw)
    def picture(*args, theme: str = "light", **kwargs) -> bytes:
        import matplotlib

        with matplotlib.rc_context(_style(THEMES[theme])):
            buffer = io.BytesIO()
            # Without the version of matplotlib in it, the file depends on the numbers alone.
            draw(*args, **kwargs).savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()

    return picture


def _style(theme: Mapping[str, str]) -> dict:
    return {
        "figure.dpi": DENSITY,
        "savefig.dpi": DENSITY,
        "figure.facecolor": theme["paper"],
        "savefig.facecolor": theme["paper"],
        "axes.facecolor": theme["paper"],
        "font.family": "DejaVu Sans",
        "font.size": 8.5,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.titlecolor": theme["ink"],
        "axes.labelsize": 8.5,
        "axes.labelcolor": theme["muted"],
        "axes.edgecolor": theme["grid"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme["grid"],
        "grid.linewidth": 0.7,
        "text.color": theme["ink"],
        "xtick.color": theme["grid"],
        "ytick.color": theme["grid"],
        "xtick.labelcolor": theme["muted"],
        "ytick.labelcolor": theme["muted"],
        "lines.linewidth": 1.5,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "legend.fontsize": 8,
        "text.parse_math": False,  # a dollar in a name is a dollar
    }


def _axes(rows: int, columns: int, height: float, used: int | None = None, **share):
    """A figure of the page's width with rows x columns axes, and the first `used` of them, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **share)
    flat = list(grid.flat)
    for ax in flat[used:] if used is not None else ():
        ax.remove()
    return figure, flat[:used]


def _count_axis(axis) -> None:
    """Plain numbers with thousands separators, few of them, whole."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _position_axis(axis, stop: int, parts: int = 4) -> None:
    """Quarters (or halves) of a window: its lengths are seldom round in tens."""
    _count_axis(axis)
    axis.set_ticks(np.unique(np.linspace(0, stop, parts + 1).astype(int)))


def _line_style(index: int) -> dict:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % 4]}


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _heat_map(ax, values, text, low: float, high: float) -> None:
    """A cell for each of `values` [rows, columns], coloured from `low` to `high`, with `text(value)` in it."""
    import matplotlib

    ax.imshow(values, cmap=matplotlib.colormaps["cividis"], vmin=low, vmax=high, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = value < high - 0.45 * (high - low)  # where all are alike, none is
            ax.text(
                column, row, text(value), ha="center", va="center", fontsize=7.5,
                color="#ffffff" if dark else "#101418",
            )  # fmt: skip
    # Gaps of paper between the cells.
    ax.set_xticks(np.arange(values.shape[1] + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(values.shape[0] + 1) - 0.5, minor=True)
    ax.grid(False, which="major")
    ax.grid(True, which="minor", color=matplotlib.rcParams["axes.facecolor"], linewidth=1.5)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)


@_picture
def needle_heat_map(cells: Mapping[str, Sequence[Mapping]], window: int | None = None):
    """Share of needles found over length (across) and depth (down), a panel for each checkpoint.

    Args:
        cells: label -> [{"length", "depth" in [0, 1], "correct", "count"}, ...].
        window: tokens the base was trained for; a line stands between the lengths inside and beyond.
    """
    every = [cell for panel in cells.values() for cell in panel]
    lengths = sorted({int(cell["length"]) for cell in every})
    depths = sorted({float(cell["depth"]) for cell in every})
    columns = min(len(cells), 4 if len(lengths) <= 6 else 2 if len(lengths) <= 12 else 1)
    rows = math.ceil(len(cells) / columns)
    height = rows * (0.55 + 0.27 * len(depths)) + 0.35
    figure, axes = _axes(rows, columns, height, used=len(cells))
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.06)
    inside = sum(length <= window for length in lengths) if window else 0
    for index, (ax, (label, panel)) in enumerate(zip(axes, cells.items(), strict=True)):
        shares = np.full((len(depths), len(lengths)), np.nan)
        for cell in panel:
            where = depths.index(float(cell["depth"])), lengths.index(int(cell["length"]))
            shares[where] = cell["correct"] / cell["count"] if cell["count"] else np.nan
        _heat_map(ax, shares, _percent, 0, 1)
        ax.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        ax.set_yticks(range(len(depths)), [f"{_percent(depth)} %" for depth in depths])
        if index % columns:
            ax.tick_params(labelleft=False)
        else:
            ax.set_ylabel("depth")
        if index >= len(cells) - columns:
            ax.set_xlabel("prompt tokens")
        if 0 < inside < len(lengths):
            ax.axvline(inside - 0.5, color=WINDOW_COLOUR, linewidth=2)
        ax.set_title(label)
    return figure


@_picture
def method_bars(accuracies: Mapping[str, Mapping[int, Sequence[float]]], window: int | None = None):
    """Needles found by method with intervals, a panel for each length.

    Args:
        accuracies: label -> {length: (share, low, high)}; a length may be missing.
    """
    lengths = sorted({length for row in accuracies.values() for length in row})[-4:]
    labels = list(accuracies)
    height = 0.75 + 0.26 * len(labels)
    figure, axes = _axes(1, len(lengths), height, sharey=True)
    for ax, length in zip(axes, lengths, strict=True):
        for row, label in enumerate(labels):
            if length not in accuracies[label]:
                continue
            share, low, high = (100 * value for value in accuracies[label][length])
            colour = COLOURS[6] if row == 0 else COLOURS[0]
            ax.barh(row, share, height=0.62, color=colour, alpha=0.35)
            ax.plot([low, high], [row, row], color=colour, linewidth=2)
            ax.plot(share, row, "o", color=colour, markersize=4)
        beyond = f" ({length / window:g} x the window)" if window and length > window else ""
        ax.set_title(f"{length:,} tokens{beyond}")
        ax.set_xlim(0, 102)
        ax.set_xticks([0, 25, 50, 75, 100])
        ax.grid(False, axis="y")
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.set_xlabel("needles found, %")
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    return figure


@_picture
def position_plots(samples: Mapping[str, Sequence], window: int | None, target: int):
    """For each transform: position over index for a few drawn samples; how often each part of the window is used; how
    far apart two tokens of a sample are.

    Args:
        samples: transform -> integer arrays [L], one for each sample.
        window: tokens of the base; target: positions below which all samples lie.
    """
    columns = min(len(samples), 5)
    bands = math.ceil(len(samples) / columns)
    figure, axes = _axes(3 * bands, columns, 5.6 * bands, sharey="row")
    grid = np.array(axes).reshape(bands, 3, columns)
    for ax in (
        ax
        for at in range(len(samples), bands * columns)
        for ax in grid[at // columns, :, at % columns]
    ):
        ax.remove()
    bins = np.linspace(0, target, 41)
    for index, (name, drawn) in enumerate(samples.items()):
        band, column = divmod(index, columns)
        top, *histograms = grid[band, :, column]
        drawn = [np.asarray(sample) for sample in drawn]
        for sample in drawn[:6]:
            top.plot(sample, color=COLOURS[0], alpha=0.55, linewidth=1)
        distances = [_pair_distances(sample) for sample in drawn]
        for ax, values in zip(histograms, (drawn, distances), strict=True):
            share, _ = np.histogram(np.concatenate(values), bins=bins)
            share = 100 * share / max(share.sum(), 1)
            ax.stairs(share, bins, fill=True, color=COLOURS[0], alpha=0.8)
            ax.set_xlim(0, target)
        if window and window < target:
            top.axhline(window, color=WINDOW_COLOUR, linewidth=1.2, linestyle="--")
            for ax in histograms:
                ax.axvline(window, color=WINDOW_COLOUR, linewidth=1.2, linestyle="--")
        top.set_title(name)
        top.set_ylim(0, target)
        top.set_xlim(left=0)
        top.set_xlabel("index in the row")
        histograms[0].set_xlabel("position")
        histograms[1].set_xlabel("distance of two tokens")
        _position_axis(top.yaxis, target)
        for ax in (top, *histograms):
            _position_axis(ax.xaxis, target, parts=4 if columns < 4 else 2)
        if not column:
            for ax, label in zip(
                (top, *histograms), ("position", "tokens, %", "pairs, %"), strict=True
            ):
                ax.set_ylabel(label)
    return figure


def _pair_distances(positions: np.ndarray, most: int = 400) -> np.ndarray:
    """Distances of all pairs among at most `most` evenly spaced tokens."""
    few = positions[np.unique(np.linspace(0, len(positions) - 1, most).astype(int))]
    first, second = np.triu_indices(len(few), 1)
    return few[second] - few[first]


@_picture
def class_frequency(frequency: Mapping, most: int = 6):
    """The share of each class among the most changed tokens over the position, with its interval (the paper's figure of
    section 3): the classes that are most frequent there.

    Args:
        frequency: {"start": first position of each range, "classes": {name: {"share", "low", "high"}}}, None where a
            range has no such token (`lrjax.longrecipe.frequency.class_frequency`).
        most: classes to draw.
    """
    figure, (ax,) = _axes(1, 1, 3.2)

    def values(row, name):
        return 100 * np.array([np.nan if v is None else v for v in row[name]])

    classes = frequency["classes"]
    names = sorted(classes, key=lambda name: -np.nanmean(values(classes[name], "share")))[:most]
    for index, name in enumerate(names):
        share, low, high = (values(classes[name], key) for key in ("share", "low", "high"))
        ax.plot(frequency["start"], share, label=name, **_line_style(index))
        ax.fill_between(
            frequency["start"],
            low,
            high,
            color=COLOURS[index % len(COLOURS)],
            alpha=0.18,
            linewidth=0,
        )
    ax.set_ylim(bottom=0)
    ax.set_ylabel("of the most changed tokens, %")
    ax.set_xlabel("position in the document")
    _count_axis(ax.xaxis)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_picture
def loss_curves(panels: Mapping[str, Mapping[str, Sequence]]):
    """Training loss by step.

    Args:
        panels: title -> {label: [(step, loss), ...]}.
    """
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure, axes = _axes(rows, columns, 2.75 * rows, used=len(panels))
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for index, (label, points) in enumerate(lines.items()):
            steps, losses = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else None
            ax.plot(steps, losses, label=label, marker=marker, **_line_style(index))
        ax.set_title(title)
        ax.set_xlabel("step")
        _count_axis(ax.xaxis)
        if len(lines) > 1:
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.28), "ncols": 2}
            ax.legend(handlelength=1.8, columnspacing=1, **(below if len(lines) > 4 else {}))
    for ax in axes[::columns]:
        ax.set_ylabel("loss, nats a token")
    return figure


@_picture
def merge_curve(points: Sequence[Mapping], length: int | None = None):
    """What the weight of the base in the merge does: needles found, and losses in the short window.

    Args:
        points: [{"weight", "needle": (share, low, high), "losses": {source: nats a token}}, ...]; without the
            needle or the losses their panel is left out.
        length: tokens of the needle prompts.
    """
    points = sorted(points, key=lambda point: point["weight"])
    weights = [point["weight"] for point in points]
    figure, axes = _axes(1, ("needle" in points[0]) + ("losses" in points[0]), 2.9)
    if "needle" in points[0]:
        ax = axes[0]
        share, low, high = 100 * np.array([point["needle"] for point in points]).T
        ax.vlines(weights, low, high, color=COLOURS[0], alpha=0.4, linewidth=3)
        ax.plot(weights, share, "o-", color=COLOURS[0])
        ax.set_ylim(0, 103)
        ax.set_title(f"Needles found at {length:,} tokens, %" if length else "Needles found, %")
    if "losses" in points[0]:
        ax = axes[-1]
        for index, source in enumerate(points[0]["losses"]):
            losses = [point["losses"][source] for point in points]
            ax.plot(weights, losses, marker="o", label=source, **_line_style(index))
        ax.set_title("Loss in the short window, nats a token")
        ax.legend()
    for ax in axes:
        ax.set_xlabel("weight of the base (0: the replayed model alone)")
        ax.set_xticks(weights, [f"{weight:g}" for weight in weights])
    return figure


@_picture
def seed_dots(panels: Mapping[str, Mapping[str, Mapping]], label: str):
    """Share of needles over the seeds: a panel for each arm, a row for each method, a dot for each seed.

    Args:
        panels: arm -> row -> {"seeds": shares, "mean", "interval": (low, high) or None}.
        label: of the axis.
    """
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    most = max(map(len, panels.values()))
    figure, axes = _axes(rows, columns, rows * (0.75 + 0.24 * most), used=len(panels))
    for ax, (arm, entries) in zip(axes, panels.items(), strict=True):
        for row, entry in enumerate(entries.values()):
            if entry["interval"]:
                low, high = (100 * min(max(end, 0), 1) for end in entry["interval"])
                ax.hlines(row, low, high, color=COLOURS[0], alpha=0.3, linewidth=5)
            ax.plot([100 * share for share in entry["seeds"]], [row] * len(entry["seeds"]), "o",
                    color=COLOURS[6], markersize=3)  # fmt: skip
            ax.plot(100 * entry["mean"], row, "o", color=COLOURS[0], markersize=5.5)
        ax.set_yticks(range(len(entries)), [name.replace("_", " ") for name in entries])
        ax.set_ylim(len(entries) - 0.5, -0.5)
        ax.set_xlim(-3, 103)
        ax.set_title(arm)
    figure.supxlabel(label, fontsize=ax.xaxis.label.get_size(), color=ax.xaxis.label.get_color())
    return figure


@_picture
def surfaces(panels: Mapping[str, Sequence[Sequence[float]]], rows, columns, label: str):
    """Figures over two settings, a heat map for each.

    Args:
        panels: title -> figures [rows][columns]; each has colours of its own.
        rows, columns: names of the settings' values.
        label: of the columns.
    """
    figure, axes = _axes(1, len(panels), 0.85 + 0.32 * len(rows))
    for index, (ax, (title, values)) in enumerate(zip(axes, panels.items(), strict=True)):
        values = np.asarray(values, float)
        low, high = np.nanmin(values), np.nanmax(values)
        _heat_map(ax, values, "{:.3g}".format, low - (low == high), high)
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(rows)), rows if index == 0 else [""] * len(rows))
        ax.set_xlabel(label)
        ax.set_title(title)
    return figure


@_picture
def merge_frontier(points: Sequence[Mapping]):
    """What merges cost and bring: needles found over the loss in the short window, a point for each.

    Args:
        points: [{"label": its weights, "needle": (share, low, high), "loss": nats a token, "best": on the
            frontier}, ...].
    """
    figure, (ax,) = _axes(1, 1, 3.4)
    best = sorted((p for p in points if p["best"]), key=lambda point: point["loss"])
    ax.plot(
        [point["loss"] for point in best], [100 * point["needle"][0] for point in best],
        color=COLOURS[0], linewidth=1.2,
    )  # fmt: skip
    for point in points:
        share, low, high = (100 * value for value in point["needle"])
        colour = COLOURS[0] if point["best"] else COLOURS[6]
        ax.vlines(point["loss"], low, high, color=colour, alpha=0.35, linewidth=3)
        ax.plot(point["loss"], share, "o", color=colour)
        ax.annotate(
            point["label"], (point["loss"], share), xytext=(6, -10), textcoords="offset points", fontsize=7.5
        )  # fmt: skip
    ax.set_ylim(-3, 106)
    ax.margins(x=0.08)
    ax.set_xlabel("loss in the short window, nats a token, mean over the sources (left is better)")
    ax.set_title("Needles found, %, by merge weights")
    return figure


@_picture
def perplexity_by_position(buckets: Mapping[str, Sequence[Mapping]], window: int | None = None):
    """Perplexity of the tokens in each bucket of positions, logarithmic.

    Args:
        buckets: label -> [{"start", "stop", "nll" in nats a token or None}, ...].
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (ax,) = _axes(1, 1, 3.2)
    for index, (label, row) in enumerate(buckets.items()):
        row = [bucket for bucket in row if bucket["nll"] is not None]
        middles = [(bucket["start"] + bucket["stop"]) / 2 for bucket in row]
        values = [math.exp(min(bucket["nll"], 50.0)) for bucket in row]
        ax.plot(middles, values, marker="o", markersize=3.5, label=label, **_line_style(index))
    if window:
        ax.axvline(window, color=WINDOW_COLOUR, linewidth=1.2, linestyle="--")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:,.3g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    _position_axis(ax.xaxis, max(bucket["stop"] for row in buckets.values() for bucket in row))
    ax.set_xlabel("position in the document")
    ax.set_title("Perplexity")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


@_picture
def stage_times(seconds: Mapping[str, float]):
    """A bar for each stage, in the order in which they ran."""
    figure, (ax,) = _axes(1, 1, 0.55 + 0.27 * len(seconds))
    longest = max(seconds.values(), default=0) or 1
    for row, value in enumerate(seconds.values()):
        ax.barh(row, value, height=0.62, color=COLOURS[0], alpha=0.8)
        ax.text(value + longest / 100, row, duration(value), va="center", fontsize=8)
    ax.set_yticks(range(len(seconds)), list(seconds))
    ax.invert_yaxis()
    ax.set_xlim(0, 1.1 * longest)
    ax.tick_params(length=0, labelbottom=False)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return figure


def duration(seconds: float) -> str:
    """1.5 -> "1.5 s", 125 -> "2 min 5 s", 7300 -> "2 h 2 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    return f"{round(seconds / 60) // 60} h {round(seconds / 60) % 60} min"
