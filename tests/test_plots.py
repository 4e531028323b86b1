"""Grids pixel by pixel; figures by what their panels hold."""

import numpy as np
import pytest
import torch
from conftest import generator
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from sgld_nrg.support import plots
from sgld_nrg.support.pixels import to_unit


@pytest.mark.parametrize(
    ("shape", "columns"), [((64, 1, 28, 28), 8), ((7, 3, 32, 32), 3), ((3, 1, 8, 8), 8)]
)
def test_a_grid_is_that_of_torchvision(shape, columns, tmp_path):
    images = 2.4 * torch.rand(shape, generator=generator()) - 1.2  # what lies beyond is clamped
    plots.save_grid(images, tmp_path / "grid.png", columns)
    enlarged = interpolate(to_unit(images), scale_factor=-(-28 // shape[-1]), mode="nearest")
    wanted = to_pil_image(make_grid(enlarged, nrow=columns, padding=2, pad_value=0.5))
    assert np.array_equal(np.array(Image.open(tmp_path / "grid.png")), np.array(wanted))


def test_a_histogram_shows_each_set_in_its_place_and_what_lies_beyond_at_the_edge(
    tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(plots, "finish", lambda figure, path: figures.append(figure))
    sets = {"test set": np.array([0.0, 1.0]), "near": np.array([0.5]), "far": np.array([99.0])}
    scored = {"jem": {name: {"energy": values} for name, values in sets.items()}}
    plots.save_score_histograms(scored, tmp_path / "figure.png")
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(sets)
    assert axis.get_title() == "jem: energy"
    steps = [patch.get_data() for patch in axis.patches]
    for place, (values, edges, baseline) in enumerate(steps):
        assert baseline == place and values.max() == pytest.approx(place + 0.9)
        assert edges[0] == -1.5 and edges[-1] == 2.5
    assert [steps[2].values.argmax(), steps[1].values.argmax()] == [59, 30]


def test_a_logarithmic_axis_shows_numbers_and_no_markup(tmp_path):
    figure, axes = plots.panels_of(1, 1, 3, 2)
    axes[0, 0].plot([1, 10_000], [1, 3])
    axes[0, 0].set(xscale="log", yscale="log")
    plots.finish(figure, tmp_path / "a.png")
    labels = [
        tick.get_text()
        for axis in (axes[0, 0].xaxis, axes[0, 0].yaxis)
        for minor in (False, True)
        for tick in axis.get_ticklabels(minor=minor)
    ]
    assert "100" in labels and not any("$" in label for label in labels)
