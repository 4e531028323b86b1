"""What other projects get from `pip install .`."""

import subprocess
import sys
import tomllib

import pytest
from conftest import ROOT


def test_every_module_at_the_top_level_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(listed) == sorted(path.stem for path in ROOT.glob("*.py"))


def test_sgld_is_importable_from_another_folder_after_an_installation(tmp_path):
    pytest.importorskip("setuptools", reason="pip builds with it here, so that the test needs no network")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*install, str(ROOT)], check=True, cwd=tmp_path)
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import sgld; print(sgld.__file__)"
    found = subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert found.startswith(str(tmp_path / "site"))
