"""Drawing from a checkpoint: grids, arrays, seeds, memory."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from sgld_nrg import sample
from sgld_nrg.models import build_model, load_model
from sgld_nrg.sample import Chains
from sgld_nrg.sgld import langevin_step
from sgld_nrg.support.checkpoints import save_checkpoint
from sgld_nrg.support.commands import parse


@pytest.fixture
def draw(tiny_run, tmp_path):
    """A function that runs sample.py on the tiny run and returns its arrays; folder: of the PNG."""

    def drawn(*flags):
        array = tmp_path / "a.npz"
        files = ("--checkpoint", tiny_run / "jem.pt", "--out-dir", tmp_path, "--save-array", array)
        run("sample", *files, *flags)
        with np.load(array) as arrays:
            return dict(arrays)

    drawn.folder = tmp_path
    return drawn


def chains_of(checkpoint, *flags):
    args = parse("sample", list(map(str, flags)))
    sample.check_against_checkpoint(args, checkpoint)
    return Chains(checkpoint, args, torch.device("cpu"))


def unit(images):
    """Return the model's images as sample.py writes them, pixels in [0, 1]."""
    return (images.numpy() + 1) / 2


def classes_read(checkpoint, images):
    """Return the classes that the model reads in images, pixels in [0, 1]."""
    return load_model(checkpoint)(torch.tensor(images) * 2 - 1).argmax(1)


def test_fresh_chains_come_as_a_grid_and_as_an_array(draw):
    arrays = draw("--num", 10, "--steps", 5)
    images = arrays["images"]
    assert list(arrays) == ["images"] and images.shape == (10, 1, 8, 8)
    assert images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.1
    with Image.open(draw.folder / "samples-fresh.png") as grid:
        assert grid.size == (4 * 34 + 2, 3 * 34 + 2)  # 8 pixels enlarged to 32, two between
    assert sorted(os.listdir(draw.folder)) == ["a.npz", "samples-fresh.png"]


