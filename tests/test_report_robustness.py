"""The report's section on attacks: who survives, what the checks find, what the words say."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from conftest import generator
from torch import nn

from sgld_nrg.models import load_model
from sgld_nrg.support import plots
from sgld_nrg.support.attacks import strongest
from sgld_nrg.support.report import robustness
from sgld_nrg.support.report.study import DRY_RUN, FULL, QUICK, Study

CPU = torch.device("cpu")
COUNTS = {"attack_steps": 5, "random_starts": 1, "targets": 1}
SIZES = {**COUNTS, "square_images": 30, "square_queries": 100, "stronger_images": 20}


class Line(nn.Module):
    """Two classes by the sum of the pixels, class 1 above 0. Masked: without a gradient."""

    def __init__(self, masked=False):
        super().__init__()
        self.masked = masked

    def forward(self, x):
        score = x.flatten(1).sum(1)
        if self.masked:
            score = (score * 1e4).round() / 1e4
        return torch.stack([-score, score], 1)


def line_images(margins):
    """Return images (N, 1, 8, 8) and labels, with eps = 0.01 of linf breaking a margin to 1.28."""
    pattern = torch.tensor([0.1, -0.1]).repeat(8, 4)  # pixels below 0, as images have
    return torch.tensor(margins).view(-1, 1, 1, 1) / 64 + pattern, torch.ones(
        len(margins), dtype=torch.int64
    )


def stub(broken, seen):
    """Return an attack that breaks images by their number, listed for each epsilon."""

    def survives(images, labels, *, epsilon):
        seen.append((epsilon, images.tolist()))
        return torch.tensor([number not in broken.get(epsilon, ()) for number in images.tolist()])

    return survives


def test_an_image_counts_only_if_it_survives_every_attack_here_and_at_smaller_radii():
    seen = []
    attacks = {
        "first": stub({0.0: [0], 0.1: [1], 0.2: [2]}, seen),
        "second": stub({0.0: [5], 0.1: [3]}, seen),
    }
    images, labels = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    rows, standing = robustness.curve(attacks, images, labels, (0.1, 0.2))
    assert [row["epsilon"] for row in rows] == [0, 0.1, 0.2]
    assert [6 * row["accuracy"] for row in rows] == pytest.approx([5, 3, 2])
    assert standing.tolist() == [False, False, True, False, True, True]
    assert rows[1]["after"] == pytest.approx({"first": 4 / 6, "second": 3 / 6})
    assert seen == [
        (0, [0, 1, 2, 3, 4, 5]),  # without attack the first alone judges
        (0.1, [1, 2, 3, 4, 5]),
        (0.1, [2, 3, 4, 5]),  # what the first broke is not attacked again
        (0.2, [2, 4, 5]),
        (0.2, [4, 5]),
    ]


def test_nothing_is_attacked_once_all_is_broken():
    seen = []
    attacks = {"first": stub({0.1: [0, 1]}, seen)}
    rows, _ = robustness.curve(attacks, torch.arange(2), torch.zeros(2).long(), (0.1, 0.2))
    assert [row["accuracy"] for row in rows] == [1, 0, 0] and len(seen) == 2
    assert rows[2]["interval"] == [0, 0]


def test_the_accuracy_is_that_of_the_images_with_their_own_labels_in_every_batch(monkeypatch):
    monkeypatch.setattr(robustness, "ATTACK_BATCH", 3)
    x, labels = line_images([3.0, -3.0, 1.0, -1.0, 3.0, -1.0, -3.0, 3.0])
    labels = torch.tensor([1, 0, 1, 0, 0, 0, 0, 1])  # the fifth is wrong without attack
    given = {"norm": "linf", "seed": 0, **COUNTS}
    survivors = robustness.survivors(Line(), Line(), x, labels, epsilon=0.01, **given)
    assert survivors.tolist() == [True, True, False, False, False, False, True, True]
    row = robustness.attack(Line(), Line(), x, labels, "linf", 0.01, seed=0, attack_steps=5)
    assert row["accuracy"] == 0.5 and row["images"] == 8 and row["attack_steps"] == 5
    assert row["interval"][0] < 0.5 < row["interval"][1]
    clean = robustness.attack(Line(), Line(), x, labels, "l2", 0.0, seed=0, attack_steps=5)
    assert clean["accuracy"] == 7 / 8


def checked(model, margins, standing=None, epsilon=0.01):
    """Return what the check finds, and its words, for images of these margins."""
    x, labels = line_images(margins)
    given = {"norm": "linf", "seed": 0}
    if standing is None:
        standing = robustness.survivors(model, model, x, labels, epsilon=epsilon, **given, **COUNTS)
    check = robustness.check_attack(model, x, labels, standing, epsilon, SIZES, **given)
    check["accuracy_at_largest"] = 0.0
    return check, robustness._about_the_attack(check)


def test_an_attack_that_works_is_said_to_work():
    check, words = checked(Line(), [0.5, 3.0] * 20)
    assert check["square"]["white_box"] == 0.5 <= check["square"]["square"]
    assert check["stronger"] == {
        "random_starts": 3,
        "targets": 3,
        "attack_steps": 10,
        "images": 20,
        "broken": 0,
        "lowers_by": 0.0,
    }
    assert "So it works" in words and "**" not in words


def test_masked_gradients_are_told():
    check, words = checked(Line(masked=True), [0.5, 3.0] * 20)
    assert check["square"]["square"] < check["square"]["white_box"]
    assert "**an attack without gradients does better: they are masked**" in words
    assert "**the numbers above are too high by more than two points**" in words


def test_an_attack_that_leaves_what_a_stronger_one_breaks_is_told():
    margins = [0.5] * 2 + [3.0] * 38
    standing = torch.ones(40, dtype=torch.bool)  # as if the report's attack had missed two
    check, words = checked(Line(), margins, standing)
    assert check["stronger"]["broken"] == 2
    assert check["stronger"]["lowers_by"] == pytest.approx(0.1)  # of 20 images
    assert "**the numbers above are too high by more than two points**" in words


def test_one_image_that_a_stronger_attack_breaks_is_too_few_to_tell():
    margins = [3.0] * 35 + [0.5] + [3.0] * 4  # beyond those that Square attacks
    check, words = checked(Line(), margins, torch.arange(40) >= 25)
    assert check["stronger"]["broken"] == 1 and check["stronger"]["lowers_by"] > 0.02
    assert "**" not in words


def test_an_attack_that_never_reaches_zero_is_told():
    check, _ = checked(Line(), [3.0] * 30)
    assert "**" not in robustness._about_the_attack(check | {"accuracy_at_largest": 0.049})
    words = robustness._about_the_attack(check | {"accuracy_at_largest": 0.05})
    assert "**the attack does not work: do not trust the numbers above**" in words


def test_a_check_of_a_model_that_nothing_survives_finds_nothing_lower():
    check, words = checked(Line(), [0.5] * 30)
    assert check["stronger"]["images"] == 0 and check["stronger"]["lowers_by"] == 0
    assert "**" not in words


@pytest.fixture
def study(checkpoint, digits, tmp_path, monkeypatch):
    """A study of the tiny run's JEM beside two networks, that draws no figures."""
    monkeypatch.setattr(plots, "finish", lambda figure, path: None)
    models = {name: load_model(checkpoint).eval() for name in ("classifier", "control", "jem")}
    args = Namespace(seed=0, attacks=["linf", "l2"])
    nothing = ({}, {}, [])
    return Study(args, DRY_RUN, CPU, digits, checkpoint, models, nn.Identity(), nothing, tmp_path)


