"""Every command of the README parses, the quick ones run, and its Python runs."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = "".join((ROOT / name).read_text() for name in ("README.md", "results/README.md", "results/trials.md"))
COMMANDS = sorted(
    {
        re.sub(r"^torchrun .*?(?=\w+\.py)", "python ", part.strip())
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
        for part in line.split("&&")
    }
)
SCRIPTS = [command for command in COMMANDS if command.startswith("python ") and "walkthrough" not in command]  # it has no flags


def parse(command):
    script, *flags = shlex.split(command)[1:]
    folder, name = str((ROOT / script).parent), Path(script).stem
    sys.path.insert(0, folder)
    module = importlib.import_module(name)
    sys.path.remove(folder)
    if hasattr(module, "parse_args"):
        return module, flags, module.parse_args(flags)
    return module, flags, importlib.import_module("cli").parse(module.build_parser(), flags)


def test_the_readme_has_the_two_commands_at_its_top():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert blocks[0].strip() == "pip install -r requirements.txt && python train_jem.py"
    assert blocks[1].strip() == "pip install -r requirements.txt && pytest"


def test_every_other_command_is_one_that_these_tests_know():
    known = ("python ", "pip install", "pytest", "cp results/", 'P="', 'Q="')
    assert len(SCRIPTS) > 8 and all(command.startswith(known) for command in COMMANDS)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_of_the_readme_parses(command):
    assert vars(parse(command)[2])


@pytest.mark.parametrize(
    "command", [command for command in SCRIPTS if not re.search("mnist|my-images|cifar10|ten-minutes|/.*py", command)]
)
def test_a_command_on_the_digits_runs(command, tiny_run, tmp_path, capsys):
    module, flags, args = parse(command)
    if hasattr(args, "checkpoint"):
        flags += ["--checkpoint", str(tiny_run / "jem.pt")]
    if "--dry-run" not in flags:
        flags.append("--dry-run")
    module.main([*flags, "--out-dir", str(tmp_path / "nothing")])
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "nothing").exists()


def test_the_python_of_the_readme_samples_both_wells(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(code, scope)
    end = scope["end"]
    assert capsys.readouterr().out.startswith("tensor(")
    assert 0.4 < (end[:, 0] > 0).float().mean() < 0.6
    assert abs(end[:, 1].var() - 1) < 5 * (2 / len(end)) ** 0.5 + 0.05
