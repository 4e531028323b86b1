"""The report's section on classification: which split each number is of."""

from types import SimpleNamespace

import pytest
import torch
from conftest import generator
from torch import nn

from sgld_nrg.support import metrics, plots
from sgld_nrg.support.data import Split
from sgld_nrg.support.report import classification


def test_the_temperature_is_of_the_validation_split_and_all_else_of_the_test_split(
    tmp_path, digits, monkeypatch
):
    for figure in ("save_reliability", "save_confusion"):
        monkeypatch.setattr(plots, figure, lambda *_: None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False))
    model[1].weight.data = torch.eye(3)
    source = generator()

    def split(temperature):
        """Return images that are their own logits, and labels that these are too sure of."""
        logits = 3 * torch.randn(2000, 3, generator=source)
        labels = (logits / temperature).softmax(1).multinomial(1, generator=source).squeeze(1)
        return Split(logits.view(-1, 3, 1, 1), labels)

    val, test = split(2.5), split(1.5)
    study = SimpleNamespace(
        models={"jem": model},
        dataset=digits._replace(val=val, test=test),
        sizes={"bins": 5, "resamples": 2},
        folder=tmp_path,
    )
    found = classification.measure(study)["jem"]
    logits, temperature = test.images.flatten(1), found["temperature"]
    assert temperature == pytest.approx(2.5, rel=0.1)
    assert temperature == metrics.fit_temperature(val.images.flatten(1), val.labels)
    for name, value in metrics.classification(logits, test.labels).items():
        assert found[name] == value
    assert found["calibration"] == metrics.calibration(logits, test.labels, 5)
    after = metrics.calibration(logits / temperature, test.labels, 5)
    assert found["calibration_after_temperature"] == after


@pytest.mark.parametrize("scale", [0.3, 1, 5, 30])
def test_the_quick_calibration_errors_are_those_of_the_library(scale):
    logits = scale * torch.randn(3000, 10, generator=generator())
    labels = torch.where(torch.rand(3000, generator=generator(1)) < 0.8, logits.argmax(1), 3)
    slow = metrics.calibration(logits, labels)
    confidence, predictions = logits.double().softmax(1).max(1)
    quick = metrics.calibration_errors(confidence, predictions == labels)
    assert quick == pytest.approx([slow["ece"], slow["adaptive_ece"], slow["mce"]], abs=1e-5)


def test_intervals_of_detection_are_those_of_resampled_scores():
    inside, outside = (
        torch.randn(80, generator=generator()),
        torch.randn(50, generator=generator(1)),
    )
    inside, outside = inside.round(decimals=1), outside.round(decimals=1) + 0.5  # with ties

    def again(inside, outside):
        found = metrics.detection(inside, outside)
        return [found[measure] for measure in metrics.MEASURES]

    slow = metrics.bootstrap(again, inside, outside, resamples=50, paired=False)
    quick = metrics.detection_intervals(inside, outside, resamples=50)
    for measure, interval in zip(metrics.MEASURES, slow, strict=True):
        assert quick[measure] == pytest.approx(interval)
