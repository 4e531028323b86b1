"""Every figure: sample grids as plain PNGs, curves by matplotlib.

Colours are fixed and colour-blind-safe (Okabe and Ito's palette): data and positive samples blue, chains and negative
samples vermilion.
"""

from __future__ import annotations

import itertools
import os

import numpy as np
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from data import to_unit

DATA_COLOUR, CHAIN_COLOUR, NEUTRAL = "#0072B2", "#D55E00", "#555555"
SERIES_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MODEL_COLOURS = {"jem": CHAIN_COLOUR, "classifier": DATA_COLOUR}


def save_grid(images, path, columns=8):
    """Write images (N, C, H, W), pixels in [-1, 1], as a PNG grid; small images are enlarged to at least 28 pixels."""
    picture = _grid(images, columns)
    _replace(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_animation(frames, path, columns=8):
    """Write grids of images (N, C, H, W), pixels in [-1, 1], as a GIF: ten a second, two seconds on the last, then anew."""
    pictures = [_grid(images, columns) for images in frames]
    times = [100] * (len(pictures) - 1) + [2000]
    settings = {"format": "GIF", "save_all": True, "append_images": pictures[1:], "duration": times, "loop": 0}
    _replace(path, lambda temporary: pictures[0].save(temporary, **settings))


def _grid(images, columns):
    scale = -(-28 // images.shape[-1])
    enlarged = interpolate(to_unit(images.float().cpu()), scale_factor=scale, mode="nearest")
    return to_pil_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=0.5))


def save_curves(rows, path):
    """Draw the curves of a run from the rows of its metrics.csv (a list of dicts of str; see runs.COLUMNS).

    Six panels against minutes of the run: cross-entropy, accuracy, energies, energy gap, chains and learning rate.
    A panel without values is left out; phases (pretraining, JEM training) are separated by a dotted line, and a dashed
    one stands where a rollback (see guard.py) was.
    """
    panels = [
        (
            "cross-entropy [nat]",
            [("cross_entropy", "training", CHAIN_COLOUR), ("val_cross_entropy", "validation", DATA_COLOUR)],
        ),
        ("accuracy", [("accuracy", "training", CHAIN_COLOUR), ("val_accuracy", "validation", DATA_COLOUR)]),
        ("energy E(x)", [("energy_positive", "data", DATA_COLOUR), ("energy_negative", "chains", CHAIN_COLOUR)]),
        ("energy gap (chains − data)", [("energy_gap", "", CHAIN_COLOUR)]),
        ("chain displacement (L2)", [("chain_displacement", "", CHAIN_COLOUR)]),
        ("learning rate", [("lr", "", NEUTRAL)]),
    ]
    panels = [panel for panel in panels if any(row[name] for row in rows for name, _, _ in panel[1])]
    columns = 3 if len(panels) > 2 else len(panels)
    lines = -(-len(panels) // columns)
    figure, axes = _panels(lines, columns, 3.6, 2.7)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    change = next((float(row["minutes"]) for row in rows if row["phase"] == "jem"), None) if rows[0]["phase"] != "jem" else None
    for axis, (title, curves) in zip(axes.flat, panels, strict=False):
        for name, label, colour in curves:
            points = [(float(row["minutes"]), float(row[name])) for row in rows if row[name]]
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    label=label,
                    linewidth=1.2,
                    marker="." if len(points) < 20 else None,
                )
        if change is not None:
            axis.axvline(change, color=NEUTRAL, linestyle=":", linewidth=1)
        for before, after in itertools.pairwise(rows):
            if int(after["rollbacks"] or 0) > int(before["rollbacks"] or 0):
                axis.axvline(float(after["minutes"]), color=CHAIN_COLOUR, linestyle="--", linewidth=1)
        axis.set(title=title, xlabel="minutes")
        axis.grid(alpha=0.3)
        if curves[0][1]:
            axis.legend(fontsize=8)
    _finish(figure, path)


