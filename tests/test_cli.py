"""Command lines: help before torch, flags alike in all scripts, presets, mistakes."""

import importlib
import runpy
import sys

import pytest

import cli

SCRIPTS = ("train_classifier", "train_jem", "sample", "evaluate")


def parser_of(name):
    return importlib.import_module(name).build_parser()


def flags_of(name):
    return {action.dest: action for action in parser_of(name)._actions if action.dest != "help"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_answers_without_torch(name, monkeypatch, capsys):
    for module in ("torch", "numpy", "matplotlib", "torchvision", "sklearn"):
        monkeypatch.setitem(sys.modules, module, None)  # an import of it now fails
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(name, run_name="__main__")
    assert caught.value.code == 0 and "--device" in capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_kebab_case_with_help_and_there_are_no_abbreviations(name, capsys):
    for action in flags_of(name).values():
        assert action.help and all(option.startswith("--") and "_" not in option for option in action.option_strings)
    with pytest.raises(SystemExit) as caught:
        cli.parse(parser_of(name), ["--see", "3"])
    assert caught.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_flags_that_scripts_share_have_one_type_default_and_help():
    seen = {}
    for name in SCRIPTS:
        for dest, action in flags_of(name).items():
            mine = (action.type, action.default, action.help, action.choices)
            if dest not in ("steps", "step_size", "noise_std"):  # sample.py's fall back on the checkpoint's
                assert seen.setdefault(dest, mine) == mine, dest


def test_every_preset_sets_the_same_flags_and_each_is_a_flag_without_another_default():
    flags = flags_of("train_jem")
    for preset in cli.PRESETS.values():
        assert preset.keys() == cli.PRESETS["digits"].keys()
        for name, value in preset.items():
            assert flags[name].default is None
            assert flags[name].type is None or flags[name].type(str(value)) == value


def test_a_preset_follows_the_data_set_and_any_flag_overrides_it():
    parse = lambda *argv: cli.parse(parser_of("train_jem"), argv)  # noqa: E731
    assert parse("--dataset", "mnist").buffer_size == cli.PRESETS["mnist"]["buffer_size"]
    args = parse("--dataset", "mnist", "--lr", "0.5")
    assert args.lr == 0.5 and args.given == {"dataset", "lr"} and args.out_dir.endswith("mnist")
    assert "lr 0.5*" in cli.describe_settings(args) and "noise_std" in cli.describe_settings(args)
    mine = parse("--dataset", "folder", "--preset", "cifar10")
    assert mine.flip_prob == 0.5 and mine.out_dir.endswith("folder") and "preset cifar10" in cli.describe_settings(mine)
    wide = parse("--arch", "wide-resnet")
    assert (wide.width, wide.depth, wide.stem_stride) == tuple(cli.WIDE_RESNET_SHAPE.values())


@pytest.mark.parametrize(
    "argv",
    [
        "--lr 0", "--lr nan", "--lr -1", "--lr much", "--epochs 0", "--epochs 1.5", "--batch-size -3", "--seed -1",
        "--reinit-prob 1.5", "--ema-decay 1",
        "--noise-std inf", "--dataset imagenet", "--restart laplace", "--resume --overwrite",
        "--classifier a.pt --from-scratch", "--p-x-weight 1 --p-xy-weight 1", "--p-x-weight 0",
        "--chain-batch-size 100 --buffer-size 50", "--from-scratch --pretrain-epochs 3", "--dry-run --resume",
        "--max-minutes 0", "stray",
    ],
)  # fmt: skip
def test_flags_that_are_wrong_or_contradict_each_other_end_in_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("train_jem").parse_args(argv.split())
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1


def test_a_mistyped_flag_gets_a_suggestion(capsys):
    for argv, near in ((["--step-sise", "1"], "--step-size"), (["--sede=3"], "--seed")):
        with pytest.raises(SystemExit):
            importlib.import_module("train_jem").parse_args(argv)
        assert f"did you mean {near}?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        importlib.import_module("train_jem").parse_args(["--zzzzzz"])
    assert "did you mean" not in capsys.readouterr().err
