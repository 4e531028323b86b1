"""Every figure: sample grids as plain PNGs, curves by matplotlib.

Colours are fixed and colour-blind-safe (Okabe and Ito's palette): data and positive samples blue,
chains and negative samples vermilion.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from sgld_nrg.support.pixels import to_unit

GREY = 127  # between the pictures of a grid
DATA_COLOUR, CHAIN_COLOUR, NEUTRAL = "#0072B2", "#D55E00", "#555555"
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODEL_COLOURS = {"jem": CHAIN_COLOUR, "classifier": DATA_COLOUR, "control": "#009E73"}
# Panels of `save_curves`: a title, and (column of metrics.csv, label, colour) of each curve.
CURVES = (
    (
        "cross-entropy [nat]",
        (
            ("cross_entropy", "training", CHAIN_COLOUR),
            ("val_cross_entropy", "validation", DATA_COLOUR),
        ),
    ),
    (
        "accuracy",
        (("accuracy", "training", CHAIN_COLOUR), ("val_accuracy", "validation", DATA_COLOUR)),
    ),
    (
        "energy E(x)",
        (("energy_positive", "data", DATA_COLOUR), ("energy_negative", "chains", CHAIN_COLOUR)),
    ),
    ("energy gap (chains − data)", (("energy_gap", "", CHAIN_COLOUR),)),
    ("chain displacement (L2)", (("chain_displacement", "", CHAIN_COLOUR),)),
    ("learning rate", (("lr", "", NEUTRAL),)),
)


def save_grid(images: Tensor, path: Path, columns: int = 8, names: Sequence[str] = ()) -> None:
    """Write images (N, C, H, W), pixels in [-1, 1], as a PNG grid; each of 28 pixels at least.

    names: of the rows, one below each, or none.
    """
    picture = _grid(images, columns)
    if names:
        picture = _with_names(picture, names)
    _replace(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_animation(frames: list[Tensor], path: Path, columns: int = 8) -> None:
    """Write grids of images (N, C, H, W), pixels in [-1, 1], as a GIF: ten a second, then again."""
    pictures = [_grid(images, columns) for images in frames]
    times = [100] * (len(pictures) - 1) + [2000]
    settings: dict[str, Any] = {"format": "GIF", "save_all": True, "duration": times, "loop": 0}
    settings["append_images"] = pictures[1:]
    _replace(path, lambda temporary: pictures[0].save(temporary, **settings))


def _grid(images: Tensor, columns: int) -> Image.Image:
    scale = -(-28 // images.shape[-1])
    pixels = (to_unit(images.float().cpu()) * 255).byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    columns = min(columns, len(pixels))
    blank, gap = -len(pixels) % columns, 2
    sides = ((0, blank), (gap, 0), (gap, 0), (0, 0))
    tiles = np.pad(pixels, sides, constant_values=GREY)  # (N, H, W, C), the gap above and left
    tiles[len(pixels) :] = GREY
    rows = tiles.reshape(-1, columns, *tiles.shape[1:]).swapaxes(1, 2)
    grid = rows.reshape(len(rows) * rows.shape[1], -1, rows.shape[-1])
    grid = np.pad(grid, ((0, gap), (0, gap), (0, 0)), constant_values=GREY)
    return Image.fromarray(grid.squeeze(2) if grid.shape[2] == 1 else grid).convert("RGB")


def _with_names(picture: Image.Image, names: Sequence[str]) -> Image.Image:
    """Return a grid with the name of each row below it."""
    height, strip = picture.height // len(names), 12
    told = Image.new("RGB", (picture.width, picture.height + strip * len(names)), "white")
    for row, name in enumerate(names):
        top = row * height
        part = picture.crop((0, top, picture.width, top + height))
        told.paste(part, (0, top + row * strip))
        ImageDraw.Draw(told).text((2, top + height + row * strip), name, fill="black", font_size=10)
    return told


def save_curves(rows: list[dict[str, str]], path: Path) -> None:
    """Draw the curves of a run from the rows of its metrics.csv, if there are any.

    Panels against minutes of the run; one without values is left out. A dotted line separates
    pretraining from the JEM's training, and a dashed one stands at a rollback.
    """
    panels = [panel for panel in CURVES if any(row[curve[0]] for row in rows for curve in panel[1])]
    if not panels:
        return
    columns = 3 if len(panels) > 2 else len(panels)
    figure, axes = panels_of(-(-len(panels) // columns), columns, 3.6, 2.7)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    phases = [row["phase"] for row in rows]
    change = None
    if phases[0] != "jem" and "jem" in phases:
        change = float(rows[phases.index("jem")]["minutes"])
    for axis, (title, curves) in zip(axes.flat, panels, strict=False):
        for name, label, colour in curves:
            points = [(float(row["minutes"]), float(row[name])) for row in rows if row[name]]
            if points:
                marker = "." if len(points) < 20 else None
                style = {"color": colour, "label": label, "linewidth": 1.2, "marker": marker}
                axis.plot(*zip(*points, strict=True), **style)
        if change is not None:
            axis.axvline(change, color=NEUTRAL, linestyle=":", linewidth=1)
        for before, after in itertools.pairwise(rows):
            if int(after["rollbacks"] or 0) > int(before["rollbacks"] or 0):
                style = {"color": CHAIN_COLOUR, "linestyle": "--", "linewidth": 1}
                axis.axvline(float(after["minutes"]), **style)
        axis.set(title=title, xlabel="minutes")
        axis.grid(alpha=0.3)
        if curves[0][1]:
            axis.legend(fontsize=8)
    finish(figure, path)


def save_reliability(classification: dict[str, Any], path: Path) -> None:
    """Draw the reliability diagram with its histogram for each model, before scaling."""
    figure, axes = panels_of(2, len(classification), 3.6, 2.4)
    for (name, found), (upper, lower) in zip(classification.items(), axes.T, strict=True):
        rows, colour = found["calibration"]["reliability"], MODEL_COLOURS[name]
        used = [(row["confidence"], row["accuracy"]) for row in rows if row["count"]]
        upper.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", linewidth=1)
        upper.plot(*zip(*used, strict=True), marker="o", color=colour)
        title = f"{name}: ECE {100 * found['calibration']['ece']:.2f} %"
        upper.set(title=title, xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        centres = [(row["low"] + row["high"]) / 2 for row in rows]
        width = 0.9 * (rows[0]["high"] - rows[0]["low"])
        lower.bar(centres, [row["count"] for row in rows], width=width, color=colour)
        lower.set(xlabel="confidence", ylabel="test images", yscale="log", xlim=(0, 1))
    finish(figure, path)


def save_confusion(matrix: list[list[int]], classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix (K rows of true classes) with its numbers, mistakes shaded."""
    figure, axes = panels_of(1, 1, 4.6, 4.2)
    axis, counts = axes[0, 0], np.array(matrix)
    axis.imshow(counts - np.diag(np.diag(counts)), cmap="Oranges")
    for (row, column), count in np.ndenumerate(counts):
        axis.text(column, row, count or "", ha="center", va="center", fontsize=7)
    ticks = range(len(matrix))
    axis.set_xticks(ticks, classes, rotation=90 if max(map(len, classes)) > 2 else 0)
    axis.set_yticks(ticks, classes)
    axis.set(xlabel="predicted class", ylabel="true class")
    axis.set(title="jem, test images")
    finish(figure, path)


