"""From a classifier to a joint energy-based model, cell by cell, on the digits: about a minute.

    python examples/walkthrough.py

A plain script whose cells (# %%) an editor or Jupyter runs one by one; walkthrough.ipynb is the
same with its pictures, made by make_notebook.py. It writes its grids of images to
results/walkthrough, or to the folder in OUT; ITERATIONS in the environment shortens or lengthens
the two trainings.
"""

# %% [markdown]
# # A classifier that is also a density
# This tour trains one small network on 1,797 handwritten digits, and then uses it to classify, to
# generate, to spot unfamiliar pictures and to clean noisy ones. It takes about a minute on one core
# and downloads nothing. `pip install .` in the project's folder makes `sgld_nrg` importable.

# %%
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from sgld_nrg import (
    Detector,
    GaussianRestart,
    Langevin,
    ReplayBuffer,
    UniformRestart,
    energy_loss,
    energy_regulariser,
    marginal_energy,
    run_chains,
)
from sgld_nrg.models import build_model, energy_of, predict
from sgld_nrg.support import data, metrics, plots
from sgld_nrg.support.ood import load_ood

ITERATIONS = int(os.environ.get("ITERATIONS", "300"))
OUT = Path(os.environ.get("OUT", "results/walkthrough"))
OUT.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# ## The data
# Each image is 8x8, its pixels between -1 (black) and 1 (white). The test images take no part in
# any training below.


# %%
def show(images: Tensor, title: str, rows: Sequence[str] = (), name: str = "") -> None:
    """Show images (N, 1, H, W) in rows of 16, or in those named; with a name, write the grid too.

    N must fill the rows.
    """
    columns = len(images) // len(rows) if rows else 16
    tiles = pad(images[:, 0], (1, 0, 1, 0)).unflatten(0, (-1, columns))  # (rows, columns, H, W)
    picture = pad(tiles.transpose(1, 2).flatten(2).flatten(0, 1), (0, 1, 0, 1))
    height, width = picture.shape
    size = (7, 7 * height / width + 0.4)
    _, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(picture.numpy(), cmap="gray", vmin=-1, vmax=1)
    pitch = (height - 1) / len(tiles)
    axis.set_yticks([pitch * (row + 0.5) for row in range(len(rows))], rows, fontsize=9)
    axis.set(xticks=[], title=title)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    if name:
        plots.save_grid(images, OUT / f"{name}.png", columns)


digits = data.load("digits", "unused")
sizes = len(digits.train.labels), len(digits.val.labels), len(digits.test.labels)
print("{} images to train on, {} to calibrate with, {} to test on".format(*sizes))
show(digits.train.images[:64], "training images")

# %% [markdown]
# ## A classifier
# The network turns an image x into ten numbers f(x), the logits, one for each class. Trained with
# the usual cross-entropy, it tells the digits apart.


# %%
def batch(size: int = 64) -> tuple[Tensor, Tensor]:
    """Draw training images (size, 1, 8, 8) with a little noise, and their labels."""
    chosen = torch.randint(len(digits.train.labels), (size,), generator=generator)
    images, labels = digits.train.images[chosen], digits.train.labels[chosen]
    return images + 0.05 * torch.randn(images.shape, generator=generator), labels


model = build_model("small-cnn", num_classes=10, channels=1, image_size=8, width=32, depth=2)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(ITERATIONS):
    images, labels = batch()
    loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

plain_logits = predict(model, digits.test.images)
accuracy = (plain_logits.argmax(1) == digits.test.labels).float().mean()
print(f"classifier: {100 * accuracy:.1f} % of the test digits are read rightly")

# %% [markdown]
# ## The energy of a classifier
# The same logits give every image an energy, E(x) = -logsumexp f(x), and with it a density in
# proportion to exp(-E(x)). **Low energy means likely.** Digits here happen to lie lower than noise,
# though nothing in the training asked for it.


# %%
def show_energies(energies: dict[str, Tensor], title: str) -> None:
    """Draw a histogram of each set's energies, all with the same bins, the digits' in blue."""
    _, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    together = torch.cat(list(energies.values()))
    bins = torch.linspace(float(together.min()), float(together.max()), 61).tolist()
    for (name, values), colour in zip(energies.items(), plots.SERIES_COLOURS, strict=False):
        axis.hist(values.tolist(), bins, color=colour, alpha=0.5, label=name)
    axis.set(title=title, xlabel="energy E(x), low = likely", ylabel="images")
    axis.legend(fontsize=8)


