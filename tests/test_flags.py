"""Command lines: help before torch, each read once, flags alike in all scripts, presets."""

import argparse
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from sgld_nrg.support import commands
from sgld_nrg.support.commands import parse
from sgld_nrg.support.parser import Either
from sgld_nrg.support.presets import BASE, PRESETS, SHAPES

SCRIPTS = tuple(commands.SCRIPTS)
SECONDS = 0.5  # for a whole process
# flags whose default is another in a script that reads a checkpoint
ASKS_THE_CHECKPOINT = ("steps", "step_size", "noise_std", "data_dir")
# Runs a script as __main__ where importing any of these fails.
WITHOUT_LIBRARIES = """
import runpy, sys
sys.modules.update(dict.fromkeys(["torch", "numpy", "matplotlib", "torchvision", "sklearn"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def flags_of(script):
    """Return {name: row of the table} of a script's flags."""
    groups = commands.SCRIPTS[script].groups
    entries = [entry for _, rows in groups for entry in rows]
    rows = [row for entry in entries for row in (entry.flags if type(entry) is Either else [entry])]
    found = {row.name.removeprefix("--").replace("-", "_"): row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "flag, code, says", [("--help", 0, "--device"), ("--sede=3", 2, "did you mean --seed?")]
)
def test_help_and_a_mistyped_flag_are_answered_at_once_and_without_the_libraries(
    script, flag, code, says
):
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, str(ROOT / f"{script}.py"), flag]
    taken = []
    while len(taken) < 3 and (not taken or taken[-1] >= SECONDS):  # the best of three
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        taken.append(time.perf_counter() - start)
        assert done.returncode == code, done.stderr
        assert says in (done.stderr if code else done.stdout)
    assert min(taken) < SECONDS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_command_line_is_read_once(script, monkeypatch):
    read, calls = argparse.ArgumentParser.parse_args, []

    def counted(self, *words):
        calls.append(words)
        return read(self, *words)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", counted)
    words = ["--seed", "3", *["a.png"] * (script == "predict")]
    args = parse(script, words)
    assert args.seed == 3 and calls == [(words,)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_kebab_case_and_has_help(script):
    for name, row in flags_of(script).items():
        dashes = "" if (script, name) == ("predict", "paths") else "--"
        assert row.settings["help"] and row.name == dashes + name.replace("_", "-")
        assert name == name.lower() and name.replace("_", "").isalnum()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_and_shows_the_defaults_that_the_flags_before_it_imply(
    script, capsys
):
    with pytest.raises(SystemExit) as caught:
        parse(script, ["--seed", "1234567", "--help"], doc="What it does.")
    shown = capsys.readouterr().out
    assert caught.value.code == 0 and "What it does." in shown and "(default: 1234567)" in shown
    assert all(row.name in shown for row in flags_of(script).values())
    if script == "train_jem":
        with pytest.raises(SystemExit):
            parse(script, ["--dataset", "mnist", "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        epochs = PRESETS["mnist"]["epochs"]
        assert f"passes over the training images (default: {epochs})" in shown


def test_flags_that_scripts_share_have_one_type_default_and_help():
    seen = {}
    for script in SCRIPTS:
        for name, row in flags_of(script).items():
            if name not in ASKS_THE_CHECKPOINT:
                mine = (row.default, row.settings)
                assert seen.setdefault(name, mine) == mine, name


def test_every_preset_sets_the_same_flags_and_each_is_a_flag_without_another_default():
    flags = flags_of("train_jem")
    for preset in PRESETS.values():
        assert preset.keys() == BASE.keys()
        for name, value in preset.items():
            kind = flags[name].settings.get("type")
            assert flags[name].default is None
            assert kind is None or kind(str(value)) == value
    assert all(shape.keys() < BASE.keys() for shape in SHAPES.values())


def test_a_preset_follows_the_data_set_and_any_flag_overrides_it():
    assert parse("train_jem", ["--dataset", "mnist"]).buffer_size == PRESETS["mnist"]["buffer_size"]
    args = parse("train_jem", ["--dataset", "mnist", "--lr", "0.5"])
    assert args.lr == 0.5 and args.given == {"dataset", "lr"} and args.out_dir.endswith("mnist")
    told = commands.describe_settings(args)
    assert "lr 0.5*" in told and "noise_std" in told
    mine = parse("train_jem", ["--dataset", "folder", "--preset", "cifar10"])
    assert mine.flip_prob == 0.5 and mine.out_dir.endswith("folder")
    assert "preset cifar10" in commands.describe_settings(mine)
    wide = parse("train_jem", ["--arch", "wide-resnet"])
    assert (wide.width, wide.depth, wide.stem_stride) == tuple(SHAPES["wide-resnet"].values())
