"""Drawing from a checkpoint: grids, arrays, seeds, memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import runs
import sample


@pytest.fixture
def draw(tiny_run, tmp_path):
    """A function that runs sample.py on the tiny run and returns the arrays it wrote; the PNG lies in `folder`."""

    def run(*flags):
        sample.main(
            [
                "--checkpoint",
                str(tiny_run / "jem.pt"),
                "--out-dir",
                str(tmp_path),
                "--save-array",
                str(tmp_path / "a.npz"),
                *flags,
            ]
        )
        with np.load(tmp_path / "a.npz") as arrays:
            return dict(arrays)

    run.folder = tmp_path
    return run


def test_fresh_chains_come_as_a_grid_and_as_an_array(draw):
    arrays = draw("--num", "10", "--steps", "5")
    assert list(arrays) == ["images"] and arrays["images"].shape == (10, 1, 8, 8) and arrays["images"].dtype == np.float32
    assert arrays["images"].min() >= 0 and arrays["images"].max() <= 1 and arrays["images"].std() > 0.1
    with Image.open(draw.folder / "samples-fresh.png") as grid:
        assert grid.size == (4 * 34 + 2, 3 * 34 + 2)  # 8 pixels enlarged to 32, two between
    assert sorted(os.listdir(draw.folder)) == ["a.npz", "samples-fresh.png"]


def test_the_same_seed_draws_the_same_images_bit_for_bit(draw):
    first, second, other = (draw("--num", "6", "--steps", "4", "--seed", seed)["images"] for seed in ("1", "1", "2"))
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_class_conditional_chains_carry_their_labels_and_read_as_their_class(draw, checkpoint):
    arrays = draw("--num", "60", "--class-label", "3", "7", "--steps", "60")
    assert np.bincount(arrays["labels"]).tolist() == [0, 0, 0, 30, 0, 0, 0, 30]
    logits = runs.load_model(checkpoint, "cpu")(torch.tensor(arrays["images"]) * 2 - 1)
    assert (logits.argmax(1).numpy() == arrays["labels"]).mean() > 0.9
    with Image.open(draw.folder / "samples-fresh-class-3-7.png") as grid:
        assert grid.size == (30 * 34 + 2, 2 * 34 + 2)


def test_the_buffer_is_shown_as_it_is(draw, checkpoint):
    images = draw("--source", "buffer", "--num", "200")["images"] * 2 - 1
    stored = checkpoint["buffer"]["images"].flatten(1)
    distances = torch.cdist(torch.tensor(images).flatten(1), stored, compute_mode="donot_use_mm_for_euclid_dist")
    assert (distances.min(1).values < 1e-5).all() and len(distances.argmin(1).unique()) == 200


def test_blocks_hold_no_more_chains_than_asked_and_all_of_them_together(checkpoint):
    args = sample.parse_args(["--num", "23", "--chunk-size", "10", "--steps", "1", "--precision", "float32"])
    sizes = [len(images) for images, _ in sample.chain_blocks(checkpoint, args, torch.device("cpu"))]
    assert sizes == [10, 10, 3]


def test_ten_thousand_images_need_no_more_memory_than_one_thousand(tmp_path):
    config = {"arch": "small-cnn", "num_classes": 10, "channels": 1, "image_size": 28, "width": 2, "depth": 2}
    restart = {"kind": "uniform", "shape": [1, 28, 28], "num_classes": 10}
    runs.save_checkpoint(
        tmp_path / "jem.pt", "jem", model_config=config, model=runs.build_model(**config).state_dict(), conditional=False,
        sgld={"steps": 1, "step_size": 0.1, "noise_std": 0.1, "pixel_grad_clip": None, "clamp": (-1, 1)}, restart=restart,
        buffer={"images": torch.zeros(1, 1, 28, 28), "labels": torch.zeros(1, dtype=torch.int64)},
    )  # fmt: skip
    code = (
        "import resource, sys, sample; sample.main(sys.argv[1:]);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for num in ("1000", "10000"):
        flags = [
            "--checkpoint",
            str(tmp_path / "jem.pt"),
            "--num",
            num,
            "--steps",
            "1",
            "--save-array",
            str(tmp_path / "a.npz"),
        ]
        done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split("peak ")[1]))
    assert peaks[1] < peaks[0] + 15, peaks  # MiB; the images alone are 30
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (10_000, 1, 28, 28)
