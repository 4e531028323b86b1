"""Train a joint energy-based model (JEM, arXiv 1912.03263): one network that classifies and generates.

    python train_jem.py --dataset digits

trains the classifier first where none is given or found in --out-dir, then maximises log p(y|x) + weight * log p(x).
It writes jem.pt, metrics.csv, curves.png, samples.png, grids/epoch-*.png and config.json.
"""

from __future__ import annotations

import argparse

import cli


def build_parser():
    """Return the parser of this script's command line."""
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_model_flags(parser)
    group = cli.add_optimisation_flags(parser)
    start = group.add_mutually_exclusive_group()
    cli.add_classifier_flag(start)
    start.add_argument("--from-scratch", action="store_true", help="start from random weights instead of a classifier")
    group.add_argument("--pretrain-epochs", type=cli.positive_int, help="epochs of the classifier, where it is trained first")
    group = parser.add_argument_group("loss")
    group.add_argument(
        "--p-y-given-x-weight", type=cli.non_negative, default=1.0, help="weight of log p(y|x), the cross-entropy"
    )
    group.add_argument("--p-x-weight", type=cli.non_negative, help="weight of log p(x), the marginal density")
    group.add_argument(
        "--p-xy-weight", type=cli.non_negative, default=0.0,
        help="weight of log p(x, y), with class-conditional chains; above 0 it takes the place of --p-x-weight",
    )  # fmt: skip
    group.add_argument("--energy-reg", type=cli.non_negative, help="weight of the regulariser mean E^2 over data and chains")
    group.add_argument(
        "--clean-share", type=cli.fraction,
        help="share of the cross-entropy on images as they are, the rest being on the augmented ones",
    )  # fmt: skip
    group.add_argument(
        "--adversarial-eps", type=cli.fraction,
        help="adversarial training: augmented images after one attack step inside this L-inf radius, pixels on [0, 1]; 0: not",
    )  # fmt: skip
    group.add_argument("--attack-share", type=cli.fraction, help="share of the augmented images that are attacked")
    group = parser.add_argument_group("SGLD")
    group.add_argument("--chain-batch-size", type=cli.positive_int, help="chains that are drawn and run in an iteration")
    group.add_argument("--steps", type=cli.positive_int, help="Langevin steps of each chain in an iteration")
    group.add_argument(
        "--first-steps", type=cli.count,
        help="Langevin steps of each chain in the first iteration, from which they go evenly to --steps; 0, and where --steps "
        "is given without it: --steps throughout",
    )  # fmt: skip
    group.add_argument("--step-size", type=cli.positive, help="multiplies the energy gradient, pixels on [-1, 1]")
    group.add_argument(
        "--noise-std", type=cli.non_negative, help="standard deviation of the noise of a step, pixels on [-1, 1]"
    )
    group.add_argument(
        "--noise-first", action=argparse.BooleanOptionalAction,
        help="add a step's noise before its gradient, so that chains are seen at their cleanest",
    )  # fmt: skip
    group.add_argument("--pixel-grad-clip", type=cli.non_negative, help="clip each pixel's energy gradient to this; 0: not")
    group.add_argument(
        "--clamp", type=cli.non_negative, help="clamp the chains' pixels, and the data's, to [-CLAMP, CLAMP]; 0: not"
    )
    cli.add_speed_flags(group)
    group = parser.add_argument_group("replay buffer")
    group.add_argument("--buffer-size", type=cli.positive_int, help="persistent chains")
    group.add_argument("--reinit-prob", type=cli.fraction, help="probability that a drawn chain is restarted")
    group.add_argument(
        "--long-chains",
        type=cli.count,
        help="chains of the buffer that never restart, so that some grow thousands of steps old",
    )
    group.add_argument(
        "--long-share", type=cli.fraction, help="share of each batch of chains that is drawn from the long chains"
    )
    group.add_argument(
        "--restart", choices=("uniform", "gaussian"), default="gaussian",
        help="where chains start: uniform noise, or Gaussians fitted to the training images of each class",
    )  # fmt: skip
    group.add_argument(
        "--restart-parts", type=cli.positive_int, help="Gaussians of each class, fitted to clusters of its training images"
    )  # fmt: skip
    group.add_argument("--restart-rank", type=cli.positive_int, help="principal directions of each Gaussian")
    group = cli.add_run_flags(parser)
    cli.add_rerun_flags(group)
    group.add_argument(
        "--max-rollbacks", type=cli.count, default=4,
        help="how often a training that diverges is taken back to a healthy state, with other noise, a lower lr, then more "
        "steps, then a stronger regulariser, before it is given up",
    )  # fmt: skip
    group.add_argument(
        "--no-guard", action="store_true", help="do not look for divergence: only what is not finite ends a training"
    )
    group.add_argument("--log-every", type=cli.positive_int, default=50, help="iterations between two rows of metrics.csv")
    group.add_argument(
        "--grid-every", type=cli.positive_int, default=1, help="epochs between two sample grids after the first epoch"
    )
    return parser


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    if args.p_xy_weight and args.p_x_weight:
        if "p_x_weight" in args.given:
            parser.error("--p-x-weight and --p-xy-weight cannot both be above 0: log p(x, y) contains log p(x)")
        args.p_x_weight = 0.0
    if not args.p_x_weight and not args.p_xy_weight:
        parser.error("without --p-x-weight or --p-xy-weight there is no density to train: use train_classifier.py")
    if "pretrain_epochs" in args.given and (args.from_scratch or args.classifier):
        parser.error("--pretrain-epochs has no use with --classifier or --from-scratch, which train no classifier")
    if "steps" in args.given and "first_steps" not in args.given:
        args.first_steps = 0
    if args.no_guard:
        args.max_rollbacks = 0
    try:
        check_draws(args, args.chain_batch_size)
    except cli.UserError as error:
        parser.error(str(error))
    return args


