"""From a classifier to a joint energy-based model, cell by cell, on the digits: a minute or two.

    python examples/walkthrough.py

A plain script whose cells (# %%) an editor or Jupyter runs one by one. It writes its pictures to
results/walkthrough, or to the folder in OUT; ITERATIONS in the environment shortens or lengthens
the two trainings.
"""

# %% [markdown]
# What is needed: the project's own objects, which `pip install .` makes importable anywhere.

# %%
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sgld_nrg import (
    GaussianRestart,
    Langevin,
    ReplayBuffer,
    UniformRestart,
    energy_loss,
    energy_regulariser,
    joint_energy,
    marginal_energy,
    run_chains,
)
from sgld_nrg.models import build_model, energy_of, predict
from sgld_nrg.support import data, metrics, plots
from sgld_nrg.support.ood import load_ood

ITERATIONS = int(os.environ.get("ITERATIONS", "1500"))
OUT = Path(os.environ.get("OUT", "results/walkthrough"))
OUT.mkdir(parents=True, exist_ok=True)
torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)

# %% [markdown]
# 1,797 digits of 8x8 pixels, pixels on [-1, 1].

# %%
digits = data.load("digits", "unused")
sizes = len(digits.train.labels), len(digits.test.labels)
print(f"{sizes[0]} images to train on, {sizes[1]} to test on, shape {digits.shape}")


def batch(size: int = 64) -> tuple[Tensor, Tensor]:
    """Draw training images (size, 1, 8, 8) with a little noise, and their labels."""
    chosen = torch.randint(len(digits.train.labels), (size,), generator=generator)
    images, labels = digits.train.images[chosen], digits.train.labels[chosen]
    return images + 0.05 * torch.randn(images.shape, generator=generator), labels


# %% [markdown]
# ## A classifier
# Any network that gives logits f(x). Nothing here knows of energies yet.

# %%
model = build_model("small-cnn", num_classes=10, channels=1, image_size=8, width=32, depth=2)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(ITERATIONS // 4):
    images, labels = batch()
    loss = cross_entropy(model(images), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

logits = predict(model, digits.test.images)
accuracy = (logits.argmax(1) == digits.test.labels).float().mean()
print(f"classifier: {100 * accuracy:.1f} % of the test digits")

# %% [markdown]
# ## ... which is secretly an energy-based model
# E(x) = -logsumexp f(x). Low energy means likely: if the classifier were a density model, digits
# would lie lower than noise, and chains that descend E would turn into digits. Neither holds:
# nobody has asked it of the network.

# %%
noise = UniformRestart(digits.shape, 10).draw(digits.test.labels, generator)
of_digits, of_noise = marginal_energy(logits), marginal_energy(predict(model, noise))
print(f"energy of digits {of_digits.mean():.1f}, of noise {of_noise.mean():.1f}")

langevin = Langevin(step_size=0.1, noise_std=0.08, pixel_grad_clip=1.0, clamp=(-1, 1))
energy = energy_of(model)  # E(x), or E(x, y) if it is given labels too, of the weights as they are
settings = {"module": model, "generator": generator}
chains = run_chains(energy, noise[:64], 100, langevin, **settings)
plots.save_grid(chains, OUT / "classifier-chains.png")

# %% [markdown]
# ## Training the density
# The gradient of log p(x) is that of mean E(chains) - mean E(data): wherever chains gather without
# data the energy is raised. The chains persist in a replay buffer, so that each iteration moves
# them on by a few steps only, and start in a Gaussian of each class rather than in noise.

# %%
restart = GaussianRestart.fit(*digits.train, num_classes=10)
buffer = ReplayBuffer(1000, restart, reinit_prob=0.05, generator=generator)
plots.save_grid(buffer.images[:64], OUT / "buffer-before.png")
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, ITERATIONS)
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
    if iteration % max(ITERATIONS // 10, 1) == 0:
        gap = negative.mean() - positive.mean()
        print(f"iteration {iteration}: energy gap {gap.item():.2f}")
plots.save_grid(buffer.images[:64], OUT / "buffer-after.png")

# %% [markdown]
# ## One network, five uses
# It classifies.

# %%
logits = predict(model, digits.test.images)
accuracy = (logits.argmax(1) == digits.test.labels).float().mean()
print(f"JEM: {100 * accuracy:.1f} % of the test digits")

# %% [markdown]
# It generates: chains on E(x), and on E(x, y) = -f(x)[y] for a class that is asked for.

# %%
starts = restart.draw(torch.arange(64) % 10, generator)
plots.save_grid(run_chains(energy, starts, 100, langevin, **settings), OUT / "fresh-chains.png")


def energy_of_class(x: Tensor, labels: Tensor) -> Tensor:
    """Return E(x, y)."""
    return joint_energy(model(x), labels)


asked = torch.arange(10).repeat_interleave(8)
starts = restart.draw(asked, generator)
conditional = run_chains(energy_of_class, starts, 100, langevin, labels=asked, **settings)
plots.save_grid(conditional, OUT / "class-conditional.png")
read = predict(model, conditional).argmax(1) == asked
print(f"read as the class asked for: {100 * read.float().mean():.0f} %")

# %% [markdown]
# It tells what is no digit: the energy is high there.

# %%
for name in ("uniform-noise", "inverted", "rotated"):
    strange, _ = load_ood(name, digits.test.images, "", 360, generator)
    outside = marginal_energy(predict(model, strange))
    found = metrics.detection(marginal_energy(logits), outside, name)
    print(f"AUROC of the energy against {name}: {found['auroc']:.3f}")

# %% [markdown]
# Its confidence means something: the expected calibration error over 15 bins.

# %%
print(f"ECE {100 * metrics.calibration(logits, digits.test.labels)['ece']:.1f} %")

# %% [markdown]
# And it cleans: a few steps down the energy, without noise, take pixels back towards digits.

# %%
clean = digits.test.images[:32]
noisy = (clean + 0.4 * torch.randn(clean.shape, generator=generator)).clamp(-1, 1)
cleaned = run_chains(energy, noisy, 10, langevin._replace(noise_std=0.0), module=model)
plots.save_grid(torch.stack([noisy, cleaned], dim=1).flatten(0, 1), OUT / "denoised.png")
before, after = ((x - clean).square().mean().sqrt() for x in (noisy, cleaned))
print(f"distance to the clean picture per pixel: {before:.2f} noisy, {after:.2f} cleaned")
print(f"pictures in {OUT}")

# %% [markdown]
# From here on: `python train_jem.py` does this with schedules, averaging, checkpoints and a guard
# against divergence, and `python evaluate.py` measures it properly.
