"""Folders of many files: read in a pool, kept in one file, and never otherwise than one by one."""

import json
import os
import shutil
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import Bomb, write_folder
from PIL import Image

from sgld_nrg.support import data, folder_cache, folders, images
from sgld_nrg.support.errors import UserError
from sgld_nrg.support.image_files import FilePictures
from sgld_nrg.support.images import open_pictures
from sgld_nrg.support.reading import AS_FOUND, Reading

SIZES = {"ant": 30, "bee": 24}


@pytest.fixture
def many(monkeypatch):
    """Let few files be many: a pool of two processes reads them, and they are kept."""
    monkeypatch.setattr(folders, "MANY", 10)
    monkeypatch.setattr(folders, "CHUNK", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.fixture
def mine(tmp_path):
    """A folder of two classes, in train/ and test/."""
    for split in ("train", "test"):
        write_folder(tmp_path / "mine" / split, SIZES)
    return tmp_path / "mine"


def cache_of(root):
    return root / folder_cache.NAME


def loaded(root, capsys, *rest):
    """Return what is known of a folder, or the sentence that refuses it, and what was printed."""
    try:
        found = data.load("folder", root, *rest)
    except UserError as error:
        return str(error), capsys.readouterr().out
    splits = [tensor.numpy().tobytes() for split in found[-3:] for tensor in split]
    return (splits, found.shape, found.classes, found.origin), capsys.readouterr().out


def one_by_one(root, capsys, *rest):
    """Return what `loaded` does when the files are few."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "MANY", 10**9)
        return loaded(root, capsys, *rest)


@pytest.fixture
def looks(monkeypatch):
    """A list that grows by each file that this process looks at closely; there is no pool."""
    looked, closely = [], folders.look_closely

    def counting(path, side):
        looked.append(path)
        return closely(path, side)

    monkeypatch.setattr(folders, "look_closely", counting)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return looked


def grey_noise(root, count=12, side=8):
    """Write pictures of noise into two classes and return them: (name, picture)."""
    random = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 256, (side, side), dtype=np.uint8)
            yield root / name / f"{number:02}.png", Image.fromarray(pixels)


def write_plain(root):
    for path, picture in grey_noise(root):
        picture.save(path)


def write_formats(root):
    formats = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")
    for number, (path, picture) in enumerate(grey_noise(root)):
        picture.save(path, formats[number % len(formats)])


def write_modes(root):
    modes = ("L", "RGB", "RGBA", "LA", "1", "P", "I;16")
    for number, (path, picture) in enumerate(grey_noise(root)):
        picture.convert(modes[number % len(modes)]).save(path)


def write_turned(root):
    for number, (path, picture) in enumerate(grey_noise(root)):
        exif = Image.Exif()
        exif[0x0112] = number % 10
        picture.save(path, exif=exif)


def write_sizes(root):
    for number, (path, picture) in enumerate(grey_noise(root)):
        picture.resize((8 + number % 3, 8)).save(path)


def write_frames(root):
    for path, picture in grey_noise(root):
        picture.convert("RGB").save(path, "WEBP", save_all=True, append_images=[picture.rotate(90)])


def write_keyed(root):
    for path, picture in grey_noise(root):
        picture.save(path, transparency=int(picture.getpixel((3, 3))))


def write_floats(root):
    for path, picture in grey_noise(root):
        Image.fromarray(np.asarray(picture, np.float32) / 255).save(path.with_suffix(".tif"))


def write_two_scales(root):
    write_floats(root)
    for number in range(4, 12):  # whole chunks, so that a process may see them alone
        pixels = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
        Image.fromarray(pixels).save(root / "bee" / f"{number:02}.tif")


def write_no_image(root):
    write_plain(root)
    for name in ("bee/03.png", "ant/11.png", "bee/01.png"):
        (root / name).write_bytes(b"none")


def write_cut_short(root):
    for path, picture in grey_noise(root, side=32):
        picture.save(path, "JPEG")
    for name in ("bee/03.png", "ant/11.png", "bee/01.png"):
        (root / name).write_bytes((root / name).read_bytes()[:-200])


WRITTEN = {
    **{"plain": write_plain, "formats": write_formats, "modes": write_modes},
    **{"turned": write_turned, "sizes": write_sizes, "frames": write_frames},
    **{"keyed": write_keyed, "floats": write_floats, "two scales": write_two_scales},
    **{"no image": write_no_image, "cut short": write_cut_short},
}
REFUSED = {"two scales": "bee/04.tif", "no image": "ant/11.png", "cut short": "ant/11.png"}


@pytest.mark.parametrize("name", WRITTEN)
def test_many_files_are_read_as_few_are_and_as_each_by_itself(many, name, tmp_path, capsys):
    root = tmp_path / "mine"
    WRITTEN[name](root)
    (root / "ant" / "notes.txt").write_text("no picture")
    for image_size in (32 if name == "cut short" else 8, 6):
        found, told = one_by_one(root, capsys, image_size)
        for _ in range(2):  # as they are read, and as they were kept
            assert loaded(root, capsys, image_size) == (found, told)
        assert (name in REFUSED) == isinstance(found, str)
        if name in REFUSED:
            assert REFUSED[name] in found and not cache_of(root).exists()
            continue
        whole = folders.read_labelled(root, image_size, AS_FOUND).parts[""].images
        whole = whole.div(255).mul(2).sub(1) if whole.dtype == torch.uint8 else whole
        capsys.readouterr()
        paths = sorted((root / "ant").glob("[0-9]*")) + sorted((root / "bee").glob("[0-9]*"))
        for path, row in zip(paths, whole, strict=True):
            alone = FilePictures([path], AS_FOUND).read(0, whole.shape[1:])
            assert torch.equal(alone.mul(2).sub(1), row), path


def test_bytes_stay_bytes_until_they_are_split(mine):
    for part in folders.read_labelled(mine, None, AS_FOUND).parts.values():
        assert part.images.dtype == torch.uint8
    resized = folders.read_labelled(mine, 7, AS_FOUND).parts["train"]
    assert resized.images.dtype == torch.float32


def test_many_files_are_read_by_other_processes(many, mine, monkeypatch):
    here, closely = os.getpid(), folders.look_closely

    def elsewhere(path, side):
        assert os.getpid() != here
        return closely(path, side)

    monkeypatch.setattr(folders, "look_closely", elsewhere)
    data.load("folder", mine)


def test_files_that_were_kept_are_not_read_again(many, mine, looks, capsys):
    found = loaded(mine, capsys)
    assert len(looks) == 2 * sum(SIZES.values()) and cache_of(mine).is_file()
    before = cache_of(mine).read_bytes()
    assert loaded(mine, capsys) == found == one_by_one(mine, capsys)
    assert len(looks) == 2 * 2 * sum(SIZES.values())  # by one_by_one alone
    assert cache_of(mine).read_bytes() == before
    assert [path.name for path in mine.iterdir() if path.name.startswith(".")] == [
        folder_cache.NAME
    ]


def test_few_files_are_not_kept(mine, monkeypatch):
    monkeypatch.setattr(folders, "MANY", 2 * sum(SIZES.values()) + 1)
    data.load("folder", mine)
    assert not cache_of(mine).exists()
    monkeypatch.setattr(folders, "MANY", 2 * sum(SIZES.values()))
    data.load("folder", mine)
    assert cache_of(mine).exists()


def repaint(root):
    """Change pixels, and neither the size of the file nor the time when it was last written."""
    path = root / "train" / "ant" / "2.png"
    before = path.stat()
    others = (root / "train" / "bee").iterdir()
    other = next(other for other in others if other.stat().st_size == before.st_size)
    path.write_bytes(other.read_bytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def swap(root):
    first, second = root / "train" / "ant" / "1.png", root / "train" / "bee" / "1.png"
    first.rename(root / "kept")
    second.rename(first)
    (root / "kept").rename(second)


CHANGES = {
    "repainted": repaint,
    "swapped": swap,
    "added": lambda root: shutil.copy(root / "test/ant/0.png", root / "train/ant/x.png"),
    "removed": lambda root: (root / "train" / "ant" / "3.png").unlink(),
    "renamed": lambda root: (root / "train/ant/3.png").rename(root / "train/ant/x.png"),
    "moved": lambda root: (root / "train/ant/3.png").rename(root / "test/ant/x.png"),
    "of another class": lambda root: (root / "train/ant/3.png").rename(root / "train/bee/x.png"),
    "a class renamed": lambda root: [
        (root / split / "ant").rename(root / split / "cow") for split in ("train", "test")
    ],
    "a split renamed": lambda root: (root / "test").rename(root / "val"),
    "damaged": lambda root: (root / "train" / "ant" / "3.png").write_bytes(b"none"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("named", ["mine", "."])
def test_what_was_kept_is_not_used_after_a_change(
    change, named, many, mine, looks, capsys, monkeypatch
):
    monkeypatch.chdir(mine if named == "." else mine.parent)
    root = type(mine)(named)
    before, _ = loaded(root, capsys)
    looks.clear()
    CHANGES[change](root)
    now = loaded(root, capsys)
    assert looks and now[0] != before
    assert now == one_by_one(root, capsys)
    if change != "damaged":
        looks.clear()
        assert loaded(root, capsys) == now and not looks  # the new ones are kept instead


@pytest.mark.parametrize("was, now", [("ant", "bnt"), ("ant", "an"), ("1", "2")])
def test_a_class_of_another_name_in_the_current_folder_is_another(
    was, now, many, tmp_path, looks, monkeypatch
):
    write_folder(tmp_path, {was: 12, "other": 12})
    monkeypatch.chdir(tmp_path)
    root = type(tmp_path)(".")
    data.load("folder", root)
    looks.clear()
    (tmp_path / was).rename(tmp_path / now)
    assert now in data.load("folder", root).classes and looks


@pytest.mark.parametrize(
    "image_size, reading",
    [
        (6, Reading()),
        (None, Reading(background="black")),
        (None, Reading(pixel_range=(0, 100))),
        (None, Reading(channel_axis="first")),
    ],
)
def test_what_was_kept_is_not_used_for_another_reading(
    image_size, reading, many, mine, looks, capsys
):
    found = loaded(mine, capsys)
    looks.clear()
    other = loaded(mine, capsys, image_size, reading)
    assert looks and other == one_by_one(mine, capsys, image_size, reading) != found


@pytest.mark.parametrize("module, name", [(folder_cache, "VERSION"), (Image, "__version__")])
def test_what_another_version_kept_is_not_used(module, name, many, mine, looks, monkeypatch):
    data.load("folder", mine)
    looks.clear()
    monkeypatch.setattr(module, name, "another")
    data.load("folder", mine)
    assert looks


def flip(content, place):
    content = bytearray(content)
    content[place] ^= 255
    return bytes(content)


DAMAGE = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"none",
    **{
        f"cut at {share}": lambda whole, s=share: whole[: int(len(whole) * s)]
        for share in (0.3, 0.99)
    },
    **{
        f"flipped at {share}": lambda whole, s=share: flip(whole, int(len(whole) * s))
        for share in (0.1, 0.3, 0.5)
    },
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_ignored_and_replaced(damage, many, mine, looks, capsys):
    found = loaded(mine, capsys)
    whole = cache_of(mine).read_bytes()
    cache_of(mine).write_bytes(DAMAGE[damage](whole))
    looks.clear()
    assert loaded(mine, capsys) == found and looks
    looks.clear()
    assert loaded(mine, capsys) == found and not looks


def changed(root, **changes):
    with np.load(cache_of(root)) as arrays:
        np.savez(cache_of(root), **{**arrays, **changes})


def test_a_file_of_something_else_is_ignored_and_nothing_in_it_is_run(
    many, mine, looks, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    found = loaded(mine, capsys)
    with np.load(cache_of(mine)) as arrays:
        marks, words = arrays["test marks"], json.loads(str(arrays["words"]))
    bomb = np.array([Bomb()] * len(marks), object)
    without = {name: words[name] for name in ("train",)}
    for changes in (
        {"key": np.array("another")},
        {"key": bomb},
        {"test marks": bomb},
        {"test marks": marks[1:]},
        {"words": np.array(json.dumps(without))},
        {"words": np.array("[]")},
    ):
        changed(mine, **changes)
        looks.clear()
        assert loaded(mine, capsys) == found and looks, changes
    assert not (tmp_path / "exploded").exists()
    with zipfile.ZipFile(cache_of(mine), "w") as archive:
        archive.writestr("notes.txt", "none")
    assert loaded(mine, capsys) == found
    cache_of(mine).unlink()
    cache_of(mine).mkdir()
    assert loaded(mine, capsys) == found
    assert [path.name for path in mine.glob(".*")] == [folder_cache.NAME]


def test_a_folder_that_cannot_be_written_to_is_read_all_the_same(many, mine, capsys, monkeypatch):
    found = one_by_one(mine, capsys)

    def cut_off(file, **_):
        file.write(b"a part")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", cut_off)
        assert loaded(mine, capsys) == found
    assert not list(mine.glob(".*"))
    closed, opening = set(), type(mine).open

    def denied(path, mode="r", *rest, **named):  # the tests may run as root, who may write
        if "w" in mode and path.parent == mine:
            closed.add(path)
            raise PermissionError(13, "Permission denied")
        return opening(path, mode, *rest, **named)

    mine.chmod(0o555)
    monkeypatch.setattr(type(mine), "open", denied)
    assert loaded(mine, capsys) == found
    mine.chmod(0o755)
    assert closed and not list(mine.glob(".*"))


def test_more_than_a_folder_is_filled_with_unasked_is_not_kept(many, mine, monkeypatch):
    count = 2 * sum(SIZES.values()) * 64  # bytes
    for most in (count - 1, count):
        monkeypatch.setattr(folder_cache, "MOST_BYTES", most)
        data.load("folder", mine)
        assert cache_of(mine).exists() == (most == count)


def test_what_a_killed_run_left_is_removed_and_what_another_writes_is_not(many, mine):
    old, new = (mine / f"{folder_cache.STEM}.{number}.tmp" for number in (7, 8))
    for path in (old, new):
        path.write_bytes(b"not finished")
    os.utime(old, (time.time() - 7200,) * 2)
    data.load("folder", mine)
    assert not old.exists() and new.exists()


def test_the_file_is_no_class_no_picture_and_not_told_of(many, mine, tmp_path, capsys):
    (mine / f"{folder_cache.STEM}.7.tmp").write_bytes(b"not finished")
    data.load("folder", mine)
    assert "skipped" not in capsys.readouterr().out
    flat = shutil.copytree(mine / "train", tmp_path / "flat")
    for _ in range(2):
        data.load("folder", flat)
        assert "skipped" not in capsys.readouterr().out
    assert cache_of(flat).is_file() and "skipped" not in open_pictures(flat).words


def test_too_little_memory_for_what_bytes_become_is_said(mine, monkeypatch):
    def none_left(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(images.torch, "empty", none_left)
    with pytest.raises(
        UserError, match=r"not enough memory for 54 pictures of 1x8x8 .*--image-size"
    ):
        data.load("folder", mine)