def save_reliability(classification, path):
    """Draw the reliability diagram with its histogram for each model (see metrics.calibration), before scaling."""
    figure, axes = _panels(2, len(classification), 3.6, 2.4)
    for (name, found), (upper, lower) in zip(classification.items(), axes.T, strict=True):
        rows = found["calibration"]["reliability"]
        used = [row for row in rows if row["count"]]
        upper.plot([0, 1], [0, 1], color=NEUTRAL, linestyle=":", linewidth=1)
        upper.plot(
            [row["confidence"] for row in used], [row["accuracy"] for row in used], marker="o", color=MODEL_COLOURS[name]
        )
        ece = found["calibration"]["ece"]
        upper.set(title=f"{name}: ECE {100 * ece:.2f} %", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        centres, width = [(row["low"] + row["high"]) / 2 for row in rows], rows[0]["high"] - rows[0]["low"]
        lower.bar(centres, [row["count"] for row in rows], width=0.9 * width, color=MODEL_COLOURS[name])
        lower.set(xlabel="confidence", ylabel="test images", yscale="log", xlim=(0, 1))
    _finish(figure, path)


def save_confusion(matrix, path):
    """Draw a confusion matrix (K rows of true classes), the numbers in it, mistakes shaded on their own scale."""
    size = len(matrix)
    figure, axes = _panels(1, 1, 4.6, 4.2)
    axis = axes[0, 0]
    mistakes = [[0 if row == column else matrix[row][column] for column in range(size)] for row in range(size)]
    axis.imshow(mistakes, cmap="Oranges")
    for row in range(size):
        for column in range(size):
            axis.text(column, row, matrix[row][column] or "", ha="center", va="center", fontsize=7)
    axis.set(xlabel="predicted class", ylabel="true class", xticks=range(size), yticks=range(size), title="jem, test images")
    _finish(figure, path)


def save_score_histograms(scored, path):
    """Draw histograms of the out-of-distribution scores of a model: a row for each set, a column for each score.

    scored: {set: {score: (N,) array}} with the test set first; it is drawn in blue behind each other set.
    """
    inside, *names = scored
    figure, axes = _panels(len(names), len(scored[inside]), 3.0, 1.25)
    for row, name in enumerate(names):
        for axis, (score, values) in zip(axes[row], scored[name].items(), strict=True):
            low, high = (float(f(f(values), f(scored[inside][score]))) for f in (min, max))
            edges = [low + (high - low or 1) * step / 40 for step in range(41)]
            for data, colour in ((scored[inside][score], DATA_COLOUR), (values, CHAIN_COLOUR)):
                axis.hist(data, bins=edges, density=True, color=colour, alpha=0.6)
            axis.set(yticks=[])
            if row == 0:
                axis.set_title(score)
            if score == next(iter(scored[name])):
                axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.supxlabel("score, high = out of distribution; blue: test set, vermilion: the set named at the left", fontsize=9)
    _finish(figure, path)


def save_roc_curves(scored, path):
    """Draw ROC curves: a row for each model, a column for each score, a line for each out-of-distribution set.

    scored: {model: {set: {score: (N,) array}}} with the test set first.
    """
    from sklearn.metrics import roc_curve  # here, as matplotlib in `_panels`

    figure, axes = _panels(len(scored), len(next(iter(next(iter(scored.values())).values()))), 3.0, 2.6)
    for line, (model, sets) in zip(axes, scored.items(), strict=True):
        inside, *names = sets
        for axis, score in zip(line, sets[inside], strict=True):
            for index, name in enumerate(names):
                values = np.r_[sets[inside][score], sets[name][score]]
                truth = np.r_[np.zeros(len(sets[inside][score])), np.ones(len(sets[name][score]))]
                rates = roc_curve(truth, values)[:2]
                style = ("-", "--", ":")[index // len(SERIES_COLOURS) % 3]
                axis.plot(*rates, color=SERIES_COLOURS[index % len(SERIES_COLOURS)], linestyle=style, label=name, linewidth=1.2)
            axis.set(title=f"{model}: {score}", xlabel="test images flagged", ylabel="other images flagged")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=5)
    _finish(figure, path)


def save_robustness(curves, path):
    """Draw accuracy against epsilon with bootstrap 95 % bands: a panel for each norm, a line for each model.

    curves: {norm: {model: [{"epsilon", "accuracy", "interval"}, ...]}}.
    """
    figure, axes = _panels(1, len(curves), 4.2, 3.0)
    for axis, (norm, models) in zip(axes[0], curves.items(), strict=True):
        for index, (name, rows) in enumerate(models.items()):
            colour = MODEL_COLOURS.get(name, SERIES_COLOURS[2 + index % 4])
            epsilons = [row["epsilon"] for row in rows]
            axis.plot(epsilons, [row["accuracy"] for row in rows], marker="o", color=colour, label=name)
            axis.fill_between(epsilons, *zip(*[row["interval"] for row in rows], strict=True), color=colour, alpha=0.2)
        title = "L∞" if norm == "linf" else "L2"
        axis.set(
            title=f"PGD, {title}",
            xlabel=f"ε ({title} norm, pixels on [0, 1])",
            ylabel="accuracy under attack",
            ylim=(-0.02, 1.02),
        )
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    _finish(figure, path)


def save_distances(distances, path):
    """Draw histograms of distances to the nearest training image: {kind: (N,) tensor}, pixels on [-1, 1]."""
    figure, axes = _panels(1, 1, 5.2, 3.0)
    colours = {"test images": DATA_COLOUR, "fresh": CHAIN_COLOUR, "buffer": SERIES_COLOURS[4]}
    for kind, values in distances.items():
        axes[0, 0].hist(
            values.cpu().numpy(), bins=40, histtype="step", linewidth=1.5, density=True, label=kind, color=colours[kind]
        )
    axes[0, 0].set(xlabel="L2 distance to the nearest training image, pixels on [-1, 1]", ylabel="density")
    axes[0, 0].legend(fontsize=8)
    _finish(figure, path)


def save_chains(energies, correlation, displacements, saturated, path):
    """Draw what fresh chains do: energies (chains, steps), autocorrelation by lag, displacement and saturation by step."""
    figure, axes = _panels(1, 4, 3.0, 2.6)
    low, middle, high = energies.double().quantile(energies.new_tensor([0.05, 0.5, 0.95]).double(), dim=0)
    axes[0, 0].fill_between(range(len(middle)), low, high, color=CHAIN_COLOUR, alpha=0.25, label="5 to 95 %")
    axes[0, 0].plot(middle, color=CHAIN_COLOUR, label="median")
    axes[0, 0].set(title="energy E(x)", xlabel="Langevin step")
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].plot(correlation, color=CHAIN_COLOUR)
    axes[0, 1].set(title="autocorrelation of E", xlabel="lag [steps]")
    axes[0, 2].plot(range(1, len(displacements)), displacements[1:], color=CHAIN_COLOUR)
    axes[0, 2].set(title="displacement of a step (L2)", xlabel="Langevin step", ylim=(0, None))
    axes[0, 3].plot(saturated, color=CHAIN_COLOUR)
    axes[0, 3].set(title="share of saturated pixels", xlabel="Langevin step", ylim=(0, 1))
    _finish(figure, path)


