"""Drawing from a checkpoint: grids, arrays, seeds, memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import chains
import runs
import sample
from chains import Chains


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
    sample.check_against_checkpoint(args, checkpoint)
    sizes = [len(images) for _, images, _ in Chains(checkpoint, args, torch.device("cpu")).blocks()]
    assert sizes == [10, 10, 3]


def test_thirty_thousand_images_need_no_more_memory_than_one_thousand(tmp_path):
    config = {"arch": "small-cnn", "num_classes": 10, "channels": 1, "image_size": 28, "width": 2, "depth": 2}
    restart = {"kind": "uniform", "shape": [1, 28, 28], "num_classes": 10}
    runs.save_checkpoint(
        tmp_path / "jem.pt", "jem", model_config=config, model=runs.build_model(**config).state_dict(), conditional=False,
        dataset="mnist", finished=True,
        sgld={"steps": 1, "step_size": 0.1, "noise_std": 0.1, "pixel_grad_clip": None, "clamp": (-1, 1)}, restart=restart,
        buffer={"images": torch.zeros(1, 1, 28, 28), "labels": torch.zeros(1, dtype=torch.int64)},
    )  # fmt: skip
    code = (
        "import resource, sys, sample; sample.main(sys.argv[1:]);"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    peaks = []
    for num in ("1000", "30000"):
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
    assert peaks[1] < peaks[0] + 30, peaks  # MiB; the images alone are 90
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["images"].shape == (30_000, 1, 28, 28)


@pytest.fixture
def pictures(digits, tmp_path):
    """An .npz of five test digits, pixels in [0, 1], and the images as the model sees them."""
    images = digits.test.images[:5]
    np.savez(tmp_path / "pictures.npz", images=(images.numpy() + 1) / 2)
    return tmp_path / "pictures.npz", images


def test_chains_that_start_at_pictures_and_take_no_step_are_those_pictures_by_turns(draw, pictures):
    path, images = pictures
    drawn = draw("--from-images", str(path), "--num", "7", "--steps", "0")["images"]
    np.testing.assert_allclose(drawn, (images[[0, 1, 2, 3, 4, 0, 1]].numpy() + 1) / 2, atol=1e-6)
    with Image.open(draw.folder / "samples-images.png") as grid:
        assert grid.size == (8 * 34 + 2, 2 * 34 + 2)  # each beside where it started


def test_the_word_test_stands_for_the_test_images(draw, digits):
    drawn = draw("--from-images", "test", "--num", "9", "--steps", "0")["images"]
    np.testing.assert_allclose(drawn, (digits.test.images[:9].numpy() + 1) / 2, atol=1e-6)


@pytest.mark.parametrize("part, rows, columns", [
    ("left", slice(None), slice(4)), ("right", slice(None), slice(4, None)), ("top", slice(4), slice(None)),
    ("bottom", slice(4, None), slice(None)), ("centre", slice(2, 6), slice(2, 6)),
])  # fmt: skip
def test_inpainting_changes_the_named_part_alone(draw, pictures, part, rows, columns):
    path, images = pictures
    drawn = draw("--from-images", str(path), "--num", "5", "--steps", "3", "--inpaint", part)["images"]
    changed = np.abs(drawn - (images.numpy() + 1) / 2) > 1e-6
    inside = np.zeros((8, 8), bool)
    inside[rows, columns] = True
    assert not changed[:, 0, ~inside].any() and changed[:, 0, inside].mean() > 0.3  # the clamp leaves some as they were


def test_a_white_part_of_a_picture_is_sampled_and_a_mask_of_one_colour_is_refused(draw, pictures, capsys):
    path, images = pictures
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(draw.folder / "corner.png")
    flags = ["--from-images", str(path), "--num", "5", "--steps", "3", "--inpaint"]
    drawn = draw(*flags, str(draw.folder / "corner.png"))["images"]
    assert np.abs(drawn - (images.numpy() + 1) / 2)[:, 0].reshape(5, -1)[:, 1:].max() < 1e-6
    Image.fromarray(mask * 0).save(draw.folder / "nothing.png")
    with pytest.raises(SystemExit) as caught:
        draw(*flags, str(draw.folder / "nothing.png"))
    assert caught.value.code == 2 and "nothing to sample" in capsys.readouterr().err


def test_denoising_starts_at_noisy_pictures_and_descends_their_energy_without_noise(checkpoint, pictures):
    path, images = pictures
    args = sample.parse_args(["--from-images", str(path), "--denoise", "0.4", "--num", "100", "--precision", "float32"])
    sample.check_against_checkpoint(args, checkpoint)
    drawn = Chains(checkpoint, args, torch.device("cpu"))
    starts, ends, _ = next(drawn.blocks())
    noise = starts - images[torch.arange(100) % 5]
    assert abs(noise.std() - 0.4) < 0.02 and abs(noise.mean()) < 0.02
    torch.testing.assert_close(drawn._run(starts, args.steps, None), ends)  # nothing is left to chance
    before, after = (drawn.energy_of(x) for x in (starts.clamp(-1, 1), ends))
    assert (after < before).all()


def test_a_mixture_draws_its_classes_and_no_others(draw, checkpoint):
    arrays = draw("--num", "60", "--mixture", "3", "7", "--steps", "60")
    read = runs.load_model(checkpoint, "cpu")(torch.tensor(arrays["images"]) * 2 - 1).argmax(1).bincount(minlength=10)
    assert read[[3, 7]].sum() > 54 and min(read[3], read[7]) > 10
    assert (draw.folder / "samples-fresh-mixture-3-7.png").exists()


def test_an_interpolation_begins_in_one_class_and_ends_in_the_other(checkpoint):
    args = sample.parse_args(["--interpolate", "0", "4", "--num", "20", "--steps", "40"])
    sample.check_against_checkpoint(args, checkpoint)
    drawn = Chains(checkpoint, args, torch.device("cpu"))
    _, images, _ = next(drawn.blocks())
    way = drawn.interpolate(images)
    assert way.shape == (20, chains.COLUMNS, 1, 8, 8) and torch.equal(way[:, 0], images)
    read = runs.load_model(checkpoint, "cpu")(way.flatten(0, 1)).argmax(1).view(20, -1)
    assert (read[:, 0] == 0).float().mean() > 0.8 and (read[:, -1] == 4).float().mean() > 0.8


def test_the_best_and_the_worst_chains_of_the_buffer_are_sorted_by_energy(draw, checkpoint):
    images = torch.tensor(draw("--source", "buffer", "--by-energy", "--num", "20")["images"]) * 2 - 1
    model = runs.load_model(checkpoint, "cpu")
    with torch.no_grad():
        found, everything = (-model(x).logsumexp(1) for x in (images, checkpoint["buffer"]["images"]))
    wanted = everything.sort().values
    torch.testing.assert_close(found, torch.cat([wanted[:10], wanted[-10:]]), atol=1e-4, rtol=1e-4)


def test_an_animation_ends_where_the_chains_end(draw):
    draw("--num", "4", "--steps", "120", "--animate")
    with Image.open(draw.folder / "samples-fresh.gif") as film, Image.open(draw.folder / "samples-fresh.png") as grid:
        assert 20 <= film.n_frames <= chains.FRAMES + 11
        film.seek(film.n_frames - 1)
        difference = np.abs(np.asarray(film.convert("L"), float) - np.asarray(grid.convert("L"), float))
        assert difference.mean() < 5


def test_watching_changes_nothing(draw):
    plain, watched = (draw("--num", "4", "--steps", "30", *more)["images"] for more in ([], ["--animate"]))
    assert np.array_equal(plain, watched)
