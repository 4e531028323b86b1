"""Every figure: sample grids as plain PNGs, curves by matplotlib.

Colours are fixed and colour-blind-safe (Okabe and Ito's palette): data and positive samples blue, chains and negative
samples vermilion.
"""

from __future__ import annotations

import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from data import to_unit

DATA_COLOUR, CHAIN_COLOUR, NEUTRAL = "#0072B2", "#D55E00", "#555555"


def save_grid(images, path, columns=8):
    """Write images (N, C, H, W), pixels in [-1, 1], as a PNG grid; small images are enlarged to at least 28 pixels."""
    scale = -(-28 // images.shape[-1])
    enlarged = interpolate(to_unit(images.float().cpu()), scale_factor=scale, mode="nearest")
    picture = to_pil_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=0.5))
    _replace(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_curves(rows, path):
    """Draw the curves of a run from the rows of its metrics.csv (a list of dicts of str; see runs.COLUMNS).

    Six panels against minutes of the run: cross-entropy, accuracy, energies, energy gap, chains and learning rate.
    A panel without values is left out; phases (pretraining, JEM training) are separated by a dotted line.
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
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.7 * lines), squeeze=False, layout="constrained")
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
        axis.set(title=title, xlabel="minutes")
        axis.grid(alpha=0.3)
        if curves[0][1]:
            axis.legend(fontsize=8)
    _replace(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def _replace(path, write):
    """Write a file beside its place, then rename it: a figure that is being looked at is never half a file."""
    temporary = f"{path}.tmp"
    write(temporary)
    os.replace(temporary, path)
