"""Train a joint energy-based model (JEM, arXiv 1912.03263): one network classifies and generates.

    python train_jem.py --dataset digits

trains the classifier first if none is given or found in --out-dir, then maximises log p(y|x) +
weight * log p(x). It writes jem.pt, metrics.csv, curves.png, samples.png, grids/epoch-*.png and
config.json.
"""

from __future__ import annotations

try:
    from sgld_nrg.support.commands import parse
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; run: pip install -r requirements.txt") from None

if __name__ == "__main__":
    args = parse("train_jem", doc=__doc__)  # here, so that --help answers before torch loads

import shlex
from argparse import Namespace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, softplus

from sgld_nrg import train_classifier
from sgld_nrg.models import joint_energy, marginal_energy, predict
from sgld_nrg.sgld import Langevin
from sgld_nrg.support.attacks import single_step
from sgld_nrg.support.augment import add_noise, augmented, recast
from sgld_nrg.support.checkpoints import Checkpoint, has_density
from sgld_nrg.support.detector import detector_for
from sgld_nrg.support.errors import exits_cleanly
from sgld_nrg.support.guard import Guard, Healthy, largest_gap
from sgld_nrg.support.log import report_files
from sgld_nrg.support.parallel import keep_share, whole_state
from sgld_nrg.support.parser import plain
from sgld_nrg.support.restarts import Restart, restart_from_flags
from sgld_nrg.support.training import Setup, Training, set_up

OUTPUTS = ("jem.pt", "samples.png", "grids", "curves.png", "metrics.csv", "config.json")


