"""What `pip install` puts where, what a clone does without it, and which module imports which."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import sgld_nrg

TOP_FLOOR = {"sgld", "models", "train_classifier", "train_jem", "sample", "evaluate", "predict"}
SCRIPTS = TOP_FLOOR - {"sgld", "models"}
FOLDERS = ("support", "support/report")  # of modules, besides the root
# What a user does: imports names, then runs python -m sgld_nrg.sample, here in the same process.
USER = """
import runpy
from sgld_nrg import GaussianRestart, Langevin, ReplayBuffer, apgd, energy_loss, run_chains
print(run_chains.__code__.co_filename)
runpy.run_module("sgld_nrg.sample", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the files that git tracks."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        names = subprocess.run(listed, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git, or no clone")
    folder = tmp_path_factory.mktemp("clone") / "checkout"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def site(clone, tmp_path_factory):
    """A folder into which the package was installed from a copy of the clone."""
    pytest.importorskip("setuptools", reason="pip builds with it here, which needs no network")
    site = tmp_path_factory.mktemp("installed") / "site"
    source = shutil.copytree(clone, site.with_name("source"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    install += ["--no-index", "--disable-pip-version-check", "--target", str(site), str(source)]
    subprocess.run(install, check=True, cwd=site.parent)
    return site


def run_in(folder, *words, site=None, code=0):
    """Run Python in a folder; it imports from there, then from the site. Returns its output."""
    environment = {**os.environ, "PYTHONPATH": str(site)} if site else None
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def modules():
    """Return {name: path} of the package's modules, without its __init__.py."""
    found = {}
    for folder in ("", *FOLDERS):
        for path in sorted((ROOT / folder).glob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts != ("__init__",):
                found[".".join(("sgld_nrg", *parts)).removesuffix(".__init__")] = path
    return found


def imported(path, known):
    """Return the modules that a file imports anywhere: of the package's, the innermost known."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import in {path}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


def test_an_installation_adds_one_package_and_its_description(site):
    description = f"sgld_nrg-{_project()['version']}.dist-info"
    assert {path.name for path in site.iterdir()} == {"sgld_nrg", description}


def test_the_package_holds_every_module_the_shipped_model_its_judges_and_nothing_else(site):
    package = site / "sgld_nrg"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    wanted = {path.relative_to(ROOT).as_posix() for path in modules().values()} | {"__init__.py"}
    judges = (ROOT / "results" / "judges").glob("*.pt")
    wanted |= {"results/mnist.pt", "py.typed", *(f"results/judges/{p.name}" for p in judges)}
    assert {name for name in files if "__pycache__" not in name} == wanted


def test_users_need_not_install_what_tests_need(site):
    [metadata] = site.glob("*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    assert sorted(needed) == sorted(_project()["dependencies"])
    assert not [name for name in needed if "pytest" in name]
    to_develop = (ROOT / "requirements.txt").read_text().split()
    assert {*needed, "-e", "."} < set(to_develop) and any("pytest" in word for word in to_develop)


def test_no_name_of_the_project_stands_in_the_way_of_the_users_own(site, tmp_path):
    for name in ("data", "models", "metrics", "sgld", "cli/__init__", "support/__init__"):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise ImportError('this is the user\\'s own module')")
    flags = ["--num", 4, "--steps", 2, "--out-dir", "drawn", "--save-array", "drawn.npz"]
    found = run_in(tmp_path, "-c", USER, *flags, site=site)
    assert Path(found.splitlines()[0]) == site / "sgld_nrg" / "sgld.py"
    assert (tmp_path / "drawn" / "samples-fresh.png").read_bytes().startswith(b"\x89PNG")
    assert np.load(tmp_path / "drawn.npz")["images"].shape == (4, 1, 28, 28)  # of the shipped model


@pytest.mark.parametrize("script", sorted(SCRIPTS))
def test_a_script_of_a_clone_that_is_not_installed_says_what_to_do(script, clone):
    told = run_in(clone, "-I", "-S", f"{script}.py", code=1)  # finds the standard library alone
    assert told.startswith("error: ") and told.count("\n") == 1
    assert "pip install -r requirements.txt" in told


def test_a_script_of_a_clone_beside_another_ones_package_says_what_to_do(clone, site):
    told = run_in(clone, "train_jem.py", "--dry-run", site=site, code=2)
    assert told.startswith("error: ") and told.count("\n") == 1
    assert "pip install -r requirements.txt" in told and str(clone) in told and str(site) in told


def test_every_public_name_resolves_and_is_known_to_type_checkers():
    assert all(getattr(sgld_nrg, name).__name__ == name for name in sgld_nrg.__all__)
    assert set(sgld_nrg.__all__) <= set(dir(sgld_nrg))
    tree = ast.parse((ROOT / "__init__.py").read_text())
    [guarded] = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert {name: f"sgld_nrg.{home}" for name, home in sgld_nrg._HOMES.items()} == homes
    assert sorted(homes) == sorted(sgld_nrg.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        sgld_nrg.no_such_name  # noqa: B018


def test_support_imports_of_the_top_floor_the_sampler_and_the_models_alone():
    known = modules()
    assert {name.split(".")[1] for name in known if name.count(".") == 1} == TOP_FLOOR | {"support"}
    above = {f"sgld_nrg.{name}" for name in SCRIPTS} | {"sgld_nrg"}
    for name, path in known.items():
        if name.startswith("sgld_nrg.support"):
            assert not imported(path, known) & above, name


def test_the_sampler_imports_torch_and_the_standard_library_alone():
    roots = {name.split(".")[0] for name in imported(ROOT / "sgld.py", modules())}
    assert roots - sys.stdlib_module_names == {"torch"}


def test_no_module_imports_one_that_imports_it():
    known = modules()
    graph = {name: imported(path, known) & known.keys() for name, path in known.items()}
    assert sum(map(len, graph.values())) > len(known)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the way round


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
