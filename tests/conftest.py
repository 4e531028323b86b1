"""Fixtures: the digits, one tiny trained run that many tests look at, and where larger data may lie."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
if SHARED.is_dir():
    os.environ.setdefault("SGLD_NRG_DATA", str(SHARED))

TINY = ["--dataset", "digits", "--width", "8", "--epochs", "4", "--buffer-size", "200", "--warmup-steps", "20"]


@pytest.fixture(scope="session")
def digits():
    """The digits data set."""
    import data

    return data.load("digits", "unused")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """The folder of a JEM that trained for some seconds on the digits, classifier first. Not to be written to."""
    import train_jem

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train_jem.main([*TINY, "--pretrain-epochs", "20", "--out-dir", str(folder)])
    return folder


@pytest.fixture
def checkpoint(tiny_run):
    """The checkpoint of the tiny run."""
    import runs

    return runs.load_checkpoint(tiny_run / "jem.pt", "jem")


@pytest.fixture
def interrupt(monkeypatch):
    """A function that makes the next training stop, as Ctrl-C would, right after its second checkpoint."""
    import runs

    def arm():
        write, calls = runs.save_checkpoint, []

        def stop_after_two(*args, **state):
            write(*args, **state)
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        monkeypatch.setattr(runs, "save_checkpoint", stop_after_two)

    return arm