def save_score_histograms(scored: dict[str, dict[str, dict[str, np.ndarray]]], path: Path) -> None:
    """Draw each set's distribution of each OOD score: a row of panels for each model.

    scored: {model: {set: {score: (N,) array}}} with the test set first, which is blue and lowest.
    A panel is as wide as the test set's scores and one and a half times that on either side; what
    lies beyond is in the outermost bin.
    """
    scores = list(next(iter(next(iter(scored.values())).values())))
    most = max(map(len, scored.values()))
    figure, axes = panels_of(len(scored), len(scores), 2.4, 0.8 + 0.22 * most)
    for line, (model, sets) in zip(axes, scored.items(), strict=True):
        for axis, score in zip(line, scores, strict=True):
            for place, found in enumerate(sets.values()):
                if not place:
                    low, high = found[score].min(), found[score].max()
                    margin = 1.5 * (high - low or 1.0)
                    edges = np.linspace(low - margin, high + margin, 61)
                counts = np.histogram(found[score].clip(edges[0], edges[-1]), edges)[0]
                heights = place + 0.9 * counts / counts.max()
                colour = CHAIN_COLOUR if place else DATA_COLOUR
                axis.stairs(heights, edges, baseline=place, fill=True, color=colour)
            axis.set(title=f"{model}: {score}", yticks=[])
        line[0].set_yticks(np.arange(len(sets)) + 0.3, list(sets), fontsize=8)
    figure.supxlabel("score, high = out of distribution; blue: the test set", fontsize=9)
    finish(figure, path)


def save_roc_curves(scored: dict[str, dict[str, dict[str, np.ndarray]]], path: Path) -> None:
    """Draw ROC curves: a row for each model, a column for each score, a line for each OOD set.

    scored: {model: {set: {score: (N,) array}}} with the test set first.
    """
    from sklearn.metrics import roc_curve

    scores = list(next(iter(next(iter(scored.values())).values())))
    figure, axes = panels_of(len(scored), len(scores), 2.6, 2.4, shared=True)
    for line, (model, sets) in zip(axes, scored.items(), strict=True):
        inside, *names = sets
        for axis, score in zip(line, scores, strict=True):
            for index, name in enumerate(names):
                parts = (sets[inside][score], sets[name][score])
                truth = np.repeat([0, 1], [len(part) for part in parts])
                rates = roc_curve(truth, np.concatenate(parts))[:2]
                turn, number = divmod(index, len(SERIES_COLOURS))
                style = {"color": SERIES_COLOURS[number], "linestyle": ("-", "--", ":")[turn % 3]}
                axis.plot(*rates, **style, label=name, linewidth=1.2)
            axis.set_title(f"{model}: {score}")
        line[0].set_ylabel("other images flagged")
    for axis in axes[-1]:
        axis.set_xlabel("test images flagged")
    legend(figure, axes, ncols=5)
    finish(figure, path)