def check_draws(args, drawn, ranks=1):
    """Raise UserError where a rank's share of the replay buffer has fewer chains than it draws in an iteration."""
    long_chains, ordinary = args.long_chains // ranks, (args.buffer_size - args.long_chains) // ranks
    long = round(args.long_share * drawn)
    if long > long_chains or drawn - long > ordinary:
        raise cli.UserError(
            f"each iteration draws {long} long chains and {drawn - long} others, of {long_chains} and "
            f"{ordinary}{' on each process' * (ranks > 1)}: "
            "change --chain-batch-size, --long-chains, --long-share or --buffer-size"
        )


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import shlex
from argparse import Namespace
from collections import deque
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import data
import parallel
import plots
import restarts
import runs
import train_classifier
from attacks import single_step
from cli import UserError
from guard import Guard, largest_gap, roll_back, snapshot
from models import energy, joint_energy, predict
from sgld import run_chains
from training import Training

OUTPUTS = ("jem.pt", "samples.png", "grids", "curves.png", "metrics.csv", "config.json")
GRID_CHAINS = 64
PRETRAINING_SHARE = 0.2  # of --max-minutes, at most


class ReplayBuffer:
    """Persistent chains (Tieleman 2008; arXiv 1912.03263, algorithm 1): a chain is drawn, moved on, and put back.

    size: number of chains. restart: restart distribution, see restarts.py. reinit_prob: probability that a drawn chain
    is restarted, 0..1. long_chains: the last so many slots never restart; long_share: the share of each draw that comes
    from them, 0..1, so that a few chains grow old and training sees where thousands of steps lead. device, generator:
    where the chains live and what they are drawn with.

    images: (size, C, H, W) float, or of whatever shape the restart distribution draws; one tensor on the device.
    labels: (size,) int64, the class that a chain was started from, and that class-conditional chains keep.
    ages: (size,) int64, Langevin steps since the restart.

    >>> buffer = ReplayBuffer(100, restarts.UniformRestart((1, 8, 8), num_classes=10), reinit_prob=0.05)
    >>> slots, images, labels = buffer.draw(16)
    >>> buffer.put(slots, run_chains(lambda x: x.square().sum((1, 2, 3)), images, 20, 0.1, 0.01), steps=20)
    >>> int((buffer.ages == 20).sum())
    16
    """

    def __init__(self, size, restart, reinit_prob, device="cpu", generator=None, long_chains=0, long_share=0.0):
        self.restart, self.reinit_prob = restart, reinit_prob
        self.long_chains, self.long_share = long_chains, long_share
        self.labels = restart.labels(torch.arange(size, device=device))
        self.images = restart.draw(self.labels, generator)
        self.ages = torch.zeros(size, dtype=torch.int64, device=device)

    def __len__(self):
        return len(self.labels)

    def draw(self, count, generator=None):
        """Draw `count` different chains: returns slots (N,), images (N, C, H, W), labels (N,).

        A chain restarts with probability reinit_prob, in its class's restart distribution, but for the long chains.
        Raises ValueError where more chains of either kind are asked for than there are.
        """
        device, ordinary = self.images.device, len(self) - self.long_chains
        long = round(self.long_share * count)
        if count - long > ordinary or long > self.long_chains:
            raise ValueError(f"{count - long} + {long} chains were asked of a replay buffer of {ordinary} + {self.long_chains}")
        slots = torch.randperm(ordinary, device=device, generator=generator)[: count - long]
        if long:
            slots = torch.cat([slots, ordinary + torch.randperm(self.long_chains, device=device, generator=generator)[:long]])
        labels, images = self.labels[slots], self.images[slots]
        restarted = torch.rand(count, device=device, generator=generator) < self.reinit_prob
        restarted &= slots < ordinary
        one_each = restarted.view(-1, *[1] * (images.dim() - 1))
        images = torch.where(one_each, self.restart.draw(labels, generator, restarted), images)
        self.ages[slots] = self.ages[slots].masked_fill(restarted, 0)
        return slots, images, labels

    def put(self, slots, images, steps):
        """Write chains back to the slots that they were drawn from, `steps` Langevin steps older."""
        self.images[slots] = images
        self.ages[slots] += steps

    def restart_broken(self, generator=None):
        """Restart the chains that are not finite."""
        broken = ~torch.isfinite(self.images).flatten(1).all(1)
        if broken.any():
            self.images[broken] = self.restart.draw(self.labels[broken], generator)
            self.ages[broken] = 0

    def keep_share(self, rank, ranks):
        """Keep one rank's share of the chains and give up the others': a part of the ordinary and a part of the long ones."""
        slots = torch.arange(len(self), device=self.images.device)
        ordinary, long = (kind.tensor_split(ranks)[rank] for kind in slots.tensor_split([len(self) - self.long_chains]))
        self.long_chains = len(long)
        self.load_state_dict({name: value[torch.cat([ordinary, long])] for name, value in self.state_dict().items()})

    def whole_state(self):
        """Return the state_dict of the buffer that the ranks' shares are, on rank 0; see parallel.py."""
        shares = parallel.gathered_at_first((self.long_chains, self.state_dict()))
        parts = [[(state, slice(len(state["labels"]) - long)) for long, state in shares]]
        parts += [[(state, slice(len(state["labels"]) - long, None)) for long, state in shares]]
        return {name: torch.cat([state[name][part] for kind in parts for state, part in kind]) for name in self.state_dict()}

    def state_dict(self):
        """Return the chains, labels and ages."""
        return {"images": self.images, "labels": self.labels, "ages": self.ages}

    def load_state_dict(self, state):
        """Take up a state_dict of any size, on this buffer's device."""
        device = self.images.device
        self.images, self.labels, self.ages = (state[name].to(device).clone() for name in ("images", "labels", "ages"))