class ReplayBuffer:
    """Persistent chains (Tieleman 2008; arXiv 1912.03263, algorithm 1): drawn, moved, put back.

    size: number of chains. restart: restart distribution, see support/restarts.py. reinit_prob:
    probability that a drawn chain is restarted, 0..1. long_chains: the last so many slots never
    restart; long_share: the share of each draw that comes from them, 0..1, so that a few chains
    grow old and training sees where thousands of steps lead. device, generator: where the chains
    live and what they are drawn with.

    images: (size, C, H, W) float, or of the shape that the restart distribution draws.
    labels: (size,) int64, the class that a chain started from; class-conditional chains keep it.
    ages: (size,) int64, Langevin steps since the restart.

    >>> from sgld_nrg import Langevin, UniformRestart, run_chains
    >>> buffer = ReplayBuffer(100, UniformRestart((1, 8, 8), num_classes=10), reinit_prob=0.05)
    >>> slots, images, labels = buffer.draw(16)
    >>> bowl = lambda x: x.square().sum((1, 2, 3))
    >>> buffer.put(slots, run_chains(bowl, images, 20, Langevin(0.1, 0.01)), steps=20)
    >>> int((buffer.ages == 20).sum())
    16
    """

    def __init__(
        self,
        size: int,
        restart: Restart,
        reinit_prob: float,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        long_chains: int = 0,
        long_share: float = 0.0,
    ):
        self.restart, self.reinit_prob = restart, reinit_prob
        self.long_chains, self.long_share = long_chains, long_share
        self.labels = restart.labels(torch.arange(size, device=device))
        self.images = restart.draw(self.labels, generator)
        self.ages = torch.zeros(size, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def draw(
        self, count: int, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw `count` different chains: slots (N,), images (N, C, H, W), labels (N,).

        A chain restarts with probability reinit_prob, in its class's restart distribution; a long
        chain never does. Raises ValueError for more chains of either kind than there are.
        """
        device, ordinary = self.images.device, len(self) - self.long_chains
        long = round(self.long_share * count)
        if count - long > ordinary or long > self.long_chains:
            raise ValueError(
                f"{count - long} + {long} chains were asked of a replay buffer of "
                f"{ordinary} + {self.long_chains}"
            )
        slots = torch.randperm(ordinary, device=device, generator=generator)[: count - long]
        if long:
            order = torch.randperm(self.long_chains, device=device, generator=generator)
            slots = torch.cat([slots, ordinary + order[:long]])
        labels, images = self.labels[slots], self.images[slots]
        restarted = torch.rand(count, device=device, generator=generator) < self.reinit_prob
        restarted &= slots < ordinary
        one_each = restarted.view(-1, *[1] * (images.dim() - 1))
        images = torch.where(one_each, self.restart.draw(labels, generator, restarted), images)
        self.ages[slots] = self.ages[slots].masked_fill(restarted, 0)
        return slots, images, labels

    def put(self, slots: Tensor, images: Tensor, steps: int) -> None:
        """Write chains back to the slots they were drawn from, `steps` Langevin steps older.

        Raises ValueError unless there is one chain, of the buffer's shape, for each slot.
        """
        if images.shape != (len(slots), *self.images.shape[1:]):
            raise ValueError(
                f"{len(slots)} slots want chains of shape {tuple(self.images.shape[1:])}; "
                f"got {tuple(images.shape)}"
            )
        self.images[slots] = images
        self.ages[slots] += steps

    def restart_broken(self, generator: torch.Generator | None = None) -> None:
        """Restart the chains that are not finite."""
        broken = ~torch.isfinite(self.images).flatten(1).all(1)
        if broken.any():
            self.images[broken] = self.restart.draw(self.labels[broken], generator)
            self.ages[broken] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the chains, labels and ages."""
        return {"images": self.images, "labels": self.labels, "ages": self.ages}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state_dict of any size, on this buffer's device."""
        device = self.images.device
        self.images = state["images"].to(device).clone()
        self.labels = state["labels"].to(device).clone()
        self.ages = state["ages"].to(device).clone()


def energy_loss(energy_positive: Tensor, energy_negative: Tensor) -> Tensor:
    """Return mean E(data) - mean E(chains), whose gradient is that of -log p.

    Both (N,) float. Descending it lowers the energy of data and raises that of the chains.
    Source: arXiv 1912.03263, equation 2.

    >>> energy_loss(torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 1.0]))
    tensor(-3.)
    """
    return energy_positive.mean() - energy_negative.mean()


def energy_regulariser(energy_positive: Tensor, energy_negative: Tensor) -> Tensor:
    """Return mean E(data)^2 + mean E(chains)^2, which keeps the level of E near 0.

    Both (N,) float. Source: arXiv 1903.08689, section 4.

    >>> energy_regulariser(torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 1.0]))
    tensor(6.)
    """
    return energy_positive.square().mean() + energy_negative.square().mean()


def outlier_loss(energy_positive: Tensor, energy_outliers: Tensor, margin: float) -> Tensor:
    """Return mean softplus(mean E(data) + margin - E(outliers)): log-loss of telling them apart.

    energy_positive: (N,), energy_outliers: (M,) float. margin: nat. exp(-E) of an outlier against
    exp(-margin) times that of data are the odds of a logistic regression, and this is minus its
    log-likelihood. The energy loss alone says nothing about E where neither data nor chains go;
    this holds it above the data's there, and has no gradient once it is.
    Sources: Hendrycks et al., "Deep anomaly detection with outlier exposure" (arXiv 1812.04606);
    Liu et al., "Energy-based out-of-distribution detection" (arXiv 2010.03759), section 3.3, whose
    hinge is squared and has a bound for each side.

    >>> outlier_loss(torch.tensor([-3.0, -1.0]), torch.tensor([18.0]), margin=20.0)
    tensor(0.6931)
    """
    return softplus(energy_positive.mean() + margin - energy_outliers).mean()


def iteration(
    run: Training,
    buffer: ReplayBuffer,
    langevin: Langevin,
    steps: int,
    images: Tensor,
    labels: Tensor,
) -> dict[str, Tensor]:
    """Do one iteration of algorithm 1 of arXiv 1912.03263, but for the optimiser's update.

    images: (N, C, H, W) float, pixels in [-1, 1]; labels: (N,) int64. steps: Langevin steps.
    Nothing here waits for a GPU, so that it can be captured as a CUDA graph; the update follows in
    `train`. Returns what is to be logged: {name: scalar tensor}, of the names in log.COLUMNS.
    """
    args, generator = run.settings, run.generator
    class_conditional = args.p_xy_weight > 0
    density = has_density(vars(args))  # else the cross-entropy is all

    # negative samples: persistent chains, moved on by some Langevin steps
    parts = {}
    if density:
        count = args.chain_batch_size // run.ranks.count
        slots, starts, chain_labels = buffer.draw(count, generator)
        chains = run.run_chains(
            run.energy,
            starts,
            steps,
            langevin,
            labels=chain_labels if class_conditional else None,
            module=run.model,
            generator=generator,
            check=run.checks_chains,
        )
        buffer.put(slots, chains, steps)
        parts["chains"] = chains

    # positive samples: data, and for the cross-entropy harder versions of them
    positives = add_noise(images, args.input_noise, generator)
    if args.clamp:
        positives = positives.clamp(-args.clamp, args.clamp)  # data lie where the chains can go
    parts = {"data": positives, **parts}
    if args.clean_share < 1:
        parts["hard"] = attacked(run, augmented(images, args, generator), labels)

    # outliers, where neither data nor chains ever go
    outliers = round(args.outlier_share * len(images)) if density and args.outlier_weight else 0
    if outliers:
        parts["outliers"] = recast(positives[:outliers], generator)

    sizes = [len(part) for part in parts.values()]
    logits_of_all = run.logits_for_loss(torch.cat(list(parts.values())))
    logits = dict(zip(parts, logits_of_all.split(sizes), strict=True))
    energy = {name: marginal_energy(part) for name, part in logits.items()}

    cross = args.clean_share * cross_entropy(logits["data"], labels)
    if "hard" in parts:
        cross = cross + (1 - args.clean_share) * cross_entropy(logits["hard"], labels)
    loss = args.p_y_given_x_weight * cross
    if density:
        loss = loss + args.p_x_weight * energy_loss(energy["data"], energy["chains"])
        loss = loss + args.energy_reg * energy_regulariser(energy["data"], energy["chains"])
    if class_conditional:
        positive = joint_energy(logits["data"], labels)
        negative = joint_energy(logits["chains"], chain_labels)
        loss = loss + args.p_xy_weight * energy_loss(positive, negative)
    if outliers:
        margin = args.outlier_margin
        loss = loss + args.outlier_weight * outlier_loss(energy["data"], energy["outliers"], margin)
    run.backward(loss)

    values = {
        "cross_entropy": cross,
        "accuracy": (logits["data"].argmax(1) == labels).float().mean(),
        "energy_positive": energy["data"].mean(),
    }
    if density:
        values |= {
            "energy_negative": energy["chains"].mean(),
            "energy_gap": energy["chains"].mean() - energy["data"].mean(),
            "chain_displacement": (chains - starts).flatten(1).norm(dim=1).mean(),
            "chain_saturated": (chains.abs() >= 1).float().mean(),
            "chain_age": buffer.ages.float().mean(),
        }
    if outliers:
        values["energy_outliers"] = energy["outliers"].mean()
    return {name: value.detach() for name, value in values.items()}


def attacked(run: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Return images, the first --attack-share of them after one L-inf step up the cross-entropy."""
    args = run.settings
    count = round(args.attack_share * len(images)) if args.adversarial_eps else 0
    if not count:
        return images
    moved = single_step(
        run.logits,
        images[:count],
        labels[:count],
        "linf",
        args.adversarial_eps,
        generator=run.generator,
        module=run.model,
    )
    return torch.cat([moved, images[count:]])


def steps_now(args: Namespace, progress: float) -> int:
    """Return an iteration's Langevin steps: from --first-steps to --steps as progress goes to 1."""
    first = args.first_steps or args.steps
    return round(first + progress * (args.steps - first))


def train(
    args: Namespace,
    setup: Setup,
    classifier: dict[str, Tensor] | None = None,
    resumed: Checkpoint | None = None,
) -> Checkpoint:
    """Train a JEM and return its checkpoint, the dict that then lies in jem.pt.

    classifier: the state_dict to start from, or None for random weights. resumed: the checkpoint
    of a stopped run, to go on from. Raises FloatingPointError, naming iteration and term, if the
    training diverges once more than --max-rollbacks.
    """
    start = {"weights": classifier, "resumed": resumed, "max_minutes": args.max_minutes}
    run, (dataset, _, device, ranks) = Training(args, setup, "jem", **start), setup
    clip, clamp = args.pixel_grad_clip or None, (-args.clamp, args.clamp) if args.clamp else None
    langevin = Langevin(args.step_size, args.noise_std, args.noise_first, clip, clamp)
    restart = restart_from_flags(args, dataset, device)
    source = torch.Generator(device).manual_seed(args.seed + 1)
    chains = (args.long_chains, args.long_share)
    buffer = ReplayBuffer(args.buffer_size, restart, args.reinit_prob, device, source, *chains)
    guard, checkpoint = Guard(), resumed
    guarded = not args.no_guard and has_density(vars(args))
    if resumed:
        buffer.load_state_dict(resumed["buffer"])
        guard.load_state_dict(resumed["guard"])
    keep_share(buffer, ranks)
    run.open()
    if not resumed:
        save_grids(run, buffer)

    healthy = Healthy(run, buffer, guard)
    healthy.resume(resumed.get("healthy", []) if resumed else [])
    for images, labels in run.batches():
        steps = steps_now(run.settings, run.progress)
        work = partial(iteration, run, buffer, langevin, steps)
        key = (steps, run.rollbacks, buffer.images.data_ptr())  # a rollback changes the last two
        try:
            run.update(run.replayed(key, work, images, labels))
            row = None
            if run.epoch_ends():
                val_loss, val_accuracy = train_classifier.evaluate(run.averaged, dataset.val)
                row = run.write_row(val_cross_entropy=val_loss, val_accuracy=val_accuracy)
            elif run.iteration % args.log_every == 0:
                row = run.write_row()
            if row and guarded and guard.judge(row, largest_gap(run.settings)):
                healthy.keep()
            due, rolled_back = run.save_is_due(), False
            if due:
                run.check_weights()
        except ArithmeticError as error:
            healthy.roll_back(error)
            due = rolled_back = True
        if due:
            checkpoint = save(run, buffer, langevin, healthy)
        if rolled_back:
            continue
        half = run.iteration == run.epoch_iterations // 2
        between_grids = args.grid_every * run.epoch_iterations
        if half or run.progress >= 1 or run.iteration % between_grids == 0:
            save_grids(run, buffer)
        elif due:
            run.journal.save_grid(buffer.images)
    if not (checkpoint and checkpoint["finished"]):  # the budget of minutes ended in a rollback
        checkpoint = save(run, buffer, langevin, healthy)
    return checkpoint


def save(run: Training, buffer: ReplayBuffer, langevin: Langevin, healthy: Healthy) -> Checkpoint:
    """Save all that sample.py, evaluate.py and a resumed run need: plain types and tensors."""
    checkpoint = {
        "model_config": run.model_config,
        "model": run.averaged_weights(),
        "dataset": run.dataset.name,
        "origin": run.dataset.origin,
        "sgld": {"steps": run.args.steps, **langevin._asdict()},
        "restart": buffer.restart.state_dict(),
        "buffer": whole_state(buffer, run.ranks),
        "conditional": run.args.p_xy_weight > 0,
        "args": plain(run.args),
        "finished": run.progress >= 1,
        "training": run.state_dict(),
        "guard": healthy.guard.state_dict(),
        "healthy": healthy.iterations(),
    }
    if checkpoint["finished"]:
        checkpoint["detector"] = detector_for(run.averaged, run.dataset).state_dict()
    run.journal.save(checkpoint)
    healthy.saved(checkpoint["finished"])
    return checkpoint


def save_grids(run: Training, buffer: ReplayBuffer) -> None:
    """Write the grids of this moment, and for TensorBoard the energies of data and chains."""

    def energies(images: Tensor) -> Tensor:
        return marginal_energy(predict(run.averaged, images))

    data = run.dataset.val.images
    run.journal.save_grids(buffer, run.iteration, run.epoch, data, energies)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    with set_up(args, "jem") as (setup, resumed):
        classifier = None
        if args.from_scratch and not resumed:
            print("starting from random weights", flush=True)
        elif not resumed:
            classifier = train_classifier.pretrained(args, setup)["model"]
        checkpoint = train(args, setup, classifier, resumed)
        report_files(args, [setup.folder / name for name in OUTPUTS])
        train_classifier.look_at_test("python train_jem.py", args, setup, checkpoint)
        if not args.dry_run:
            path = shlex.quote(str(setup.folder / "jem.pt"))
            print(f"next: python sample.py --checkpoint {path}")
            print(f"      python evaluate.py --checkpoint {path} --quick")


if __name__ == "__main__":
    main(args)
