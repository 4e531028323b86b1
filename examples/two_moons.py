"""A joint energy-based model small enough to see: two moons, two layers, the whole plane drawn.

    python examples/two_moons.py

trains in half a minute and writes two-moons.png: the data, the density that the classifier's logits
define with chains on it, and p(y|x). In two dimensions the density can be normalised on a grid, so
the script also prints what no JEM on images can: the true log-likelihood of held-out points.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sgld_nrg.models import marginal_energy
from sgld_nrg.sgld import Langevin, run_chains
from sgld_nrg.support import flags
from sgld_nrg.support.errors import exits_cleanly
from sgld_nrg.support.parser import Parser, flag, positive_int
from sgld_nrg.support.restarts import UniformRestart
from sgld_nrg.train_jem import ReplayBuffer, energy_loss

STEP_SIZE = 4e-4
# temperature 1: the chains sample exp(-E)
LANGEVIN = Langevin(STEP_SIZE, noise_std=(2 * STEP_SIZE) ** 0.5, clamp=(-1, 1))
COLOURS = ("#0072B2", "#D55E00")  # Okabe and Ito's blue and vermilion, for the two classes
FLAGS = (
    flag("--iterations", positive_int, "of the training, 20 Langevin steps each", 2000),
    flags.SEED,
    flag("--out", str, "picture to write", "two-moons.png"),
)


def moons(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points (count, 2) float within [-1, 1] and labels (count,) int64."""
    points, labels = make_moons(count, noise=0.12, random_state=seed)
    scaled = torch.tensor((points - [0.5, 0.25]) / [1.9, 1.5], dtype=torch.float32)
    return scaled, torch.tensor(labels)


def train(
    points: Tensor, labels: Tensor, iterations: int, generator: torch.Generator
) -> tuple[nn.Module, ReplayBuffer]:
    """Train a network on log p(y|x) + log p(x) with Adam; returns it and its replay buffer."""
    layers = [nn.Linear(2, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2)]
    model = nn.Sequential(*layers)
    buffer = ReplayBuffer(2000, UniformRestart((2,), 2), reinit_prob=0.02, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

    def energy(x: Tensor) -> Tensor:
        return marginal_energy(model(x))

    for _ in range(iterations):
        batch = torch.randint(len(points), (200,), generator=generator)
        slots, starts, _ = buffer.draw(200, generator)
        chains = run_chains(energy, starts, 20, LANGEVIN, module=model, generator=generator)
        buffer.put(slots, chains, 20)

        logits, chain_logits = model(points[batch]), model(chains)
        loss = cross_entropy(logits, labels[batch])
        loss = loss + energy_loss(marginal_energy(logits), marginal_energy(chain_logits))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model, buffer


@torch.no_grad()
def density(model: nn.Module, side: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Return cell centres (side^2, 2) of [-1, 1]^2, log p(x) there, (side^2,), and log Z.

    Z is the integral of exp(-E) over the square.
    """
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    grid = torch.cartesian_prod(line, line)
    energies = marginal_energy(model(grid))
    log_z = (-energies).logsumexp(0) + 2 * torch.tensor(2 / side).log()
    return grid, -energies - log_z, log_z


def draw(model: nn.Module, points: Tensor, labels: Tensor, chains: Tensor, path: str) -> None:
    """Write the picture: data, density with chains, p(y|x)."""
    grid, log_p, _ = density(model)
    side = int(len(grid) ** 0.5)
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for label, colour in enumerate(COLOURS):
        axes[0].scatter(
            *points[labels == label].T.numpy(), s=3, color=colour, label=f"class {label}"
        )
    axes[0].set_title("data")
    axes[0].legend(fontsize=8)
    picture = {"origin": "lower", "extent": (-1, 1, -1, 1)}
    image = axes[1].imshow(log_p.view(side, side).T.exp().numpy(), **picture, cmap="cividis")
    axes[1].scatter(*chains[:300].T.numpy(), s=3, color="#D55E00", label="chains")
    axes[1].set_title("density p(x) = exp(−E(x)) / Z")
    axes[1].legend(fontsize=8)
    figure.colorbar(image, ax=axes[1], label="per unit of area")
    with torch.no_grad():
        share = model(grid).softmax(1)[:, 1].view(side, side)
    image = axes[2].imshow(share.T.numpy(), **picture, cmap="cividis", vmin=0, vmax=1)
    axes[2].set_title("p(class 1 | x)")
    figure.colorbar(image, ax=axes[2])
    for axis in axes:
        axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    return Parser(__doc__, (("example", FLAGS),)).parse_with_out(argv)


@exits_cleanly
def main(args: Namespace) -> None:
    """Train, measure on held-out points, draw."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    points, labels = moons(2000, seed=args.seed)
    test_points, test_labels = moons(2000, seed=args.seed + 1)
    model, buffer = train(points, labels, args.iterations, generator)
    with torch.no_grad():
        logits = model(test_points)
    accuracy = (logits.argmax(1) == test_labels).float().mean()
    likelihood = (-marginal_energy(logits) - density(model)[2]).mean()
    normal = torch.distributions.MultivariateNormal(points.mean(0), points.T.cov())
    gaussian = normal.log_prob(test_points).mean()
    print(f"held-out accuracy: {100 * accuracy:.2f} %")
    print(
        f"held-out log-likelihood: {likelihood:.3f} nat "
        f"(a Gaussian: {gaussian:.3f}; the uniform square: {-2 * 0.6931:.3f})"
    )
    draw(model, points, labels, buffer.images, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(parse())