def save_quality(curves, names, path):
    """Draw quality against minutes: a panel for each name, a colour for each variant, a line for each of its runs.

    curves: {variant: [run, ...]}, a run being a list of {"minutes", name: value, ...} with minutes growing.
    """
    figure, axes = _panels(2, -(-len(names) // 2), 3.4, 2.6)
    for axis, name in zip(axes.flat, names, strict=False):
        for index, (variant, runs) in enumerate(curves.items()):
            colour = SERIES_COLOURS[index % len(SERIES_COLOURS)]
            for number, run in enumerate(runs):
                points = [(row["minutes"], row[name]) for row in run if name in row]
                if points:
                    label = variant if number == 0 else None
                    axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=".", linewidth=1.2)
        ratio = name in ("buffer", "fresh")
        axis.set(title=f"{name}: Fréchet / floor" if ratio else name, xlabel="minutes", yscale="log" if ratio else "linear")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    _finish(figure, path)


def save_speed(rows, path):
    """Draw image-steps per second of each method: a column for each network, against the batch above and K below.

    rows: what benchmarks/sgld_speed.py measures; the held one of batch and K is the middle of those measured.
    """
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = list(dict.fromkeys(row["method"] for row in rows))
    values = {name: sorted({row[name] for row in rows}) for name in ("batch", "steps")}
    words = {"batch": "batch", "steps": "K"}
    lines = [pair for pair in (("batch", "steps"), ("steps", "batch")) if len(values[pair[0]]) > 1] or [("batch", "steps")]
    figure, axes = _panels(len(lines), len(networks), 3.6, 2.7)
    for line, (axis_name, held) in enumerate(lines):
        fixed = values[held][(len(values[held]) - 1) // 2]
        for axis, network in zip(axes[line], networks, strict=True):
            for index, name in enumerate(names):
                points = [
                    (row[axis_name], row["image_steps_per_second"])
                    for row in rows
                    if (row["network"], row["method"], row[held]) == (network, name, fixed)
                ]
                axis.plot(*zip(*points, strict=True), marker=".", color=SERIES_COLOURS[index], label=name, linewidth=1.2)
            axis.set(title=f"{network}, {words[held]} {fixed}", xlabel=words[axis_name], xscale="log", yscale="log")
            axis.set_xticks(values[axis_name], values[axis_name])
            axis.set_xticks([], minor=True)
            axis.grid(alpha=0.3, which="both")
        axes[line, 0].set_ylabel("image-steps per second")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=1 + len(networks))
    _finish(figure, path)


def save_costs(costs, path):
    """Draw how the time of an iteration grows with K, batch and image side, and sample.py's memory with the images."""
    figure, axes = _panels(1, 4, 3.0, 2.6)
    labels = {"steps": "Langevin steps K", "batch": "batch", "size": "side of an image [pixels]"}
    for axis, (name, points) in zip(axes[0], costs["iteration"].items(), strict=False):
        axis.plot(*zip(*points, strict=True), marker="o", color=CHAIN_COLOUR)
        axis.set(xlabel=labels[name], ylabel="ms an iteration", ylim=(0, None))
    axes[0, 3].plot(*zip(*costs["memory"], strict=True), marker="o", color=DATA_COLOUR)
    axes[0, 3].set(xlabel="images drawn by sample.py", ylabel="largest memory [MiB]", xscale="log", ylim=(0, None))
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    _finish(figure, path)


def save_soak(memory, rows, path):
    """Draw a long run: memory of training and sampling against minutes, and the training's energy gap and accuracy.

    memory: {"training" or "sampling": [[minutes, MiB]]}. rows: of the training in metrics.csv, dicts of str.
    """
    figure, axes = _panels(1, 4, 3.2, 2.6)
    for axis, (name, readings) in zip(axes[0], memory.items(), strict=False):
        axis.plot(*zip(*readings, strict=True), color=DATA_COLOUR, linewidth=1.2)
        axis.set(title=f"{name}: memory", xlabel="minutes", ylabel="MiB", ylim=(0, None))
    for axis, name, label in ((axes[0, 2], "energy_gap", "energy gap"), (axes[0, 3], "val_accuracy", "validation accuracy")):
        points = [(float(row["minutes"]), float(row[name])) for row in rows if row[name]]
        axis.plot(*zip(*points, strict=True), color=CHAIN_COLOUR, linewidth=1.2)
        axis.set(title=label, xlabel="minutes")
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    _finish(figure, path)


def _panels(rows, columns, width, height):
    """Return a figure and its axes (rows, columns), each panel width x height inches."""
    from matplotlib.figure import Figure  # here, for a training starts without it, and no figure is drawn in its first seconds

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure, path):
    """Write a figure."""
    _replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _replace(path, write):
    """Write a file beside its place, then rename it: a figure that is being looked at is never half a file."""
    temporary = f"{path}.tmp"
    write(temporary)
    os.replace(temporary, path)