def energy_loss(energy_positive, energy_negative):
    """Return mean E(data) - mean E(chains), whose gradient is that of -log p (arXiv 1912.03263, equation 2).

    Both (N,) float. Descending it lowers the energy of data and raises that of the chains.

    >>> energy_loss(torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 1.0]))
    tensor(-3.)
    """
    return energy_positive.mean() - energy_negative.mean()


def energy_regulariser(energy_positive, energy_negative):
    """Return mean E(data)^2 + mean E(chains)^2, which keeps the level of E near 0 (arXiv 1903.08689, section 4).

    >>> energy_regulariser(torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 1.0]))
    tensor(6.)
    """
    return energy_positive.square().mean() + energy_negative.square().mean()


def sgld_settings(args):
    """Return the keyword arguments of sgld.run_chains that the flags ask for."""
    return {
        "step_size": args.step_size,
        "noise_std": args.noise_std,
        "noise_first": args.noise_first,
        "pixel_grad_clip": args.pixel_grad_clip or None,
        "clamp": (-args.clamp, args.clamp) if args.clamp else None,
    }


def steps_now(args, progress):
    """Return the Langevin steps of an iteration: from --first-steps evenly to --steps as progress (0..1) reaches 1."""
    first = args.first_steps or args.steps
    return round(first + progress * (args.steps - first))


