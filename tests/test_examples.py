"""The examples in the docstrings of what others may want to take along give what they say."""

import doctest
import sys

import pytest

from sgld_nrg import models, sgld, train_jem
from sgld_nrg.support import attacks, metrics, restarts, sample_metrics

OBJECTS = [
    sgld.run_chains,
    restarts.GaussianRestart,
    models.marginal_energy,
    models.joint_energy,
    models.mixture_energy,
    models.path_energy,
    train_jem.ReplayBuffer,
    train_jem.energy_loss,
    train_jem.energy_regulariser,
    attacks.apgd,
    metrics.calibration,
    metrics.detection,
    sample_metrics.frechet_distance,
]


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: thing.__qualname__)
def test_an_example_gives_what_it_says(thing, capsys):
    finder = doctest.DocTestFinder(recurse=False)
    names = vars(sys.modules[thing.__module__]).copy()
    [example] = finder.find(thing, thing.__name__, globs=names)
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, capsys.readouterr().out