def test_the_columns_are_the_models_in_their_order_and_the_jem_behind_its_steps(study):
    found = robustness.measure(study)
    columns = ["classifier", "control", "jem", "jem-3"]
    radii = DRY_RUN["epsilons"]["grey"]
    for norm in ("linf", "l2"):
        curves = found["curves"][norm]
        assert list(curves) == columns
        assert all(
            [row["epsilon"] for row in curves[name]] == [0, *radii[norm]] for name in columns[:3]
        )
        assert [row["epsilon"] for row in curves["jem-3"]] == [0, radii[norm][0]]
        assert list(curves["jem-3"][1]["after"]) == ["around", "straight", "steps"]
        # the three are one network here, attacked alike
        assert curves["classifier"] == curves["control"] == curves["jem"]
        assert found["checks"][norm]["accuracy_at_largest"] == curves["jem"][-1]["accuracy"]
    text = robustness.words(found, DRY_RUN)
    assert "| ε | classifier | control | jem | jem-3 |" in text
    assert "jem-3, one attack after the other: at ε = 0.1 around" in text


def test_the_accuracy_without_attack_is_that_of_the_test_images(study):
    study.sizes = {**DRY_RUN, "attacked": 60}
    study.args.attacks = ["linf"]
    x, labels = (part[:60] for part in study.dataset.test)
    with torch.no_grad():
        right = (study.models["jem"](x).argmax(1) == labels).double().mean()
    [curve] = [curves["jem"] for curves in robustness.measure(study)["curves"].values()]
    assert curve[0]["accuracy"] == pytest.approx(float(right)) and right > 0.7
    assert curve[0]["images"] == 60


