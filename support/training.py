"""What the two training scripts share: the state of a training and the parts of its loop."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgld_nrg.models import build_model, energy_of, logits_of
from sgld_nrg.sgld import run_chains
from sgld_nrg.support import fast
from sgld_nrg.support.batch_norm import add_batch_norm, folded
from sgld_nrg.support.checkpoints import Checkpoint, open_checkpoint, training_folder
from sgld_nrg.support.commands import check_draws, describe_settings
from sgld_nrg.support.data import Dataset, load
from sgld_nrg.support.devices import pick_device, pick_precision
from sgld_nrg.support.errors import Stopped, UserError
from sgld_nrg.support.guard import remedied
from sgld_nrg.support.images import reading_from
from sgld_nrg.support.journal import Journal
from sgld_nrg.support.origin import check_same_data, data_dir_of
from sgld_nrg.support.parallel import Alone, nth_seed, processes
from sgld_nrg.support.schedule import Budget, MovingAverage, epoch_order, learning_rate
from sgld_nrg.support.signals import Signals

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, **rest: torch.optim.SGD(parameters, momentum=0.9, **rest),
}
DRY_RUN_ITERATIONS = 3


class Setup(NamedTuple):
    """Where a training takes place: its data, folder, device, and the processes that share it."""

    dataset: Dataset
    folder: Path
    device: torch.device
    ranks: Alone


@contextmanager
def set_up(args: Namespace, phase: str) -> Iterator[tuple[Setup, Checkpoint | None]]:
    """Yield a training script's setup, and the checkpoint that it goes on from or None.

    phase: "classifier" or "jem". Prints the settings. Raises UserError for flags that do not fit
    the machine, the folder or the data.
    """
    device = pick_device(args.device)
    with processes(device) as ranks, training_folder(args, ranks) as folder:
        resumed = open_checkpoint(folder / f"{phase}.pt", args, ranks)
        if phase == "jem":
            drawn = ranks.share(args.chain_batch_size, "--chain-batch-size")
            check_draws(args, drawn, ranks.count)
        if resumed and "data_dir" not in args.given:
            args.data_dir = data_dir_of(resumed, None)
        with ranks.first_on_each_node():
            dataset = load(args.dataset, args.data_dir, args.image_size, reading_from(args))
        if resumed:
            check_same_data(resumed, dataset, args, "the run")
        print(describe_settings(args), flush=True)
        yield Setup(dataset, folder, device, ranks), resumed


def model_config_from(args: Namespace, dataset: Dataset) -> dict[str, Any]:
    """Return the model_config for a data set. Raises UserError for a shape that no network has."""
    channels, size, _ = dataset.shape
    if args.shift >= size:
        raise UserError(
            f"--shift {args.shift} moves images of {size} pixels out of sight: lower it"
        )
    config = {
        "arch": args.arch,
        "num_classes": dataset.num_classes,
        "channels": channels,
        "image_size": size,
        "width": args.width,
        "depth": args.depth,
        "stem_stride": args.stem_stride,
    }
    try:
        with torch.device("meta"):
            build_model(**config)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config


class Training:
    """The state of one training, resumable at any iteration, and the parts of its loop.

    args: parsed flags. phase: "classifier" or "jem". weights: the state_dict that the network
    starts from, or None for fresh weights. resumed: the checkpoint of a stopped run to go on from,
    or None. max_minutes: the wall-clock budget, counted from the script's start. Each rank has a
    generator of its own and takes an equal share of every batch.

    model: the network that is trained. averaged: the one whose weights are kept, an exponential
    moving average of the trained one's, or that one itself if args.ema_decay is 0. energy: the
    trained network's E(x), or E(x, y), for run_chains. settings: the flags in force: args, and what
    the rollbacks changed of them. generator: the source, on the device, of every random draw but
    the first weights and the order of the data.

    Nothing is written before `open`. Raises UserError for flags that do not fit the data.
    """

    def __init__(
        self,
        args: Namespace,
        setup: Setup,
        phase: str,
        *,
        weights: dict[str, Tensor] | None = None,
        resumed: Checkpoint | None = None,
        max_minutes: float | None = None,
    ):
        self.args = self.settings = args
        self.phase, (dataset, self.folder, device, self.ranks) = phase, setup
        self.dataset, self.device = dataset, device
        self.train_split = dataset.train.to(device)
        count = len(dataset.train.labels)
        self.epoch_iterations = count // args.batch_size
        if not self.epoch_iterations:
            raise UserError(
                f"--batch-size {args.batch_size} exceeds the {count} training images: lower it"
            )
        self.share = self.ranks.share(args.batch_size, "--batch-size")
        self.precision = pick_precision(args.precision, device)
        self.model_config = model_config_from(args, dataset)
        torch.manual_seed(args.seed)
        self.model = build_model(**self.model_config)
        self.normalised = phase == "classifier" and args.batch_norm
        if self.normalised:
            add_batch_norm(self.model)
        self.model.to(device)
        if weights is not None:
            self.model.load_state_dict(weights)
        self.wrapped = self.ranks.wrapped(self.model, device)
        self.energy = energy_of(self.model, self.precision)
        in_one = {"fused": True} if device.type == "cuda" else {}  # one launch instead of twenty
        self.optimizer = OPTIMISERS[args.optimizer](
            self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay, **in_one
        )
        self.ema = MovingAverage(self.model, args.ema_decay) if args.ema_decay else None
        self.seed = nth_seed(args.seed, self.ranks.rank)
        self.generator = torch.Generator(device).manual_seed(self.seed)
        length = args.epochs and args.epochs * self.epoch_iterations
        if args.dry_run:
            length = DRY_RUN_ITERATIONS
        self.budget = Budget(length, max_minutes, args.started)
        self.signals = Signals()
        self.iteration, self.rollbacks = 0, 0
        self.progress, self.stopping = 0.0, 0  # what all ranks agree on; see `_agree`
        self.graphs: fast.Graphs | None = None  # of whole iterations
        self.run_chains: fast.Chains = run_chains
        if phase == "jem":  # the classifier's training runs no chains
            self._set_up_chains()
        # elsewhere the row of metrics.csv finds what is not finite, without a wait each iteration
        self.checks_chains = device.type == "cpu" and self.ranks.count == 1
        self.journal = Journal(phase, self.ranks)
        self.lr = args.lr
        self.resumed_at = resumed["training"]["iteration"] if resumed else None
        if resumed:
            self.load_state_dict(resumed["training"])
        self.began = time.perf_counter()

    def _set_up_chains(self) -> None:
        """Choose how chains run; CUDA graphs are of whole iterations, on many ranks of chains."""
        self.run_chains = fast.chains_from(self.args, self.model)
        graphs = fast.graphs_from(self.args, self.device, self.ranks.count)
        if self.ranks.count == 1:
            self.graphs = graphs
        else:
            self.run_chains = fast.in_graphs(graphs, self.run_chains)

    def open(self, go_on: str | None = None) -> None:
        """Begin to write to the run's folder; go_on: as in `Journal.open`."""
        resolved: dict[str, Any] = {"device": str(self.device), "precision": self.precision}
        resolved |= {"processes": self.ranks.count, "model_config": self.model_config}
        self.journal.open(self.folder, self.args, self.resumed_at, go_on, **resolved)

    @property
    def averaged(self) -> nn.Module:
        """The network with the weights that are kept, without batch normalisation."""
        network = self.ema.module if self.ema else self.model
        return folded(network) if self.normalised else network

    def averaged_weights(self) -> dict[str, Tensor]:
        """Return a copy of the weights that are kept."""
        return {name: value.clone() for name, value in self.averaged.state_dict().items()}

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) for each iteration until the budget is spent, for one at least.

        Each iteration's body calls `update` once; the last, incomplete batch of an epoch is left
        out. Raises Stopped after the iteration in which a signal came.
        """
        self._agree()
        images, labels = self.train_split
        order_epoch = None
        bar = self.journal.open_bar(self.budget.iterations, self.iteration)
        with self.signals.waiting(), bar:
            while self.progress < 1 or not self.iteration:
                self.began = time.perf_counter()
                epoch, position = divmod(self.iteration, self.epoch_iterations)
                if epoch != order_epoch:
                    order = epoch_order(len(labels), self.args.seed, epoch).to(self.device)
                    order_epoch = epoch
                begin = position * self.args.batch_size + self.ranks.rank * self.share
                chosen = order[begin : begin + self.share]
                yield images[chosen], labels[chosen]
                bar.update()
                if self.stopping and self.progress < 1:
                    raise Stopped(
                        f"stopped at iteration {self.iteration} and saved; {self.journal.go_on}",
                        self.stopping,
                    )

    def _agree(self) -> None:
        """Settle for all ranks the progress, the signal to stop, the time since the last save."""
        since_save = time.perf_counter() - self.journal.saved
        mine = self.budget.progress(self.iteration), self.signals.pending, since_save
        self.progress, stopping, self.since_save = self.ranks.largest(*mine)
        self.stopping = int(stopping)

    def logits(self, x: Tensor) -> Tensor:
        """Return the network's logits (N, K) float32 of x (N, C, H, W)."""
        return logits_of(self.model, x, self.precision)

    def logits_for_loss(self, x: Tensor) -> Tensor:
        """Return logits (N, K) to compute the loss with, once an iteration: it joins all ranks."""
        return logits_of(self.wrapped, x, self.precision)

    def backward(self, loss: Tensor) -> None:
        """Give the weights the gradients of a loss, clipped to --max-grad-norm."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.args.max_grad_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)

    def replayed(
        self, key: Hashable, work: Callable, images: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        """Return work(images, labels), which calls `backward`, from a CUDA graph if there are any.

        key: all that work depends on besides images, labels, generator and weights.
        """
        if self.graphs is None:
            return work(images, labels)

        def whole(images: Tensor, labels: Tensor) -> tuple[dict, list]:
            return work(images, labels), [parameter.grad for parameter in self.model.parameters()]

        values, found = self.graphs.run(key, whole, (images, labels), self.generator)
        for parameter, gradient in zip(self.model.parameters(), found, strict=True):
            parameter.grad = gradient
        return values

    def update(self, values: dict[str, Tensor]) -> None:
        """Step along the weights' gradients, average the weights, and log the values."""
        self.lr = learning_rate(self.settings, self.iteration, self.progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model)
        self.journal.log.add(time.perf_counter() - self.began, **values)
        self.iteration += 1
        self._agree()

    def epoch_ends(self) -> bool:
        """Tell whether the last update ended an epoch or the run."""
        return self.iteration % self.epoch_iterations == 0 or self.progress >= 1

    def save_is_due(self) -> bool:
        """Tell whether to write a checkpoint: an epoch ends, it is time, or a signal came."""
        every = self.args.save_iterations
        by_count = every and self.iteration % every == 0
        by_time = self.since_save > 60 * self.args.save_minutes
        return bool(self.epoch_ends() or by_count or by_time or self.stopping)

    def check_weights(self) -> None:
        """Raise FloatingPointError for weights that are not finite, which are never to be saved."""
        for module in (self.model, self.averaged):
            for name, value in module.state_dict().items():
                if not torch.isfinite(value).all():
                    raise FloatingPointError(f"weight {name} is not finite after this iteration")

    @property
    def epoch(self) -> float:
        """The passes over the training images so far."""
        return self.iteration / self.epoch_iterations

    def write_row(self, **values: Any) -> dict[str, Any]:
        """Write a row of metrics.csv and return it; values: of this moment."""
        minutes, limit = self.budget.minutes(), self.budget.max_minutes
        row = {"iteration": self.iteration, "epoch": self.epoch, "minutes": minutes, "lr": self.lr}
        row |= {"rollbacks": self.rollbacks, **values}
        return self.journal.write_row(row, max(limit - minutes, 0) if limit else None)

    def roll_back(self, state: dict[str, Any], rollbacks: int) -> None:
        """Return to a state of this run, with the clock where it is and different noise.

        The rows of metrics.csv after that state are taken out.
        """
        minutes_before = self.budget.minutes_before
        self.journal.log.start(self.journal.log.path, resumed_at=state["iteration"])
        self.load_state_dict(state)
        self.budget.minutes_before, self.rollbacks = minutes_before, rollbacks
        self.settings = remedied(self.args, rollbacks)
        self.generator.manual_seed(self.seed + 1_000_000 * rollbacks)
        self._agree()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as plain types and tensors."""
        return {
            "iteration": self.iteration,
            "minutes": self.budget.minutes(),
            "rollbacks": self.rollbacks,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "generator": torch.stack(self.ranks.gathered(self.generator.get_state())),  # by rank
            "log": self.journal.log.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state of a run of the same settings."""
        self.iteration, self.rollbacks = state["iteration"], state["rollbacks"]
        self.budget.minutes_before = state["minutes"]
        self.settings = remedied(self.args, self.rollbacks) if self.rollbacks else self.args
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        states = state["generator"].cpu().reshape(-1, len(self.generator.get_state()))
        if self.ranks.rank < len(states):
            # torch crashes on part of a larger tensor
            self.generator.set_state(states[self.ranks.rank].clone())
        else:  # the run was on fewer processes
            self.generator.manual_seed(self.seed + self.iteration)
        self.journal.log.load_state_dict(state["log"])
