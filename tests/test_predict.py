"""predict.py: what it reads, the table, the sheet, and what it refuses."""

import csv

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

from sgld_nrg import predict
from sgld_nrg.models import load_model
from sgld_nrg.support.checkpoints import load_checkpoint, save_checkpoint
from sgld_nrg.support.commands import parse
from sgld_nrg.support.detector import Detector, detector_for

COLUMNS = ["name", "label", "probability", "label_set", "energy", "p_value"]


@pytest.fixture(scope="module")
def with_detector(tiny_run, digits, tmp_path_factory):
    """The checkpoint of the tiny run with its detector, and classes that are named with commas."""
    state = load_checkpoint(tiny_run / "jem.pt", "jem")
    state["detector"] = detector_for(load_model(state), digits).state_dict()
    state["origin"]["classes"] = ["nought", "one, single", *map(str, range(2, 10))]
    path = tmp_path_factory.mktemp("detector") / "jem.pt"
    kind, _ = state.pop("kind"), state.pop("format")
    save_checkpoint(path, kind, **state)
    return path


@pytest.fixture(scope="module")
def pictures(digits, tmp_path_factory):
    """A folder of eight test digits, one of them white, in two folders."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    for number, image in enumerate(digits.test.images[:8]):
        pixels = ((image[0] + 1) * 127.5).round().byte().numpy()
        place = root / "more" if number > 4 else root
        pixels = np.full_like(pixels, 255) if number == 3 else pixels
        Image.fromarray(pixels).save(place / f'{number}, "a digit".png')
    return root


@pytest.fixture
def judge(with_detector, tmp_path):
    """A function that runs predict.py and returns the rows of its table."""

    def judged(*words, folder=tmp_path / "out"):
        run("predict", *words, "--checkpoint", with_detector, "--out-dir", folder)
        with open(folder / "predictions.csv", newline="") as file:
            return list(csv.DictReader(file))

    return judged


def refused(capsys, *words):
    """Return the sentence with which predict.py ends, with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        run("predict", *words)
    assert caught.value.code == 2
    sentence = capsys.readouterr().err
    assert sentence.startswith("error: ") and sentence.count("\n") == 1
    return sentence


