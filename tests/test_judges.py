"""The judges of samples: found by their data or trained once, alike on every machine."""

from pathlib import Path

import pytest
import torch
from conftest import generator
from torch import nn

from sgld_nrg.models import predict
from sgld_nrg.support import judges as module
from sgld_nrg.support.checkpoints import read_state, write_whole
from sgld_nrg.support.data import Split
from sgld_nrg.support.judges import JUDGES, build_judge, judges
from sgld_nrg.support.parallel import Alone

CPU = torch.device("cpu")


@pytest.fixture
def few(digits):
    """A data set of 20 training images that no judge was trained on."""
    train = Split(*(values[:20] for values in digits.train))
    origin = {**digits.origin, "fingerprint": {"train": "20 images, 1a2b"}}
    return digits._replace(train=train, origin=origin)


@pytest.fixture
def trainings(monkeypatch):
    """The names of the judges that are trained."""
    train, names = module._train, []

    def counted(name, *rest):
        names.append(name)
        return train(name, *rest)

    monkeypatch.setattr(module, "_train", counted)
    return names


def equal(one, other):
    """Tell whether two networks have the same weights and averages."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def file_of(dataset, name):
    return f"digits-{dataset.origin['fingerprint']['train'].split()[-1]}-{name}.pt"


def test_the_digits_have_judges_of_two_families_that_can_read(digits, tmp_path, trainings):
    found = judges(digits, tmp_path / "none", CPU, Alone())
    assert tuple(found) == JUDGES == ("vgg", "convmixer") and not trainings
    assert [type(judge) for judge in found.values()] == [module.VGG, module.ConvMixer]
    assert not (tmp_path / "none").exists()
    for name, judge in found.items():
        right = predict(judge, digits.test.images).argmax(1) == digits.test.labels
        assert right.double().mean() > 0.95, name


def test_a_judge_is_trained_once_for_its_data_and_found_by_their_fingerprint(
    few, tmp_path, trainings, capsys
):
    folder = tmp_path / "made" / "judges"
    first = judges(few, folder, CPU, Alone())
    assert trainings == list(JUDGES)
    kept = {file_of(few, name): (folder / file_of(few, name)).read_bytes() for name in JUDGES}
    assert {path.name for path in folder.iterdir()} == set(kept)
    again = judges(few, folder, CPU, Alone())
    assert trainings == list(JUDGES)
    assert all(equal(first[name], again[name]) for name in JUDGES)
    other = few._replace(origin={"fingerprint": {"train": "20 images, 3c4d"}})
    judges(other, folder, CPU, Alone())
    assert trainings == 2 * list(JUDGES)
    state = read_state(folder / file_of(other, "vgg"))
    assert state["fingerprint"] == {"train": "20 images, 3c4d"} and 0 <= state["accuracy"] <= 1
    assert all((folder / name).read_bytes() == before for name, before in kept.items())
    test = {"train": few.origin["fingerprint"]["train"], "test": "others"}
    judges(few._replace(origin={"fingerprint": test}), folder, CPU, Alone())
    assert trainings == 2 * list(JUDGES)  # a judge knows the training images alone
    assert "judge vgg: validation accuracy" in capsys.readouterr().out


def test_the_folder_that_is_named_comes_before_the_projects_own(digits, tmp_path, trainings):
    own = build_judge("vgg", 10, digits.shape)
    state = {"model": own.state_dict(), "fingerprint": digits.origin["fingerprint"]}
    write_whole(tmp_path / file_of(digits, "vgg"), state)
    found = judges(digits, tmp_path, CPU, Alone())
    assert equal(found["vgg"], own) and not trainings


def test_a_damaged_judge_is_replaced(few, tmp_path, trainings):
    judges(few, tmp_path, CPU, Alone())
    whole = (tmp_path / file_of(few, "vgg")).read_bytes()
    (tmp_path / file_of(few, "vgg")).write_bytes(whole[:100])
    judges(few, tmp_path, CPU, Alone())
    assert trainings == [*JUDGES, "vgg"] and read_state(tmp_path / file_of(few, "vgg"))


def test_weights_are_kept_in_half_precision_and_judge_in_single(few, tmp_path):
    found = judges(few, tmp_path, CPU, Alone())
    for name, judge in found.items():
        kept = read_state(tmp_path / file_of(few, name))["model"]
        floats = {value.dtype for value in kept.values() if value.is_floating_point()}
        assert floats == {torch.float16}
        assert {weight.dtype for weight in judge.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_sees_each_image_by_itself(name, digits):
    judge = judges(digits, Path("nowhere"), CPU, Alone())[name]
    x = digits.test.images[:6]
    assert not any(part.training for part in judge.modules())
    with torch.no_grad():
        alone = torch.cat([judge(image[None]) for image in x])
        torch.testing.assert_close(judge(x), alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(judge.head(judge.features(x)), judge(x))


@pytest.mark.parametrize("name", JUDGES)
def test_training_repeats_whatever_was_drawn_before_and_leaves_the_draws_after(name, few, capsys):
    torch.manual_seed(1)
    states = [module._train(name, few, CPU) for _ in range(2)]
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    one, other = (state["model"].values() for state in states)
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_learns(name, digits, capsys):
    train = Split(*(values[:400] for values in digits.train))
    accuracy = module._train(name, digits._replace(train=train), CPU)["accuracy"]
    assert accuracy > 0.9


def test_each_update_of_a_judge_has_its_own_gradient(few, monkeypatch, capsys):
    shares, largest = iter([1.0, *[0.0] * 19]), []
    monkeypatch.setattr(module, "cross_entropy", lambda logits, _: next(shares) * logits.sum())

    def step(self, closure=None):
        weights = self.param_groups[0]["params"]
        largest.append(max(float(weight.grad.abs().max()) for weight in weights))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    module._train("vgg", few, CPU)
    assert largest[0] > 0 and largest[1:] == [0] * 19


def test_a_judge_of_colour_images_is_wider():
    for shape, widths in (((1, 28, 28), (16, 32, 64)), ((3, 32, 32), (48, 192, 192))):
        layers = build_judge("vgg", 10, shape).modules()
        found = [part.out_channels for part in layers if isinstance(part, nn.Conv2d)]
        assert found == [width for width in widths for _ in range(2)]


@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 9)])
def test_a_judge_takes_images_of_any_shape(name, shape):
    judge = build_judge(name, 7, shape)
    x = torch.rand(2, *shape, generator=generator())
    assert judge(x).shape == (2, 7) and judge.features(x).shape == (2, judge.head.in_features)
    assert any(isinstance(part, nn.BatchNorm2d) for part in judge.modules())
    assert judge.head.in_features == {"vgg": (64, 192), "convmixer": (64, 128)}[name][shape[0] == 3]


def test_two_folders_have_judges_of_their_own_and_a_dry_run_trains_for_a_moment(
    few, tmp_path, capsys, monkeypatch
):
    updates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a: updates.append(1) or step(*a))
    for mark in ("aaaa", "bbbb"):
        folder = few._replace(
            name="folder", origin={"fingerprint": {"train": f"20 images, {mark}"}}
        )
        judges(folder, tmp_path, CPU, Alone(), most_iterations=2)
    names = {f"folder-{mark}-{name}.pt" for mark in ("aaaa", "bbbb") for name in JUDGES}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert len(updates) == 2 * 2 * len(JUDGES)
