"""What the two training scripts share: order of the data, budget, learning-rate schedule, weight update, logging."""

from __future__ import annotations

import copy
import math
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import cli
import fast
import parallel
import plots
import runs
from cli import Stopped, UserError
from data import augment
from guard import remedied
from models import build_model
from sgld import add_noise

OPTIMISERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **rest: torch.optim.SGD(parameters, momentum=0.9, **rest),
}
DRY_RUN_STEPS = 3
SECONDS_BETWEEN_CURVES = 20  # drawing takes half a second


def epoch_order(count, seed, epoch):
    """Return the order of `count` training images in an epoch, a function of the seed and the epoch's number alone."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def learning_rate(args, step, progress):
    """Return the learning rate of an iteration.

    args.lr, times a linear rise over the first args.warmup_steps iterations, times a half cosine that falls from 1 to
    args.lr_floor as progress (0..1) reaches 1.
    """
    rise = min(1.0, (step + 1) / max(args.warmup_steps, 1))
    course = 0.5 * (1 + math.cos(math.pi * progress))
    return args.lr * rise * (args.lr_floor + (1 - args.lr_floor) * course)


class MovingAverage:
    """Exponential moving average of a network's weights that begins short, so that the first weights weigh little.

    The first update copies the weights. After n of them the decay is the smaller of `decay` and (1 + n) / (10 + n): a short
    training's average is over its last tenth. The count stays on the host, where torch's AveragedModel keeps it on a GPU and
    waits for it at every update.

    module: the network with the averaged weights.
    """

    def __init__(self, model, decay):
        self.module, self.decay, self.count = copy.deepcopy(model), decay, 0

    def update(self, model):
        """Take in the weights that a network has now."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        get_ema_multi_avg_fn(decay)(list(self.module.parameters()), list(model.parameters()), self.count)
        self.count += 1

    def state_dict(self):
        """Return count and weights, under the names that AveragedModel gives them."""
        weights = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(self.count), **weights}

    def load_state_dict(self, state):
        """Take up a state_dict."""
        self.count = int(state["n_averaged"])
        weights = {name.removeprefix("module."): value for name, value in state.items() if name != "n_averaged"}
        self.module.load_state_dict(weights)