def test_a_folder_becomes_a_table_of_its_files_and_a_sheet(judge, pictures, tmp_path, capsys):
    rows = judge(pictures)
    assert list(rows[0]) == COLUMNS and len(rows) == 8
    assert [row["name"] for row in rows] == sorted(map(str, pictures.rglob("*.png")))
    white = next(row for row in rows if "3," in row["name"])
    lowest = min(float(row["p_value"]) for row in rows)
    assert float(white["p_value"]) == lowest == pytest.approx(1 / 181)
    with Image.open(tmp_path / "out" / "predictions.png") as sheet:
        assert sheet.size[0] == 8 * (predict.SIDE + 36)
        assert sheet.getpixel((predict.SIDE // 2, predict.SIDE // 2)) == (255, 255, 255)
    said = capsys.readouterr().out
    unfamiliar = sum(float(row["p_value"]) < 0.05 for row in rows)
    assert f"{unfamiliar} of 8 look unfamiliar (p below 0.05)" in said and white["name"] in said
    assert said.index(white["name"]) < min(said.index(row["name"]) for row in rows if row != white)


def test_the_table_says_what_the_detector_says(judge, digits, with_detector, tmp_path):
    images = digits.test.images[:300]
    np.savez(tmp_path / "a.npz", images=(images.numpy() + 1) / 2)
    rows = judge(tmp_path / "a.npz", "--alpha", 0.2)
    checkpoint = load_checkpoint(with_detector, "jem")
    detector = Detector.from_state(load_model(checkpoint), checkpoint["detector"])
    said, names = detector.verdicts(images), checkpoint["origin"]["classes"]
    assert [row["name"] for row in rows] == [str(number) for number in range(300)]
    for column, values in (
        ("probability", said.probabilities.amax(1)),
        ("energy", said.energy),
        ("p_value", said.p_values),
    ):
        found = torch.tensor([float(row[column]) for row in rows])
        assert torch.allclose(found, values.float(), atol=2e-3), column
    assert [row["label"] for row in rows] == [names[k] for k in said.probabilities.argmax(1)]
    sets = detector.label_sets(said, 0.2)
    for row, inside in zip(rows, sets, strict=True):
        assert row["label_set"].split(";") == [names[k] for k in inside.nonzero()[:, 0]]
    assert "one, single" in {row["label"] for row in rows}


def test_one_file_an_array_and_several_paths_are_named_without_doubt(
    judge, pictures, digits, tmp_path
):
    array = tmp_path / "b.npy"
    np.save(array, (digits.test.images[:5, 0].numpy() + 1) / 2)
    one = next(pictures.glob("0*.png"))
    assert [row["name"] for row in judge(one)] == [str(one)]
    assert [row["name"] for row in judge(array)] == list("01234")
    names = [row["name"] for row in judge(one, array)]
    assert names == [str(one), *(f"{array}[{number}]" for number in range(5))]


def test_chunks_change_nothing_but_the_memory(judge, digits, tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", (digits.test.images[:40, 0].numpy() + 1) / 2)
    whole = judge(tmp_path / "a.npy")
    sizes, read = [], predict.read_all
    monkeypatch.setattr(predict, "CHUNK_SIZE", 7)
    monkeypatch.setattr(predict, "read_all", lambda *a: sizes.append(len(a[1])) or read(*a))
    monkeypatch.setattr(predict, "SHOWN", 5)
    parts = judge(tmp_path / "a.npy")
    assert sizes == [7] * 5 + [5]
    for mine, its in zip(whole, parts, strict=True):
        assert (mine["name"], mine["label"]) == (its["name"], its["label"])
        assert float(mine["p_value"]) == pytest.approx(float(its["p_value"]), abs=0.006)
    with Image.open(tmp_path / "out" / "predictions.png") as sheet:
        assert sheet.size[0] == 5 * (predict.SIDE + 36)


def test_colour_and_other_sizes_are_brought_to_the_networks(judge, tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    [row] = judge(tmp_path / "red.png")
    assert float(row["p_value"]) < 0.05


def test_a_dry_run_judges_a_few_and_keeps_nothing(with_detector, pictures, tmp_path, capsys):
    table = tmp_path / "t.csv"
    flags = ("--checkpoint", with_detector, "--out-dir", tmp_path / "out", "--save-csv", table)
    run("predict", pictures, *flags, "--dry-run")
    assert "of 4 look unfamiliar" in capsys.readouterr().out
    assert not table.exists() and not (tmp_path / "out").exists()


def test_the_table_goes_where_save_csv_says_and_replaces_only_its_own_kind(
    with_detector, pictures, tmp_path, capsys
):
    table = tmp_path / "t.csv"
    words = (pictures, "--checkpoint", with_detector, "--out-dir", tmp_path / "out")
    for _ in range(2):
        run("predict", *words, "--save-csv", table)
    assert table.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["predictions.png"]
    mine = tmp_path / "mine.csv"
    mine.write_text("name,salary\n")
    capsys.readouterr()
    assert "no table of predict.py's" in refused(capsys, *words, "--save-csv", mine)
    assert mine.read_text() == "name,salary\n"


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda path: path.write_bytes(b"no picture"), "no image of a known kind"),
        (lambda path: Image.new("L", (99, 99)).save(path, format="PNG"), "cannot be read"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named_and_leaves_no_half_a_table(
    with_detector, tmp_path, capsys, make, says
):
    folder, bad = tmp_path / "pictures", tmp_path / "pictures" / "bad.png"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    make(bad)
    bad.write_bytes(bad.read_bytes()[:60])  # the header of an image, and no pixels
    words = (folder, "--checkpoint", with_detector, "--out-dir", tmp_path / "out")
    assert (sentence := refused(capsys, *words)) and "bad.png" in sentence and says in sentence
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_checkpoint_without_detector_gets_one_from_its_data_or_says_why_not(
    tiny_run, pictures, tmp_path, capsys
):
    state = load_checkpoint(tiny_run / "jem.pt", "jem")
    state.pop("detector", None)
    kind, _ = state.pop("kind"), state.pop("format")
    save_checkpoint(tmp_path / "jem.pt", kind, **state)
    words = (pictures, "--checkpoint", tmp_path / "jem.pt", "--out-dir", tmp_path / "out")
    run("predict", *words)
    assert "has no detector: fitting one" in capsys.readouterr().out
    state["dataset"] = "folder"
    state["origin"]["data_dir"] = str(tmp_path / "gone")
    save_checkpoint(tmp_path / "jem.pt", kind, **state)
    sentence = refused(capsys, *words)
    assert "no detector" in sentence and "--data-dir" in sentence


def test_it_says_when_no_picture_can_look_unfamiliar(judge, pictures, capsys):
    judge(pictures, "--alpha", 0.005)
    said = capsys.readouterr().out
    assert "0 of 8 look unfamiliar" in said and "too few held-out images" in said
    judge(pictures, "--alpha", 0.05)
    assert "too few held-out images" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "name the pictures"),
        (("a.png", "--save-csv", "a.txt"), ".csv"),
        (("a.png", "--alpha", "1"), "above 0 and below 1"),
        (("a.png", "--alpha", "0"), "above 0 and below 1"),
        (("a.png", "--alhpa", "0.1"), "did you mean --alpha?"),
        (("a.png", "--pixel-range", "1", "0"), "must be below"),
    ],
)
def test_a_wrong_command_line_is_answered_in_a_sentence(words, says, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("predict", words)
    assert caught.value.code == 2 and says in capsys.readouterr().err


def test_the_help_shows_that_paths_stand_by_themselves(capsys):
    with pytest.raises(SystemExit):
        parse("predict", ["--help"])
    assert "[flags] PATH ..." in capsys.readouterr().out
    assert parse("predict", ["a.png", "b", "--alpha", "0.1"]).paths == ["a.png", "b"]