noise = UniformRestart(digits.shape, 10).draw(digits.test.labels, generator)
energies = {
    "test digits": marginal_energy(plain_logits),
    "noise": marginal_energy(predict(model, noise)),
}
show_energies(energies, "before: the plain classifier")

# %% [markdown]
# ## Chains
# A *chain* is a picture that moves downhill: each step subtracts a little of the energy's gradient
# and adds a little noise, which is called stochastic gradient Langevin dynamics (SGLD). Here chains
# start in noise and follow the plain classifier's energy. They end far below the digits' energies,
# and few look like a digit: this density is not that of digits.

# %%
langevin = Langevin(step_size=0.1, noise_std=0.08, pixel_grad_clip=1.0, clamp=(-1, 1))
energy = energy_of(model)  # E(x), or E(x, y) if it is given labels too, of the weights as they are
settings = {"module": model, "generator": generator}
chains = run_chains(energy, noise[:64], 100, langevin, **settings)
reached = marginal_energy(predict(model, chains))
print(f"mean energy of test digits: {energies['test digits'].mean():.1f}")
print(
    f"of the chains: {energies['noise'][:64].mean():.1f} at the start, {reached.mean():.1f} after"
)
show(chains, "chains on the plain classifier, after 100 steps", name="classifier-chains")

# %% [markdown]
# ## The buffer
# To make digits likely, training must find what else is likely, and that is where chains go.
# The *buffer* keeps 1,000 chains from one iteration to the next, so that a few steps each time add
# up to long chains. A *fresh* chain starts anew, here with a blurry digit drawn from a Gaussian
# fitted to the images of one class; the buffer begins with fresh chains and replaces one in twenty
# of those drawn.

# %%
restart = GaussianRestart.fit(*digits.train, num_classes=10)
buffer = ReplayBuffer(1000, restart, reinit_prob=0.05, generator=generator)
show(buffer.images[:64], "the buffer before training: fresh chains", name="buffer-before")

# %% [markdown]
# ## Training the density
# Each iteration moves 64 chains of the buffer by ten steps. The loss then lowers the energy of the
# digits and raises that of the chains, beside the cross-entropy, and a small term keeps energies
# near zero. When chains look like digits the two energies stay close, and the pushes cancel.