def test_the_same_seed_draws_the_same_images_bit_for_bit(draw):
    drawn = [draw("--num", 6, "--steps", 4, "--seed", seed)["images"] for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


def test_class_conditional_chains_carry_their_labels_and_read_as_their_class(draw, checkpoint):
    arrays = draw("--num", 60, "--class-label", 3, 7, "--steps", 60)
    labels = arrays["labels"]
    assert np.bincount(labels).tolist() == [0, 0, 0, 30, 0, 0, 0, 30]
    assert (classes_read(checkpoint, arrays["images"]).numpy() == labels).mean() > 0.9
    with Image.open(draw.folder / "samples-fresh-class-3-7.png") as grid:
        assert grid.size == (30 * 34 + 2, 2 * 34 + 2)


def test_the_buffer_is_shown_as_it_is(draw, checkpoint):
    images = torch.tensor(draw("--source", "buffer", "--num", 200)["images"] * 2 - 1)
    stored = checkpoint["buffer"]["images"].flatten(1)
    exact = "donot_use_mm_for_euclid_dist"
    distances = torch.cdist(images.flatten(1), stored, compute_mode=exact)
    assert (distances.min(1).values < 1e-5).all() and len(distances.argmin(1).unique()) == 200


def test_blocks_hold_no_more_chains_than_asked_and_all_of_them_together(checkpoint):
    chains = chains_of(checkpoint, "--num", 23, "--chunk-size", 10, "--steps", 1)
    assert [len(images) for _, images, _ in chains.blocks()] == [10, 10, 3]


PEAKS = """
import resource, sys
from sgld_nrg import sample
from sgld_nrg.support.commands import parse
for num in ("1000", "30000"):
    sample.main(parse("sample", [*sys.argv[1:], "--num", num]))
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_thirty_thousand_images_need_no_more_memory_than_one_thousand(tmp_path):
    config = {"arch": "small-cnn", "num_classes": 10, "channels": 1, "image_size": 28}
    config |= {"width": 2, "depth": 1, "stem_stride": 4}
    langevin = {"step_size": 0.1, "noise_std": 0.1, "pixel_grad_clip": None, "clamp": (-1, 1)}
    labels = torch.zeros(1, dtype=torch.int64)
    save_checkpoint(
        tmp_path / "jem.pt",
        "jem",
        model_config=config,
        model=build_model(**config).state_dict(),
        conditional=False,
        dataset="mnist",
        finished=True,
        sgld={"steps": 1, **langevin},
        restart={"kind": "uniform", "shape": [1, 28, 28], "num_classes": 10},
        buffer={"images": torch.zeros(1, 1, 28, 28), "labels": labels},
    )
    array = tmp_path / "a.npz"
    flags = ("--checkpoint", tmp_path / "jem.pt", "--steps", "1", "--save-array", array)
    command = [sys.executable, "-c", PEAKS, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    few, many = (int(part.split()[0]) for part in done.stdout.split("peak ")[1:])
    assert many < few + 30, (few, many)  # MiB; the images alone are 90
    with np.load(array) as arrays:
        assert arrays["images"].shape == (30_000, 1, 28, 28)


@pytest.fixture
def pictures(digits, tmp_path):
    """An .npz of five test digits, pixels in [0, 1], and the images as the model sees them."""
    images = digits.test.images[:5]
    np.savez(tmp_path / "pictures.npz", images=unit(images))
    return tmp_path / "pictures.npz", images


def test_chains_that_start_at_pictures_and_take_no_step_are_those_pictures_by_turns(draw, pictures):
    path, images = pictures
    drawn = draw("--from-images", path, "--num", 7, "--steps", 0)["images"]
    np.testing.assert_allclose(drawn, unit(images[[0, 1, 2, 3, 4, 0, 1]]), atol=1e-6)
    with Image.open(draw.folder / "samples-images.png") as grid:
        assert grid.size == (8 * 34 + 2, 2 * 34 + 2)  # each beside where it started


def test_the_word_test_stands_for_the_test_images(draw, digits):
    drawn = draw("--from-images", "test", "--num", 9, "--steps", 0)["images"]
    np.testing.assert_allclose(drawn, unit(digits.test.images[:9]), atol=1e-6)


@pytest.mark.parametrize(
    "part, rows, columns",
    [
        ("left", slice(None), slice(4)),
        ("right", slice(None), slice(4, None)),
        ("top", slice(4), slice(None)),
        ("bottom", slice(4, None), slice(None)),
        ("centre", slice(2, 6), slice(2, 6)),
    ],
)
def test_inpainting_changes_the_named_part_alone(draw, pictures, part, rows, columns):
    path, images = pictures
    flags = ("--from-images", path, "--num", 5, "--steps", 3, "--inpaint", part)
    changed = np.abs(draw(*flags)["images"] - unit(images)) > 1e-6
    inside = np.zeros((8, 8), bool)
    inside[rows, columns] = True
    assert not changed[:, 0, ~inside].any()
    assert changed[:, 0, inside].mean() > 0.3  # the clamp leaves some as they were


def test_a_white_part_of_a_picture_is_sampled_and_a_mask_of_one_colour_is_refused(
    draw, pictures, capsys
):
    path, images = pictures
    mask = np.zeros((8, 8), np.uint8)
    mask[0, 0] = 255
    Image.fromarray(mask).save(draw.folder / "corner.png")
    flags = ("--from-images", path, "--num", 5, "--steps", 3, "--inpaint")
    moved = np.abs(draw(*flags, draw.folder / "corner.png")["images"] - unit(images))
    assert moved[:, 0].reshape(5, -1)[:, 1:].max() < 1e-6
    Image.fromarray(mask * 0).save(draw.folder / "nothing.png")
    with pytest.raises(SystemExit) as caught:
        draw(*flags, draw.folder / "nothing.png")
    assert caught.value.code == 2 and "nothing to sample" in capsys.readouterr().err


def test_denoising_starts_at_noisy_pictures_and_descends_their_energy_without_noise(
    checkpoint, pictures
):
    path, images = pictures
    flags = ("--from-images", path, "--denoise", 0.4, "--num", 100, "--precision", "float32")
    chains = chains_of(checkpoint, *flags)
    starts, ends, _ = next(chains.blocks())
    noise = starts - images[torch.arange(100) % 5]
    assert abs(noise.std() - 0.4) < 0.02 and abs(noise.mean()) < 0.02
    again = chains._run(starts, chains.args.steps, None)
    torch.testing.assert_close(again, ends)  # nothing is left to chance
    before, after = (chains.energy(x) for x in (starts.clamp(-1, 1), ends))
    assert (after < before).all()


def test_a_step_without_noise_follows_the_last_and_takes_noise_off(checkpoint):
    flags = ("--num", 200, "--precision", "float32")
    noisy, clean = (
        next(chains_of(checkpoint, *flags, *more).blocks())[1] for more in (["--keep-noise"], [])
    )
    chains = chains_of(checkpoint, *flags)
    langevin = chains.langevin
    _, expected = langevin_step(chains.energy, noisy, langevin, noise=None)
    torch.testing.assert_close(clean, expected)
    assert langevin.noise_std > 0 and langevin.without_noise().noise_std == 0
    before, after = (chains.energy(x).mean() for x in (noisy, clean))
    assert after < before


def test_without_noise_there_is_none_to_take_off(checkpoint):
    flags = ("--num", 5, "--steps", 3, "--noise-std", 0)
    once, again = (
        next(chains_of(checkpoint, *flags, *more).blocks())[1] for more in (["--keep-noise"], [])
    )
    assert torch.equal(once, again)


def test_chains_of_no_steps_stay_where_they_start(checkpoint):
    starts, ends, _ = next(chains_of(checkpoint, "--num", 5, "--steps", 0).blocks())
    assert torch.equal(starts, ends)


def test_a_mixture_draws_its_classes_and_no_others(draw, checkpoint):
    arrays = draw("--num", 60, "--mixture", 3, 7, "--steps", 60)
    read = classes_read(checkpoint, arrays["images"]).bincount(minlength=10)
    assert read[[3, 7]].sum() > 54 and min(read[3], read[7]) > 10
    assert (draw.folder / "samples-fresh-mixture-3-7.png").exists()


def test_an_interpolation_begins_in_one_class_and_ends_in_the_other(checkpoint):
    chains = chains_of(checkpoint, "--interpolate", 0, 4, "--num", 20, "--steps", 40)
    _, images, _ = next(chains.blocks())
    way = chains.interpolate(images)
    assert way.shape == (20, sample.COLUMNS, 1, 8, 8) and torch.equal(way[:, 0], images)
    read = load_model(checkpoint)(way.flatten(0, 1)).argmax(1).view(20, -1)
    assert (read[:, 0] == 0).float().mean() > 0.8 and (read[:, -1] == 4).float().mean() > 0.8


def test_the_best_and_the_worst_chains_of_the_buffer_are_sorted_by_energy(draw, checkpoint):
    drawn = draw("--source", "buffer", "--by-energy", "--num", 20)["images"]
    model, stored = load_model(checkpoint), checkpoint["buffer"]["images"]
    with torch.no_grad():
        found, all_energies = (
            -model(x).logsumexp(1) for x in (torch.tensor(drawn) * 2 - 1, stored)
        )
    wanted = all_energies.sort().values
    ends = torch.cat([wanted[:10], wanted[-10:]])
    torch.testing.assert_close(found, ends, atol=1e-4, rtol=1e-4)


def test_an_animation_ends_where_the_chains_end_and_changes_nothing(draw):
    flags = ("--num", 4, "--steps", 120)
    plain, watched = (draw(*flags, *more)["images"] for more in ([], ["--animate"]))
    assert np.array_equal(plain, watched)
    film = Image.open(draw.folder / "samples-fresh.gif")
    with film, Image.open(draw.folder / "samples-fresh.png") as grid:
        assert 20 <= film.n_frames <= sample.FRAMES + 11
        film.seek(film.n_frames - 1)
        last, end = (np.asarray(picture.convert("L"), float) for picture in (film, grid))
        assert np.abs(last - end).mean() < 5