def attacked(run, images, labels):
    """Return images (N, C, H, W), the first --attack-share of them after one step up the cross-entropy, L-inf."""
    count = round(run.args.attack_share * len(images)) if run.args.adversarial_eps else 0
    if not count:
        return images

    settings = {"generator": run.generator, "module": run.model}
    moved = single_step(run.logits, images[:count], labels[:count], "linf", run.args.adversarial_eps, **settings)
    return torch.cat([moved, images[count:]])


def iterate(run, buffer, images, labels):
    """Do one iteration of algorithm 1 of arXiv 1912.03263 on a batch: draw, run and put back chains; descend the loss.

    run: training.Training. buffer: ReplayBuffer. images: (N, C, H, W) float, pixels in [-1, 1]; labels: (N,) int64.
    """
    steps = steps_now(run.settings, run.done)
    key = (steps, run.rollbacks, buffer.images.data_ptr())  # after a rollback settings and the buffer's memory are others
    run.update(run.replayed(key, partial(gradients, run, buffer, steps), images, labels))


def gradients(run, buffer, steps, images, labels):
    """Do all of an iteration but the update of the weights, whose gradients it leaves with them.

    steps: Langevin steps of the chains; the rest: as in `iterate`. Nothing here waits for a GPU, so that it can be captured.
    Returns what is to be logged, {name: scalar tensor}.
    """
    args, generator, conditional = run.settings, run.generator, run.args.p_xy_weight > 0

    slots, starts, chain_labels = buffer.draw(args.chain_batch_size // parallel.ranks(), generator)
    chains = run_chains(
        run.energy_of, starts, steps, **sgld_settings(args),
        labels=chain_labels if conditional else None, module=run.model, generator=generator, graphs=run.graphs,
        # on a GPU the row of metrics.csv finds it, without a wait in each iteration; on several ranks then all find it
        check=run.device.type == "cpu" and parallel.ranks() == 1,
    )  # fmt: skip
    buffer.put(slots, chains, steps)

    positives = run.noisy(images)
    if args.clamp:
        positives = positives.clamp(-args.clamp, args.clamp)  # the data lie where the chains can go
    parts = [positives, chains]
    if args.clean_share < 1:
        parts.append(attacked(run, run.augmented(images), labels))
    batch, sizes = torch.cat(parts), [len(part) for part in parts]

    def objective():
        logits, chain_logits, *hard_logits = run.logits(batch, run.wrapped).split(sizes)
        energy_positive, energy_negative = energy(logits), energy(chain_logits)

        cross = args.clean_share * cross_entropy(logits, labels)
        if args.clean_share < 1:
            cross = cross + (1 - args.clean_share) * cross_entropy(hard_logits[0], labels)
        loss = args.p_y_given_x_weight * cross
        loss = loss + args.p_x_weight * energy_loss(energy_positive, energy_negative)
        if conditional:
            positive, negative = joint_energy(logits, labels), joint_energy(chain_logits, chain_labels)
            loss = loss + args.p_xy_weight * energy_loss(positive, negative)
        loss = loss + args.energy_reg * energy_regulariser(energy_positive, energy_negative)

        return loss, {
            "cross_entropy": cross,
            "accuracy": (logits.argmax(1) == labels).float().mean(),
            "energy_positive": energy_positive.mean(),
            "energy_negative": energy_negative.mean(),
            "energy_gap": energy_negative.mean() - energy_positive.mean(),
            "chain_displacement": (chains - starts).flatten(1).norm(dim=1).mean(),
            "chain_saturated": (chains.abs() >= 1).float().mean(),
            "chain_age": buffer.ages.float().mean(),
        }

    return run.gradients(objective)


def train(args, dataset, folder, device, classifier=None, resumed=None):
    """Train a JEM and return its checkpoint, the dict that then lies in folder/jem.pt.

    args: parsed flags. dataset: data.Dataset. folder: pathlib.Path. classifier: the state_dict to start from, or None
    for random weights. resumed: the checkpoint of a stopped run, to go on from.
    Raises FloatingPointError, naming iteration and term, where the training diverges once more than --max-rollbacks.
    """
    run = Training(args, dataset, folder, "jem", device, weights=classifier, resumed=resumed, max_minutes=args.max_minutes)
    buffer = ReplayBuffer(
        args.buffer_size, restarts.from_flags(args, dataset, device), args.reinit_prob, device,
        torch.Generator(device).manual_seed(args.seed + 1), args.long_chains, args.long_share,
    )  # fmt: skip
    checkpoint = resumed
    if resumed:
        buffer.load_state_dict(resumed["buffer"])
    else:
        for old in folder.glob("grids/epoch-*.png") if parallel.first() else ():
            old.unlink()  # of a run that is being overwritten
    buffer.keep_share(parallel.rank(), parallel.ranks())
    if not resumed:
        save_grids(run, buffer)

    guard = Guard()
    if resumed:
        guard.load_state_dict(resumed["guard"])
    healthy = deque([snapshot(run, buffer, guard)], maxlen=3)
    for images, labels in run.batches():
        try:
            iterate(run, buffer, images, labels)
            row = None
            if run.epoch_ends():
                val_loss, val_accuracy = train_classifier.evaluate(run.averaged, dataset.val)
                row = run.write_row(val_cross_entropy=val_loss, val_accuracy=val_accuracy)
            elif run.step % args.log_every == 0:
                row = run.write_row()
            if row and not args.no_guard and guard.judge(row, largest_gap(run.settings)):
                healthy.append(snapshot(run, buffer, guard))
        except ArithmeticError as error:
            roll_back(run, buffer, guard, healthy, error)
            continue
        due = run.save_is_due()
        if due:
            checkpoint = make_checkpoint(run, buffer, guard)
            run.save(checkpoint)
        if run.step == run.epoch_steps // 2 or run.done >= 1 or run.step % (args.grid_every * run.epoch_steps) == 0:
            save_grids(run, buffer)
        elif due and parallel.first():
            plots.save_grid(buffer.images[:GRID_CHAINS], folder / "samples.png")
    if not (checkpoint and checkpoint["finished"]):  # the budget of minutes ended in a rollback
        checkpoint = make_checkpoint(run, buffer, guard)
        run.save(checkpoint)
    return checkpoint


def make_checkpoint(run, buffer, guard):
    """Return all that sample.py, evaluate.py and a resumed run need: plain types, tensors and state dicts."""
    return {
        "model_config": run.model_config,
        "model": run.averaged_weights(),
        "dataset": run.dataset.name,
        "sgld": {"steps": run.args.steps, **sgld_settings(run.args)},
        "restart": buffer.restart.state_dict(),
        "buffer": buffer.whole_state(),
        "conditional": run.args.p_xy_weight > 0,
        "args": runs.plain_arguments(run.args),
        "finished": run.done >= 1,
        "training": run.state_dict(),
        "guard": guard.state_dict(),
    }


def save_grids(run, buffer):
    """Write the chains of the same first slots as samples.png and as the numbered grid of this moment."""
    if not parallel.first():
        return
    grids = run.folder / "grids"
    grids.mkdir(exist_ok=True)
    for path in (run.folder / "samples.png", grids / f"epoch-{run.step / run.epoch_steps:05.1f}.png"):
        plots.save_grid(buffer.images[:GRID_CHAINS], path)
    if run.board:
        run.board.add_images("buffer", data.to_unit(buffer.images[:GRID_CHAINS]), run.step)
        run.board.add_histogram("chain age [steps]", buffer.ages, run.step)
        for name, images in (("validation images", run.dataset.val.images), ("chains", buffer.images)):
            run.board.add_histogram(f"energy of {name}", energy(predict(run.averaged, images[:1000])), run.step)


def starting_weights(args, dataset, folder, device):
    """Return the classifier's state_dict that the JEM starts from, or None with --from-scratch.

    It comes from --classifier, else from classifier.pt in the run's folder, which is trained where it is missing or
    unfinished. Raises UserError where that classifier has another architecture or data set.
    """
    if args.from_scratch:
        print("starting from random weights", flush=True)
        return None
    path = Path(args.classifier or folder / "classifier.pt")
    checkpoint = runs.load_for_all(path, "classifier", optional=not args.classifier)
    if checkpoint is None or not (checkpoint["finished"] or args.classifier):
        print(f"no finished classifier in {folder}: training one first", flush=True)
        pretraining = Namespace(**{**vars(args), "epochs": args.pretrain_epochs})
        budget = args.max_minutes and args.max_minutes * PRETRAINING_SHARE
        checkpoint = train_classifier.train(pretraining, dataset, folder, device, checkpoint, budget)
    else:
        print(f"starting from the classifier {path}", flush=True)
    wanted = runs.model_config_from(args, dataset)
    if checkpoint["model_config"] != wanted or checkpoint["dataset"] != dataset.name:
        raise UserError(
            f"the classifier {str(path)!r} was trained on {checkpoint['dataset']} with {checkpoint['model_config']}, and this "
            f"run is for {dataset.name} with {wanted}: give the same --arch, --width and --depth, or another --classifier"
        )
    return checkpoint["model"]


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    device = runs.pick_device(args.device)
    with parallel.group(device), runs.run_folder(args) as folder:
        resumed = runs.open_checkpoint(folder / "jem.pt", args)
        check_draws(args, parallel.share(args.chain_batch_size, "--chain-batch-size"), parallel.ranks())
        with parallel.first_on_each_node():
            dataset = data.load(args.dataset, args.data_dir, args.image_size)
        print(cli.describe_settings(args), flush=True)
        classifier = None if resumed else starting_weights(args, dataset, folder, device)
        checkpoint = train(args, dataset, folder, device, classifier, resumed)
        _, accuracy = train_classifier.evaluate(runs.load_model(checkpoint, device), dataset.test)
        runs.report_files(args, [folder / name for name in OUTPUTS])
        print(f"test accuracy: {100 * accuracy:.2f} %")
        if not args.dry_run:
            path = shlex.quote(str(folder / "jem.pt"))
            print(f"next: python sample.py --checkpoint {path}\n      python evaluate.py --checkpoint {path} --quick")


if __name__ == "__main__":
    main()
