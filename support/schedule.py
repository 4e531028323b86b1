"""What a training counts and averages: order of the data, learning rate, budget, weights."""

from __future__ import annotations

import copy
import math
import time
from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of `count` images in an epoch, which seed and epoch alone decide."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator)


def learning_rate(args: Namespace, iteration: int, progress: float) -> float:
    """Return the learning rate of an iteration.

    args.lr, times a linear rise over the first args.warmup_iterations, times a half cosine that
    falls from 1 to args.lr_floor as progress (0..1) reaches 1.
    """
    rise = min(1.0, (iteration + 1) / max(args.warmup_iterations, 1))
    course = 0.5 * (1 + math.cos(math.pi * progress))
    return args.lr * rise * (args.lr_floor + (1 - args.lr_floor) * course)


class Budget:
    """How long a training is: iterations, wall-clock minutes, or whichever is spent first.

    started: when the script began, on the clock of time.perf_counter. minutes_before: of the run,
    before it was resumed.
    """

    def __init__(self, iterations: int | None, max_minutes: float | None, started: float):
        self.iterations, self.max_minutes, self.started = iterations, max_minutes, started
        self.minutes_before = 0.0

    def minutes(self) -> float:
        """Return the wall-clock minutes of the run so far."""
        return self.minutes_before + (time.perf_counter() - self.started) / 60

    def progress(self, iteration: int) -> float:
        """Return the share of the budget that is spent after so many iterations, 0..1."""
        shares = [iteration / self.iterations] if self.iterations else []
        if self.max_minutes:
            shares.append(self.minutes() / self.max_minutes)
        return min(max(shares), 1.0)


class MovingAverage:
    """Exponential moving average of a network's weights that begins short.

    The first update copies the weights. After n of them the decay is the smaller of `decay` and
    (1 + n) / (10 + n): a short training's average is over its last tenth. The count stays on the
    host; torch's AveragedModel keeps it on the GPU and waits for it at every update.

    module: the network with the averaged weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.module, self.decay, self.count = copy.deepcopy(model), decay, 0

    def update(self, model: nn.Module) -> None:
        """Take in the weights that a network has now."""
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
        average, now = _averaged_tensors(self.module), _averaged_tensors(model)
        get_ema_multi_avg_fn(decay)(average, now, self.count)
        self.count += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return count and weights, under the names that AveragedModel gives them."""
        weights = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        return {"n_averaged": torch.tensor(self.count), **weights}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a state_dict."""
        self.count = int(state["n_averaged"])
        weights = {k.removeprefix("module."): v for k, v in state.items() if k != "n_averaged"}
        self.module.load_state_dict(weights)


def _averaged_tensors(model: nn.Module) -> list[Tensor]:
    """Return the weights and, of batch normalisation, the running statistics."""
    statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    return [*model.parameters(), *statistics]