@contextmanager
def climbed(parameters, rho):
    """Move weights along their gradients, by an L2 norm of rho over all of them, and back at the end of the block."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    before = [parameter.detach().clone() for parameter in parameters]
    norm = torch.stack([parameter.grad.norm() for parameter in parameters]).norm()
    with torch.no_grad():
        for parameter in parameters:
            parameter += parameter.grad * (rho / (norm + 1e-12))
    yield
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


class Training:
    """The state of one training, resumable at any iteration, and the parts of its loop that are no equations.

    args: parsed flags. dataset: data.Dataset. folder: pathlib.Path of the run. phase: "classifier" or "jem".
    weights: state_dict that the network starts from, or None for fresh weights. resumed: the checkpoint to go on
    from, or None. max_minutes: the wall-clock budget, counted from the script's start, or None.

    model: the network that is trained. averaged: the one whose weights are kept, an exponential moving average of the
    trained one's, or that one itself where args.ema_decay is 0. energy_of: the trained network's energy, for
    sgld.run_chains. iterations, graphs: what --cuda-graph asks for, CUDA graphs of whole iterations or, on several ranks,
    whose gradients meet, of the chains; or None.
    generator: torch.Generator on the device, the source of every random draw but the first weights and the order of the
    data. Of several ranks (see parallel.py) each has its own generator and takes an equal share of every batch.
    Raises UserError for flags that do not fit the data.
    """

    def __init__(self, args, dataset, folder, phase, device, *, weights=None, resumed=None, max_minutes=None):
        self.args, self.folder, self.phase, self.device = args, folder, phase, device
        self.dataset, self.train_split = dataset, dataset.train.to(device)
        self.epoch_steps = len(dataset.train.labels) // args.batch_size
        if not self.epoch_steps:
            raise UserError(f"--batch-size {args.batch_size} exceeds the {len(dataset.train.labels)} training images: lower it")
        self.share = parallel.share(args.batch_size, "--batch-size")
        self.precision = runs.pick_precision(args.precision, device)
        self.model_config = runs.model_config_from(args, dataset)
        torch.manual_seed(args.seed)
        self.model = build_model(**self.model_config).to(device)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.wrapped = parallel.wrapped(self.model, device)
        self.energy_of = runs.chain_energy(self.model, device, self.precision)
        self.graphs = self.iterations = None
        if phase == "jem":  # the classifier's training runs no chains
            self.energy_of, self.graphs = fast.from_flags(args, self.energy_of, self.model, device)
        if self.graphs and parallel.ranks() == 1:
            self.graphs, self.iterations = None, self.graphs  # of whole iterations, the chains in them among the rest
        in_one = {"fused": True} if device.type == "cuda" else {}  # one launch instead of twenty
        self.optimizer = OPTIMISERS[args.optimizer](
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, **in_one
        )
        self.ema = MovingAverage(self.model, args.ema_decay) if args.ema_decay else None
        self.seed = parallel.nth_seed(args.seed, parallel.rank())
        self.generator = torch.Generator(device).manual_seed(self.seed)
        self.step, self.minutes_before, self.max_minutes = 0, 0.0, max_minutes
        self.stop_signal = self.stopping = 0  # the number of a signal that waits for the next update; that ends the run
        self.steps = args.epochs and args.epochs * self.epoch_steps
        if args.dry_run:
            self.steps = DRY_RUN_STEPS
        self.rollbacks, self.done = 0, 0.0
        self.board = runs.open_board(args, folder) if parallel.first() else None
        self.log = runs.MetricsLog(folder / "metrics.csv", phase, resumed["training"]["step"] if resumed else None)
        if resumed:
            self.load_state_dict(resumed["training"])
        self.began = self.drawn = self.saved = time.perf_counter()
        if parallel.first():
            resolved = {"device": str(device), "precision": self.precision, "processes": parallel.ranks()}
            runs.write_config(folder, phase, args, model_config=self.model_config, **resolved)

    def roll_back(self, state, rollbacks):
        """Return to a state of this run, with the clock where it is, other noise, and the rows after that state gone."""
        minutes_before = self.minutes_before
        self.log = runs.MetricsLog(self.log.path, self.phase, resumed_at=state["step"])
        self.load_state_dict(state)
        self.minutes_before, self.rollbacks = minutes_before, rollbacks
        self.generator.manual_seed(self.seed + 1_000_000 * rollbacks)
        self._agree()

    @property
    def settings(self):
        """The flags that hold now: args, with what the rollbacks changed."""
        return remedied(self.args, self.rollbacks) if self.rollbacks else self.args

    @property
    def averaged(self):
        """The network with the weights that are kept."""
        return self.ema.module if self.ema else self.model

    def averaged_weights(self):
        """Return a copy of the weights that are kept."""
        return {name: value.clone() for name, value in self.averaged.state_dict().items()}

    def minutes(self):
        """Return the wall-clock minutes of the run: since the script's start, and before the last resumption."""
        return self.minutes_before + (time.perf_counter() - cli.START) / 60

    def progress(self):
        """Return the share of the run that is done here, 0..1: of the iterations or of the minutes, whichever is larger."""
        shares = [self.step / self.steps] if self.steps else []
        if self.max_minutes:
            shares.append(self.minutes() / self.max_minutes)
        return min(max(shares), 1.0)

    def batches(self):
        """Yield (images, labels) for each iteration until the budget is spent, for one at least.

        Each iteration's body calls `update` once; the last, incomplete batch of an epoch is left out.
        """
        hidden = None if parallel.first() else True  # None: where stderr is no terminal
        bar = tqdm(total=self.steps, initial=self.step, desc=self.phase, unit="it", disable=hidden)
        self._agree()
        self.bar, order_epoch = bar, None
        with self._signals_wait(), bar:
            while self.done < 1 or not self.step:
                self.began = time.perf_counter()
                epoch, position = divmod(self.step, self.epoch_steps)
                if epoch != order_epoch:
                    order, order_epoch = epoch_order(len(self.train_split.labels), self.args.seed, epoch).to(self.device), epoch
                begin = position * self.args.batch_size + parallel.rank() * self.share
                chosen = order[begin : begin + self.share]
                yield self.train_split.images[chosen], self.train_split.labels[chosen]
                bar.update()
                if self.stopping and self.done < 1:
                    raise Stopped(f"stopped at iteration {self.step} and saved; {self._how_to_go_on()}", int(self.stopping))

    def _agree(self):
        """Settle, for all ranks alike, how much of the run is done, which signal ends it, and how long ago it was saved."""
        since_save = time.perf_counter() - self.saved
        self.done, self.stopping, self.since_save = parallel.largest(self.progress(), self.stop_signal, since_save)

    @contextmanager
    def _signals_wait(self):
        """Let the first SIGINT or SIGTERM wait for the end of the iteration, where the run is saved; a second one kills."""

        def note(number, frame):
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = number

        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _how_to_go_on(self):
        """Return the words that tell a user how to continue a stopped run."""
        if self.phase == "classifier" and hasattr(self.args, "pretrain_epochs"):
            return "the same command again goes on with it"
        return f"go on with: python train_{self.phase}.py --resume --out-dir {shlex.quote(str(self.folder))}"

    def noisy(self, images):
        """Return images with the input noise."""
        return add_noise(images, self.args.input_noise, self.generator)

    def augmented(self, images):
        """Return images as the cross-entropy is to see them: augmented, with the input noise."""
        args = self.args
        if args.augment or args.flip_prob:
            images = augment(images, args.augment, self.generator, args.flip_prob)
        return self.noisy(images)

    def logits(self, x, module=None):
        """Return the network's logits (N, K) float32 of x (N, C, H, W), in the arithmetic of the run.

        module: `wrapped` for the logits of the loss, once an iteration; the network itself, for all else.
        """
        with runs.autocast(self.device, self.precision):
            return (module or self.model)(x).float()

    def gradients(self, objective):
        """Give the weights their gradients, and return what is to be logged: {name: scalar tensor}, COLUMNS's names.

        objective: a function that computes the loss and returns it with that dict. With --sam-rho it is called twice, and the
        gradient is the one found at the second place (Foret et al., arXiv 2010.01412, equation 3), the dict the first.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss, values = objective()
        loss.backward()
        if self.args.sam_rho:
            with climbed(self.model.parameters(), self.args.sam_rho):
                self.optimizer.zero_grad(set_to_none=True)
                objective()[0].backward()
        if self.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        return {name: value.detach() for name, value in values.items()}

    def replayed(self, key, work, images, labels):
        """Return work(images, labels), which ends in `gradients`, from a CUDA graph where --cuda-graph asks for it.

        key: hashable, of all that work depends on besides images, labels, generator and weights.
        """
        if self.iterations is None:
            return work(images, labels)

        def whole(images, labels):
            return work(images, labels), [parameter.grad for parameter in self.model.parameters()]

        values, found = self.iterations.run(key, whole, (images, labels), self.generator)
        for parameter, gradient in zip(self.model.parameters(), found, strict=True):
            parameter.grad = gradient
        return values

    def update(self, values):
        """Take one optimiser step along the weights' gradients, average the weights, and log the values."""
        self.lr = learning_rate(self.settings, self.step, self.done)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model)
        self.log.add(time.perf_counter() - self.began, **values)
        self.step += 1
        self._agree()

    def epoch_ends(self):
        """Tell whether the last update ended an epoch or the run."""
        return self.step % self.epoch_steps == 0 or self.done >= 1

    def save_is_due(self):
        """Tell whether a checkpoint is to be written: an epoch ends, the time or the steps have come, or a signal has."""
        by_steps = self.args.save_steps and self.step % self.args.save_steps == 0
        by_time = self.since_save > 60 * self.args.save_minutes
        return bool(self.epoch_ends() or by_steps or by_time or self.stopping)

    def write_row(self, **values):
        """Write a row of metrics.csv, show its most telling numbers, and return it."""
        values["rollbacks"] = self.rollbacks
        row = self.log.write(self.step, self.step / self.epoch_steps, self.minutes(), self.lr, **values)
        shown = ("epoch", "energy_gap", "accuracy", "val_accuracy")
        text = ", ".join(
            f"{name} {row[name]:.3g}" if name == "energy_gap" else f"{name} {row[name]:.4g}" for name in shown if name in row
        )
        if self.max_minutes:
            text += f", {max(self.max_minutes - self.minutes(), 0):.1f} min left"
        self.bar.set_postfix_str(text)
        for name, value in row.items() if self.board else ():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{self.phase}/{name}", value, self.step)
        if not sys.stderr.isatty() and "val_accuracy" in row:
            print(f"{self.phase}: minute {row['minutes']:.1f}, {text}", flush=True)
        return row

    def save(self, checkpoint):
        """Write the phase's checkpoint, and the curves: at the end, and before it no more often than they are looked at."""
        self.saved = time.perf_counter()
        if not parallel.first():
            return
        runs.save_checkpoint(self.folder / f"{self.phase}.pt", self.phase, **checkpoint)
        if self.done >= 1:
            runs.remove_older(self.folder / f"{self.phase}.pt")
        if self.done >= 1 or time.perf_counter() - self.drawn > SECONDS_BETWEEN_CURVES:
            plots.save_curves(runs.read_metrics(self.folder / "metrics.csv"), self.folder / "curves.png")
            self.drawn = time.perf_counter()

    def state_dict(self):
        """Return everything that a resumed run needs, as plain types and tensors."""
        return {
            "step": self.step,
            "minutes": self.minutes(),
            "rollbacks": self.rollbacks,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "generator": torch.stack(parallel.gathered(self.generator.get_state())),  # a row for each rank
            "log": self.log.state_dict(),
        }

    def load_state_dict(self, state):
        """Take up the state of a run of the same settings."""
        self.step, self.minutes_before, self.rollbacks = state["step"], state["minutes"], state["rollbacks"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        states = state["generator"].cpu().reshape(-1, len(self.generator.get_state()))
        if parallel.rank() < len(states):
            self.generator.set_state(states[parallel.rank()].clone())  # torch crashes on part of a larger tensor
        else:  # the run was on fewer processes
            self.generator.manual_seed(self.seed + self.step)
        self.log.load_state_dict(state["log"])
