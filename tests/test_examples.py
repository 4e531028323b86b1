"""The examples in the docstrings of what others may want to take along run and give what they say."""

import doctest

import pytest

import attacks
import metrics
import models
import restarts
import sgld
import train_jem

OBJECTS = [
    *(sgld.run_chains, restarts.GaussianRestart, models.energy, models.joint_energy, models.mixture_energy, models.path_energy),
    *(train_jem.ReplayBuffer, train_jem.energy_loss, train_jem.energy_regulariser, attacks.pgd),
    *(metrics.calibration, metrics.detection, metrics.frechet_distance),
]


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: thing.__qualname__)
def test_an_example_gives_what_it_says(thing, capsys):
    finder = doctest.DocTestFinder(recurse=False)
    [example] = finder.find(thing, thing.__name__, globs=vars(__import__(thing.__module__)).copy())
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, capsys.readouterr().out