def save_robustness(curves: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Draw accuracy against epsilon with bootstrap 95 % bands: a panel for each norm.

    curves: {norm: {model: [{"epsilon", "accuracy", "interval"}, ...]}}, a line for each model.
    """
    figure, axes = panels_of(1, len(curves), 4.2, 3.0)
    for axis, (norm, models) in zip(axes[0], curves.items(), strict=True):
        for index, (name, rows) in enumerate(models.items()):
            colour = MODEL_COLOURS.get(name, SERIES_COLOURS[2 + index % 4])
            epsilons = [row["epsilon"] for row in rows]
            axis.plot(epsilons, [row["accuracy"] for row in rows], "o-", color=colour, label=name)
            low, high = zip(*[row["interval"] for row in rows], strict=True)
            axis.fill_between(epsilons, low, high, color=colour, alpha=0.2)
        title = "L∞" if norm == "linf" else "L2"
        axis.set(title=f"Auto-PGD, {title}", xlabel=f"ε ({title} norm, pixels on [0, 1])")
        axis.set(ylabel="accuracy under attack", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    finish(figure, path)


def save_distances(distances: dict[str, Tensor], path: Path) -> None:
    """Draw histograms of distances to the nearest training image: {kind: (N,)}, on [-1, 1]."""
    figure, axes = panels_of(1, 1, 5.2, 3.0)
    colours = {"test images": DATA_COLOUR, "fresh": CHAIN_COLOUR, "buffer": SERIES_COLOURS[4]}
    style = {"bins": 40, "histtype": "step", "linewidth": 1.5, "density": True}
    for kind, values in distances.items():
        axes[0, 0].hist(values.cpu().numpy(), label=kind, color=colours[kind], **style)
    label = "L2 distance to the nearest training image, pixels on [-1, 1]"
    axes[0, 0].set(xlabel=label, ylabel="density")
    axes[0, 0].legend(fontsize=8)
    finish(figure, path)


def save_chains(
    energies: Tensor,
    correlation: Sequence[float],
    displacements: Sequence[float],
    saturated: Sequence[float],
    path: Path,
) -> None:
    """Draw what fresh chains do.

    energies: (chains, steps). correlation: of the energy, by lag. displacements: of each step but
    the first, L2. saturated: share of the pixels, by step.
    """
    figure, axes = panels_of(1, 4, 3.0, 2.6)
    bands = energies.new_tensor([0.05, 0.5, 0.95]).double()
    low, middle, high = energies.double().quantile(bands, dim=0)
    first, second, third, fourth = axes[0]
    first.fill_between(range(len(middle)), low, high, color=CHAIN_COLOUR, alpha=0.25)
    first.plot(middle, color=CHAIN_COLOUR, label="median, 5 to 95 %")
    first.set(title="energy E(x)", xlabel="Langevin step")
    first.legend(fontsize=8)
    second.plot(correlation, color=CHAIN_COLOUR)
    second.set(title="autocorrelation of E", xlabel="lag [steps]")
    third.plot(range(1, len(displacements) + 1), displacements, color=CHAIN_COLOUR)
    third.set(title="displacement of a step (L2)", xlabel="Langevin step", ylim=(0, None))
    fourth.plot(saturated, color=CHAIN_COLOUR)
    fourth.set(title="share of saturated pixels", xlabel="Langevin step", ylim=(0, 1))
    finish(figure, path)


def panels_of(
    rows: int, columns: int, width: float, height: float, shared: bool = False
) -> tuple[Any, Any]:
    """Return a figure and its axes (rows, columns), each panel width x height inches.

    shared: whether all panels have the same axes, whose numbers then stand at the outer ones.
    """
    import matplotlib  # here: a training draws no figure in its first seconds
    from matplotlib.figure import Figure

    matplotlib.rcParams["text.parse_math"] = False  # of the user's names, $ is a dollar
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)


def legend(figure: Any, axes: Any, ncols: int) -> None:
    """Put one legend for all panels below them."""
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=ncols)


def finish(figure: Any, path: Path) -> None:
    """Write a figure; the powers on its logarithmic axes are written without mathematics."""
    from matplotlib.ticker import LogFormatter

    for axis in (part for panel in figure.axes for part in (panel.xaxis, panel.yaxis)):
        if axis.get_scale() == "log":
            axis.set_major_formatter(LogFormatter())
            axis.set_minor_formatter(LogFormatter())
    _replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _replace(path: Path, write: Callable[[str], None]) -> None:
    """Write a file beside its place, then rename it: a figure that is looked at is never half."""
    temporary = f"{path}.tmp"
    write(temporary)
    os.replace(temporary, path)
