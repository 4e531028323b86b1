"""Every command of the documents parses, quick ones run; the README's Python runs; pictures."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from sgld_nrg.support import commands

DOCUMENTS = ("README.md", "results/README.md", "results/trials.md")
TEXT = "".join((ROOT / name).read_text() for name in DOCUMENTS)
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
# flags that leave a command of the same kind
NEUTRAL = {"--checkpoint", "--dataset", "--dry-run", "--num", "--out-dir", "--seed"}
NEUTRAL |= {"--epochs", "--noise-std", "--p-x-weight", "--step-size", "--width"}


def commands_of(blocks):
    """Return the commands of blocks of shell, without torchrun."""
    found = set()
    for block in blocks:
        for part in re.split(r"\n|&&", block.strip()):
            found.add(re.sub(r"^torchrun .*?(?=\w+\.py)", "python ", part.strip()))
    return sorted(found)


COMMANDS = commands_of(BLOCKS)
# the walkthrough has no flags
SCRIPTS = [c for c in COMMANDS if c.startswith("python ") and "walkthrough" not in c]


def runner(command):
    """Return a command's parser, main and flags: parser(flags) are the arguments of main."""
    script, *flags = shlex.split(command)[1:]
    name = Path(script).stem
    if name in commands.SCRIPTS and script == f"{name}.py":
        main = importlib.import_module(f"sgld_nrg.{name}").main
        return lambda flags: commands.parse(name, flags), main, flags
    folder = str((ROOT / script).parent)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(name)
    finally:
        sys.path.remove(folder)
    return module.parse, module.main, flags


def one_of_each_kind(found):
    """Return the first command of each script and set of flags, but for the neutral ones."""
    kinds = {}
    for command in found:
        script, *words = shlex.split(command)[1:]
        flags = frozenset(word for word in words if word.startswith("--")) - NEUTRAL
        kinds.setdefault((script, flags), command)
    return list(kinds.values())


ELSEWHERE = re.compile("mnist|my-images|/.*py")  # not on the digits
ON_DIGITS = one_of_each_kind([command for command in SCRIPTS if not ELSEWHERE.search(command)])


def test_the_readme_has_the_two_commands_at_its_top():
    assert BLOCKS[0].strip() == "pip install -r requirements.txt && python train_jem.py"
    assert BLOCKS[1].strip() == "pip install -r requirements.txt && pytest"


def test_every_other_command_is_one_that_these_tests_know():
    known = ("python ", "pip install", "pytest", "cp results/")
    assert len(SCRIPTS) > 8 and all(command.startswith(known) for command in COMMANDS)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_of_the_readme_parses(command):
    parse, _, flags = runner(command)
    args = parse(flags)
    assert vars(args)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=[pytest.mark.slow] * ("evaluate.py" in command))
        for command in ON_DIGITS
    ],
)
def test_a_command_on_the_digits_runs(command, tiny_run, tmp_path, capsys):
    parse, main, flags = runner(command)
    if hasattr(parse(flags), "checkpoint"):
        flags += ["--checkpoint", str(tiny_run / "jem.pt")]
    if "--dry-run" not in flags:
        flags.append("--dry-run")
    main(parse([*flags, "--out-dir", str(tmp_path / "nothing")]))
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "nothing").exists()


def test_the_python_of_the_readme_samples_both_wells(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope = {}
    exec(code, scope)
    end = scope["end"]
    assert capsys.readouterr().out.startswith("tensor(")
    assert 0.4 < (end[:, 0] > 0).float().mean() < 0.6
    assert abs(end[:, 1].var() - 1) < 5 * (2 / len(end)) ** 0.5 + 0.05


def test_every_picture_that_is_shown_exists_and_every_picture_is_shown():
    shown = set()
    for path in (ROOT / "README.md", *(ROOT / "results").glob("*.md")):
        names = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", path.read_text())
        shown |= {(path.parent / name).resolve() for name in names}
    kept = {path for kind in ("png", "gif") for path in (ROOT / "results").glob(f"*.{kind}")}
    assert shown == kept


@pytest.mark.parametrize(
    ("name", "most"), [("README.md", 1300), ("results/README.md", 2500), ("results/trials.md", 500)]
)
def test_a_document_is_short(name, most):
    assert len(re.sub("<!--.*?-->", "", (ROOT / name).read_text()).split()) <= most


def test_a_link_to_a_heading_leads_to_one():
    headings = re.findall(r"^#+ (.*)$", (ROOT / "results/README.md").read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}
    linked = re.findall(r"\(results/README\.md#([^)]*)\)", (ROOT / "README.md").read_text())
    assert linked and set(linked) <= anchors
