"""The detector: p-values and label sets keep their promise, and what is kept is enough for it."""

import csv
import importlib
import io
import math

import pytest
import torch
from conftest import ROOT, generator

from sgld_nrg import Detector
from sgld_nrg.models import build_model, load_model, predict
from sgld_nrg.support import detector as module
from sgld_nrg.support.checkpoints import load_checkpoint, save_checkpoint
from sgld_nrg.support.detector import Mixture, Ranks, detector_for, pattern_entropy, rounded
from sgld_nrg.support.errors import UserError


@pytest.fixture(scope="module")
def trained(tiny_run):
    """The network of the tiny run."""
    return load_model(load_checkpoint(tiny_run / "jem.pt", "jem"))


@pytest.fixture(scope="module")
def detector(trained, digits):
    """The detector of the tiny run."""
    return detector_for(trained, digits)


def noise(count, seed=0):
    return torch.rand(count, 1, 8, 8, generator=generator(seed)) * 2 - 1


def untrained(num_classes=10):
    torch.manual_seed(0)
    return build_model("small-cnn", num_classes, 1, 8, width=4, depth=1)


class Restless(torch.nn.Module):
    """A network whose answer turns with the faintest change of its input."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1e4, 2e4, 3e4]))

    def forward(self, x):
        return (x.flatten(1).sum(1, keepdim=True) * self.scale).sin()


@pytest.mark.parametrize("kept", [1000, 20])
def test_p_values_of_exchangeable_scores_are_super_uniform(kept, monkeypatch):
    monkeypatch.setattr(module, "MOST_KEPT", kept)
    count, draws = 99, 2000
    scores = torch.randn(draws, count + 1, generator=generator())
    p = torch.stack([Ranks.of(row[1:]).p_values(row[:1])[0] for row in scores])
    for alpha in (0.01, 0.05, 0.1, 0.5):
        below = (p <= alpha).double().mean().item()
        exact = math.floor(alpha * 100) / 100  # uniform on 1/100, ..., 1, if every score is kept
        spread = math.sqrt(alpha * (1 - alpha) / draws)
        assert below <= alpha + 4 * spread
        if kept == 1000:
            assert abs(below - exact) <= 4 * spread


def test_a_p_value_counts_the_held_out_scores_that_are_as_high_ties_among_them():
    ranks = Ranks.of(torch.tensor([3.0, 1.0, 2.0, 2.0]))
    p = ranks.p_values(torch.tensor([[0.0, 1.0, 1.5], [2.0, 2.5, 4.0]]))
    assert p.tolist() == [[1.0, 1.0, 0.8], [0.8, 0.4, 0.2]]
    assert ranks.smallest == 0.2
    assert Ranks.of(torch.ones(9)).p_values(torch.ones(1)).item() == 1


def test_scores_that_were_left_out_only_round_a_p_value_up(monkeypatch):
    scores = torch.randn(257, generator=generator())
    new = torch.randn(500, generator=generator(1)) * 2
    exact = Ranks.of(scores).p_values(new)
    monkeypatch.setattr(module, "MOST_KEPT", 60)
    few = Ranks.of(scores)
    assert len(few.kept) <= 60 and few.every == 5
    rounded_up = torch.ceil((exact * 258).round() / 5) * 5 / 258
    assert torch.allclose(few.p_values(new), rounded_up.clamp(max=1))
    assert few.p_values(torch.tensor([1e9])).item() == few.smallest == 5 / 258


def test_scores_that_are_not_finite_or_beyond_half_precision_are_the_strangest():
    ranks = Ranks.of(torch.arange(9.0))
    assert ranks.p_values(torch.tensor([math.inf, 1e30])).tolist() == [0.1, 0.1]
    mixture = Mixture.fit(torch.randn(50, 3).double(), torch.zeros(50).long(), 2)
    values = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0], [1e300, 0, 0]]).double()
    assert mixture.strangeness(values).tolist() == [math.inf] * 3


def test_from_no_held_out_image_no_p_value_is_below_one():
    nothing = Ranks.of(torch.empty(0))
    assert nothing.p_values(torch.tensor([-1.0, 99.0])).tolist() == [1, 1] and nothing.smallest == 1


def test_too_few_held_out_images_call_nothing_unfamiliar():
    detector = Detector.fit(untrained(), noise(15), reference=noise(200, seed=1))
    assert detector.smallest == 1 / 16
    assert detector.p_values(torch.zeros(1, 1, 8, 8)).item() == 1 / 16


def test_of_new_images_a_share_alpha_is_called_unfamiliar_and_strange_ones_are():
    model, held_out = untrained(), noise(1000)
    found = Detector.fit(model, held_out)
    p = found.p_values(noise(2000, seed=2))
    for alpha in (0.05, 0.2):
        spread = math.sqrt(alpha * (1 - alpha) * (1 / 2000 + 1 / 500))
        assert abs((p <= alpha).double().mean().item() - alpha) < 4 * spread
    for strange in (torch.zeros(1, 1, 8, 8), -torch.ones(1, 1, 8, 8), noise(1) / 9):
        assert found.p_values(strange).item() == found.smallest


def test_digits_are_familiar_and_what_is_none_is_not(detector, digits):
    test = digits.test.images
    p = detector.p_values(test)
    spread = math.sqrt(0.1 * 0.9 * (1 / len(test) + 1 / len(digits.val.labels)))
    assert (p <= 0.1).double().mean().item() < 0.1 + 4 * spread
    strange = {
        "noise": noise(200),
        "inverted": -test,
        "black": -torch.ones(1, 1, 8, 8),
        "white": torch.ones(1, 1, 8, 8),
        "grey": torch.zeros(1, 1, 8, 8),
    }
    for name, images in strange.items():
        assert (detector.p_values(images) < 0.05).double().mean() > 0.8, name


def test_a_low_energy_is_strange_too(trained, digits):
    values, classes = module.quantities(trained, digits.train.images, 5)
    mixture = Mixture.fit(values, classes, 10)
    typical = values[:1].clone()
    deep, high = typical.clone(), typical.clone()
    deep[0, -2] -= 100
    high[0, -2] += 100
    usual = mixture.strangeness(values).quantile(0.99)
    assert mixture.strangeness(deep) > usual and mixture.strangeness(high) > usual


def test_label_sets_hold_the_true_class_as_often_as_they_promise():
    model, images = untrained(3), noise(3000)
    probabilities = (predict(model, images) * 20).softmax(1)
    labels = probabilities.multinomial(1, generator=generator(3))[:, 0]
    found = Detector.fit(model, images[:500], labels[:500], noise(100, seed=5))
    new, truth = found.verdicts(images[500:]), labels[500:, None]
    sizes = []
    for alpha in (0.05, 0.2, 0.5):
        inside = found.label_sets(new, alpha)
        spread = math.sqrt(alpha * (1 - alpha) * (1 / 2500 + 1 / 500))
        assert inside.gather(1, truth).double().mean().item() >= 1 - alpha - 4 * spread
        assert inside.any(1).all()
        assert inside.gather(1, new.probabilities.argmax(1)[:, None]).all()
        sizes.append(inside.sum(1).double().mean().item())
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
    with pytest.raises(ValueError, match="alpha"):
        found.label_sets(new, 1.0)


def test_without_labels_no_class_is_ruled_out_and_the_probabilities_are_the_networks():
    model, images = untrained(), noise(50)
    found = Detector.fit(model, images)
    said = found.verdicts(images)
    assert found.label_sets(said, 0.5).all()
    assert torch.allclose(said.probabilities, predict(model, images).double().softmax(1))


def test_probabilities_are_calibrated_by_a_temperature_unless_the_images_cannot_tell():
    model, images = untrained(3), noise(2000)
    for parameter in model.parameters():
        parameter.data *= 4  # else the logits say next to nothing of labels drawn from them
    logits = predict(model, images)
    labels = (logits / 0.5).softmax(1).multinomial(1, generator=generator())[:, 0]
    assert Detector.fit(model, images, labels, images[:99]).temperature == pytest.approx(0.5, 0.2)
    assert Detector.fit(model, images, logits.argmax(1), images[:99]).temperature == 1


def test_the_temperature_changes_neither_p_values_nor_label_sets(detector, digits):
    before = detector.verdicts(digits.test.images)
    state = {**detector.state_dict(), "temperature": 3.0}
    after = Detector.from_state(detector.model, state).verdicts(digits.test.images)
    assert torch.equal(before.p_values, after.p_values)
    assert torch.equal(before.label_p_values, after.label_p_values)
    assert not torch.equal(before.probabilities, after.probabilities)


def test_a_detector_outlives_its_checkpoint_in_some_kilobytes(detector, digits, tmp_path, tiny_run):
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    assert len(file.getvalue()) < 16_000
    state = load_checkpoint(tiny_run / "jem.pt", "jem")
    state.pop("detector", None)
    kind, _ = state.pop("kind"), state.pop("format")
    save_checkpoint(tmp_path / "jem.pt", kind, **state, detector=detector.state_dict())
    again = load_checkpoint(tmp_path / "jem.pt", "jem")
    found = Detector.from_state(load_model(again), again["detector"]).verdicts(digits.test.images)
    for mine, its in zip(detector.verdicts(digits.test.images), found, strict=True):
        assert torch.equal(mine, its)
    del again["detector"]["mixture"]["means"]
    with pytest.raises(UserError, match="not whole"):
        Detector.from_state(detector.model, again["detector"])


def test_many_held_out_images_keep_few_scores():
    found = Detector.fit(untrained(), noise(5000), torch.zeros(5000).long(), noise(100, seed=1))
    file = io.BytesIO()
    torch.save(found.state_dict(), file)
    assert len(file.getvalue()) < 16_000
    assert found.smallest < 0.001  # so that --alpha 0.001 still calls something unfamiliar


def test_a_detector_is_the_same_when_it_is_fitted_again_and_whatever_the_batch(detector, digits):
    torch.manual_seed(99)
    again = detector_for(detector.model, digits)
    whole = detector.p_values(digits.test.images)
    assert torch.equal(again.p_values(digits.test.images), whole)
    parts = torch.cat([detector.scores(part) for part in digits.test.images.split(7)])
    assert torch.allclose(parts, detector.scores(digits.test.images), atol=1e-3)


def test_nothing_that_calibrates_was_fitted(monkeypatch, trained, digits):
    fitted = []
    fit = Mixture.fit.__func__
    monkeypatch.setattr(
        Mixture, "fit", classmethod(lambda cls, *a: fitted.append(len(a[0])) or fit(cls, *a))
    )
    detector_for(trained, digits)
    Detector.fit(trained, digits.val.images)
    assert fitted == [len(digits.train.labels), 90]
    assert detector_for(trained, digits).familiar.count == 180
    assert Detector.fit(trained, digits.val.images).familiar.count == 90


def test_more_classes_than_can_each_have_a_logit_are_judged_by_the_two_largest():
    found = Detector.fit(untrained(100), noise(400))
    assert found.mixture.state["means"].shape == (100, 4)
    assert found.p_values(torch.zeros(1, 1, 8, 8)).item() == found.smallest


def test_a_class_that_no_familiar_image_has_and_a_quantity_that_never_varies_do_no_harm():
    values = torch.randn(60, 3, generator=generator()).double()
    values[:, 2] = 7
    mixture = Mixture.fit(values, torch.arange(60) % 2, 4)
    assert torch.isfinite(mixture.strangeness(values)).all()
    with pytest.raises(FloatingPointError):
        Mixture.fit(values / 0, torch.arange(60) % 2, 4)


def test_the_mixture_is_the_density_that_it_says():
    values = torch.randn(3000, 2, generator=generator()) @ torch.tensor([[2, 1], [0, 1.0]])
    values = values.double() + 5
    found = Mixture.fit(values, torch.zeros(3000).long(), 1).strangeness(values)
    scaled = (values - values.mean(0)) / values.std(0, correction=0)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), scaled.t().cov())
    assert torch.allclose(found, -normal.log_prob(scaled), atol=0.05)


def test_faint_noise_is_rounded_away_and_levels_follow_what_the_network_reads(trained, digits):
    images = digits.test.images
    faint = images + 0.1 * (torch.rand(images.shape, generator=generator()) - 0.5)
    coarse = rounded(images, 9)  # multiples of 0.25
    assert (rounded(faint, 9) == coarse).double().mean() > 0.8
    assert torch.equal(rounded(coarse, 9), coarse) and torch.equal(rounded(images, 0), images)
    assert module._fewest_levels(trained, images) in module.LEVELS
    assert module._fewest_levels(Restless(), noise(100)) == 0


@pytest.mark.parametrize("grey, fewest", [(0.5, 5), (0.15, 9), (0.12, 17)])
def test_the_levels_are_the_fewest_at_which_99_percent_keep_their_class(grey, fewest):
    class Bright(torch.nn.Linear):
        """Class 1 above a grey of 0.1."""

        def forward(self, x):
            return super().forward(x.flatten(1)[:, :1])

    model = Bright(1, 2)
    model.weight.data, model.bias.data = torch.tensor([[-1.0], [1.0]]), torch.tensor([0.1, -0.1])
    images = torch.full((100, 1, 2, 2), 0.5)
    images[:2] = grey
    assert module._fewest_levels(model, images) == fewest
    images[1] = 0.5  # one of a hundred may change
    assert module._fewest_levels(model, images) == 5


def test_the_pattern_entropy_tells_the_simple_from_the_complex():
    flat, halves = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    halves[..., :4] = -1
    random = noise(1)
    found = pattern_entropy(torch.cat([flat, halves, random]))
    assert found[0] == 0 and 0 < found[1] < found[2] < math.log(5) + 0.2
    colour = torch.cat([flat, halves, random], dim=1)
    assert pattern_entropy(colour).item() == pytest.approx(found.mean().item())
    assert pattern_entropy(torch.ones(2, 3, 1, 1)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "images, labels, says",
    [
        (noise(1), None, "too few"),
        (noise(4), torch.zeros(3).long(), "4 images and 3 labels"),
        (noise(4)[0], None, "too few"),
        (noise(4) * math.nan, None, "finite"),
    ],
)
def test_wrong_arguments_are_named(images, labels, says):
    with pytest.raises(ValueError, match=says):
        Detector.fit(untrained(), images, labels)
    with pytest.raises(ValueError, match="finite"):
        Detector.fit(untrained(), noise(20)).p_values(torch.full((1, 1, 8, 8), math.nan))


def test_the_example_of_the_docstring_gives_what_it_says():
    import doctest

    failed = [
        doctest.DocTestRunner(verbose=False).run(example).failed
        for thing in (module.Detector, module.Ranks.p_values, module.rounded)
        for example in doctest.DocTestFinder(recurse=False).find(thing, globs=vars(module).copy())
    ]
    assert failed == [0, 0, 0]


def test_the_ablation_writes_a_row_for_each_model_choice_and_set(tiny_run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    ablation = importlib.import_module("detector_ablation")
    table = tmp_path / "new" / "table.csv"
    files = [f"jem={tiny_run / 'jem.pt'}", f"plain={tiny_run / 'classifier.pt'}"]
    words = ["--checkpoint", *files, "--count", "20", "--out", str(table)]
    ablation.main(ablation.parse(words))
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"jem", "plain"}
    judged = {row["judged"].removesuffix(", not rounded") for row in rows}
    alone = {"logits", "energy", "entropy"}
    assert judged == {"energy by its sign", "all", *alone, *(f"without {name}" for name in alone)}
    assert {row["set"] for row in rows} == {*ablation.STRANGE, *ablation.ORDINARY}
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("auroc", "unfamiliar"))
    with pytest.raises(SystemExit):
        ablation.main(ablation.parse(["--checkpoint", "jem.pt"]))