# %%
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
history = []
for iteration in range(ITERATIONS):
    images, labels = batch()
    slots, starts, _ = buffer.draw(64, generator)
    chains = run_chains(energy, starts, 10, langevin, **settings)
    buffer.put(slots, chains, 10)

    logits, chain_logits = model(images), model(chains)
    positive, negative = marginal_energy(logits), marginal_energy(chain_logits)
    loss = cross_entropy(logits, labels) + 0.3 * energy_loss(positive, negative)
    loss = loss + 0.001 * energy_regulariser(positive, negative)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    history.append((positive.mean().item(), negative.mean().item()))
    if iteration % max(ITERATIONS // 10, 1) == 0:
        print(f"iteration {iteration}: energy gap {history[-1][1] - history[-1][0]:.2f}")

_, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
for values, label in zip(zip(*history, strict=True), ("digits", "chains"), strict=True):
    colour = plots.DATA_COLOUR if label == "digits" else plots.CHAIN_COLOUR
    thick = {"linewidth": 4, "alpha": 0.4} if label == "digits" else {"linewidth": 1}
    axis.plot(values, color=colour, label=label, **thick)
axis.set(title="training", xlabel="iteration", ylabel="mean energy")
axis.legend(fontsize=8)
show(buffer.images[:64], "the buffer after training", name="buffer-after")

# %% [markdown]
# The network now is a joint energy-based model, JEM for short. It still classifies, and the digits
# have the low energies.

# %%
logits = predict(model, digits.test.images)
accuracy = (logits.argmax(1) == digits.test.labels).float().mean()
print(f"JEM: {100 * accuracy:.1f} % of the test digits are read rightly")
energies = {"test digits": marginal_energy(logits), "noise": marginal_energy(predict(model, noise))}
show_energies(energies, "after: the JEM")

# %% [markdown]
# ## Samples
# Fresh chains on the trained energy sharpen into digits. Each column below is one chain.

# %%
starts = restart.draw(torch.arange(64) % 10, generator)
path = run_chains(energy, starts, 100, langevin, return_trajectory=True, **settings)
plots.save_grid(path[-1], OUT / "fresh-chains.png")
moments = (0, 3, 10, 30, 100)
rows = [f"{moment} steps" for moment in moments]
show(path[list(moments), :16].flatten(0, 1), "fresh chains on the JEM", rows)

# %% [markdown]
# ## Samples by class
# Given a class y, chains follow E(x, y) = -f(x)[y] instead. Each row asks for one digit, and starts
# in the Gaussian of that class.

# %%
asked = torch.arange(10).repeat_interleave(16)
starts = restart.draw(asked, generator)
conditional = run_chains(energy, starts, 30, langevin, labels=asked, **settings)
read = predict(model, conditional).argmax(1) == asked
print(f"read as the class asked for: {100 * read.float().mean():.0f} %")
title = "samples by class, after 30 steps"
show(conditional, title, [str(digit) for digit in range(10)], name="class-conditional")

# %% [markdown]
# ## Unfamiliar pictures
# A `Detector` looks at the logits, the energy and the complexity of a picture, and gives a p-value:
# the share of held-out digits that look at least as strange. Whatever the network, calling pictures
# with a p-value of 0.05 or less unfamiliar is wrong for one digit in twenty at most, on average.

# %%
held_out, labels_held_out = digits.val
detector = Detector.fit(model, held_out, labels_held_out, reference=digits.train.images)
sets = {"test digits": digits.test.images}
for name in ("uniform-noise", "rotated", "interpolations"):
    sets[name], _ = load_ood(name, digits.test.images, "", 360, generator)
for name, images in sets.items():
    unfamiliar = (detector.p_values(images) <= 0.05).float().mean()
    print(f"{name}: {100 * unfamiliar:.0f} % called unfamiliar")
firsts = [images[:12] for images in sets.values()]
rows = [f"{name}\np = {detector.p_values(images).median():.2f}" for name, images in sets.items()]
show(torch.cat(firsts), "some pictures of each set, and the set's median p-value", rows)

# %% [markdown]
# The AUROC is the chance that an unfamiliar picture is ranked as stranger than a digit: 1 is
# perfect, 0.5 a coin's toss. Interpolations, each halfway between two digits, are nearer to digits
# than the other sets and so the hardest to tell; there the energy alone ranks better.

# %%
digit_scores = detector.scores(digits.test.images)
for name in ("uniform-noise", "rotated", "interpolations"):
    outside = marginal_energy(predict(model, sets[name]))
    by_energy = metrics.detection(marginal_energy(logits), outside)["auroc"]
    by_detector = metrics.detection(digit_scores, detector.scores(sets[name]))["auroc"]
    print(
        f"AUROC of the energy against {name}: {by_energy:.3f}, of the detector: {by_detector:.3f}"
    )

# %% [markdown]
# ## Calibration
# A classifier is calibrated if it is right as often as it says. The expected calibration error
# (ECE) is the mean distance between the two, over 15 bins of confidence. A dot's area tells the
# number of images in its bin: of the 360 most are in the last, so the rest of a curve is rough.

# %%
_, axis = plt.subplots(figsize=(4.2, 3.4), layout="constrained")
axis.plot([0, 1], [0, 1], color=plots.NEUTRAL, linestyle=":", label="calibrated")
for name, found in (("classifier", plain_logits), ("jem", logits)):
    calibration = metrics.calibration(found, digits.test.labels)
    ece = f"ECE {100 * calibration['ece']:.1f} %"
    used = [row for row in calibration["reliability"] if row["count"]]
    points = [(row["confidence"], row["accuracy"]) for row in used]
    colour, areas = plots.MODEL_COLOURS[name], [8 + row["count"] / 2 for row in used]
    axis.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=f"{name}, {ece}")
    axis.scatter(*zip(*points, strict=True), areas, color=colour, alpha=0.7)
    print(f"{name}: {ece}")
axis.legend(fontsize=8)
_ = axis.set(xlabel="confidence", ylabel="share that is right", title="reliability, test digits")

# %% [markdown]
# ## Cleaning
# A few steps downhill without any noise take spoilt pixels back towards a digit.

# %%
clean = digits.test.images[:16]
noisy = (clean + 0.4 * torch.randn(clean.shape, generator=generator)).clamp(-1, 1)
cleaned = run_chains(energy, noisy, 10, langevin._replace(noise_std=0.0), module=model)
rows = ["noisy", "cleaned", "original"]
show(torch.cat([noisy, cleaned, clean]), "ten steps without noise", rows, name="denoised")
before, after = ((x - clean).square().mean().sqrt() for x in (noisy, cleaned))
print(f"distance to the clean picture per pixel: {before:.2f} noisy, {after:.2f} cleaned")

# %% [markdown]
# ## From here on
# `python train_jem.py` does this with schedules, averaging, checkpoints and a guard against
# divergence, and `python evaluate.py` measures it properly, with intervals and judges that the
# model never saw.

# %%
if __name__ == "__main__":
    plt.show()  # a script's windows; a notebook has shown its figures already