def test_a_jem_alone_and_colour_images_have_their_own_radii(study, monkeypatch):
    study.models = {"jem": study.models["jem"]}
    colours, networks = [], []

    def curve(attacks, images, labels, epsilons):
        colours.append((list(attacks), epsilons))
        networks.extend(survives.args[0] for survives in attacks.values())
        return [robustness.point(0.0, labels > 0) | {"after": {}}], labels > 0

    monkeypatch.setattr(robustness, "curve", curve)
    monkeypatch.setattr(robustness, "check_attack", lambda *_, **__: {})
    monkeypatch.setattr(robustness, "refined", lambda *given, through: (through, *given[1:3]))
    images = study.dataset.test.images[:8].expand(-1, 3, -1, -1)
    study.dataset = SimpleNamespace(test=(images, study.dataset.test.labels[:8]))
    study.args.attacks = ["l2"]
    found = robustness.measure(study)
    radii = DRY_RUN["epsilons"]["colour"]["l2"]
    assert colours == [(["APGD"], radii), (["around", "straight", "steps"], radii[:1])]
    assert list(found["curves"]["l2"]) == ["jem", "jem-3"]
    jem = study.models["jem"]  # each attack behind the steps has the gradient of its name
    assert networks == [jem, *((through, jem, 3) for through in ("around", "straight", "steps"))]


def test_no_attacks_are_said_to_be_none(study):
    study.args.attacks = ["none"]
    found = robustness.measure(study)
    assert found == {"curves": {}, "checks": {}}
    assert "Not measured (`--attacks none`)" in robustness.words(found, DRY_RUN)


@pytest.mark.parametrize("sizes", [FULL, QUICK, DRY_RUN])
def test_the_radii_rise_from_that_of_the_papers(sizes):
    assert {colour: radii["linf"][0] for colour, radii in sizes["epsilons"].items()} == {
        "grey": 0.1,
        "colour": 8 / 255,
    }
    assert {colour: radii["l2"][0] for colour, radii in sizes["epsilons"].items()} == {
        "grey": 1.5,
        "colour": 0.5,
    }
    for radii in sizes["epsilons"].values():
        assert all(list(of_norm) == sorted(of_norm) for of_norm in radii.values())


def test_the_network_comes_out_in_the_mode_it_went_in_with(study):
    jem = study.models["jem"].train()
    x, labels = (part[:4] for part in study.dataset.test)
    robustness.survivors(jem, jem, x, labels, norm="l2", epsilon=1.5, seed=0, **COUNTS)
    assert jem.training and all(weight.requires_grad for weight in jem.parameters())
    again = strongest(jem, x, labels, "l2", 1.5, generator=generator(), **COUNTS).correct
    assert torch.equal(
        robustness.survivors(jem, jem, x, labels, norm="l2", epsilon=1.5, seed=0, **COUNTS), again
    )
