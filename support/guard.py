"""Finds a training that leaves its healthy range, and takes it back to where it was healthy.

The guard reads the rows of metrics.csv (means over --log-every iterations), so it costs nothing and
looks at what a reader of the curves would look at. Energies are in nats of the logits, whose scale
the classifier sets, whatever step and noise are.
"""

from __future__ import annotations

import copy
import math
import sys
from argparse import Namespace
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

from sgld_nrg.support.checkpoints import read_state, write_whole
from sgld_nrg.support.parallel import keep_share, whole_state

ROWS = 3  # out of range in so many rows one after the other: divergence
GAP = 8.0  # nat; healthy gaps are within 2, those of runs that were lost went to 18 and beyond
LEVEL = 50.0  # nat that |E(data)| may lie above three times its largest value so far
APART = 0.9  # share of `largest_gap`: data and chains are told apart
SATURATED = 0.98  # share of the chains' pixels at -1 or 1; of MNIST's own pixels it is 0.83
SETTLED_ROWS = 10  # with a gap within a quarter of GAP, in a row: the chains have found the data
SNAPSHOT_ROWS = 10  # healthy rows from one state that is kept for a rollback to the next


class Diverged(ArithmeticError):
    """A training has left its healthy range; FloatingPointError, for non-finite values, is kin."""


class Guard:
    """Judges rows of metrics.csv one after the other.

    near: rows with a small energy gap, one after the other; until they have once been SETTLED_ROWS,
    the level may be anything and the gap all but `largest_gap`, for chains need some hundred
    iterations to find the data. accuracy: the best so far, 0..1. level: the largest |E(data)| so
    far, nat. out: rows out of range since the last healthy one. healthy: healthy rows so far.
    """

    def __init__(self) -> None:
        self.near, self.accuracy, self.level, self.out, self.healthy = 0, 0.0, 0.0, 0, 0

    def judge(self, row: dict[str, Any], largest: float = math.inf) -> bool:
        """Take a row; returns whether the state behind it is worth keeping for a rollback.

        largest: the run's `largest_gap`. Raises Diverged, with the reasons, for the last of ROWS
        rows that are out of range.
        """
        gap, level, accuracy = abs(row["energy_gap"]), abs(row["energy_positive"]), row["accuracy"]
        reasons, settled = [], self.near >= SETTLED_ROWS
        if settled and gap > GAP:
            reasons.append(f"energy gap {row['energy_gap']:.3g}")
        if gap > max(GAP, APART * largest):
            reasons.append(
                f"energy gap {row['energy_gap']:.3g}, as large as the regulariser allows"
            )
        if settled and level > LEVEL + 3 * self.level:
            reasons.append(f"energy level {row['energy_positive']:.3g}")
        if row["chain_saturated"] >= SATURATED:
            reasons.append(f"saturated chains {row['chain_saturated']:.3g}")
        if accuracy < self.accuracy / 2:
            reasons.append(f"accuracy {accuracy:.3g} after {self.accuracy:.3g}")
        if reasons:
            self.out += 1
            if self.out >= ROWS:
                raise Diverged(", ".join(reasons))
            return False
        self.out, self.healthy = 0, self.healthy + 1
        self.near = self.near if settled else self.near + 1 if gap <= GAP / 4 else 0
        self.accuracy, self.level = max(self.accuracy, accuracy), max(self.level, level)
        return gap <= GAP / 2 and self.healthy % SNAPSHOT_ROWS == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the guard's memory as plain types."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the memory of a stopped run."""
        vars(self).update(state)


def largest_gap(args: Namespace) -> float:
    """Return the energy gap [nat] at which the regulariser stops the energy loss, inf without one.

    The loss w (E(data) - E(chains)) + r (E(data)^2 + E(chains)^2) is least at E(chains) - E(data) =
    w / r. A network that gets there tells data from chains without fail, so its chains teach it
    nothing.
    """
    weight = args.p_x_weight + args.p_xy_weight
    return weight / args.energy_reg if args.energy_reg else math.inf


def remedied(args: Namespace, rollbacks: int) -> Namespace:
    """Return the flags with which a training goes on after so many rollbacks.

    Each halves the learning rate; from the second on chains take twice the Langevin steps; from the
    third on the energy regulariser is ten times as strong, 0.001 at least.
    """
    changed = dict(vars(args), lr=args.lr / 2**rollbacks)
    if rollbacks >= 2:
        changed |= {"steps": 2 * args.steps, "first_steps": 2 * args.first_steps}
    if rollbacks >= 3:
        changed["energy_reg"] = max(10 * args.energy_reg, 0.001)
    return Namespace(**changed)


class Healthy:
    """The last healthy states of a training, to go back to; a resumed training has them too.

    run: training.Training. buffer: train_jem.ReplayBuffer. Each state is also a file of its own,
    healthy-*.pt in the run's folder, for as long as a checkpoint may name it.
    """

    def __init__(self, run: Any, buffer: Any, guard: Guard):
        self.parts = {"training": run, "buffer": buffer, "guard": guard}
        self.run, self.buffer, self.guard = run, buffer, guard
        self.states: deque[dict[str, Any]] = deque(maxlen=3)
        self.named: list[int] = []  # iterations of the states that the last checkpoint names

    def keep(self) -> None:
        """Keep the state of now."""
        state = {name: part.state_dict() for name, part in self.parts.items()}
        self.states.append(copy.deepcopy(state))
        whole = {**state, "buffer": whole_state(self.buffer, self.run.ranks)}
        if self.run.ranks.first and self.run.args.max_rollbacks:
            write_whole(self._path(self.run.iteration), whole)

    def resume(self, iterations: list[int]) -> None:
        """Take up the states that a checkpoint names, as far as they are there, or keep now's."""
        self.named = list(iterations)  # what is resumed stays as the older checkpoint
        now, long_chains = self.buffer.state_dict(), self.buffer.long_chains
        for path in map(self._path, iterations):
            state = self.run.ranks.from_first(partial(read_state, path))
            if state:
                self.buffer.load_state_dict(state["buffer"])
                self.buffer.long_chains = self.run.args.long_chains
                keep_share(self.buffer, self.run.ranks)
                self.states.append({**state, "buffer": self.buffer.state_dict()})
        self.buffer.load_state_dict(now)
        self.buffer.long_chains = long_chains
        if not self.states:
            self.keep()

    def iterations(self) -> list[int]:
        """Return the iterations of the states, for a checkpoint."""
        return [state["training"]["iteration"] for state in self.states]

    def saved(self, finished: bool) -> None:
        """Remove the files that neither the checkpoint just saved nor the one before names."""
        needed = [] if finished else [*self.named, *self.iterations()]
        self.named = self.iterations()
        if self.run.ranks.first:
            kept = set(map(self._path, needed))
            for path in self.run.folder.glob("healthy-*.pt"):
                if path not in kept:
                    path.unlink()

    def _path(self, iteration: int) -> Path:
        return self.run.folder / f"healthy-{iteration:08d}.pt"

    def roll_back(self, error: Exception) -> None:
        """Take the run back to the last of its healthy states, and change what `remedied` says.

        The state is used up unless it is the only one, so that the next rollback goes further back.
        error: what was found. Raises FloatingPointError after --max-rollbacks.
        """
        run, buffer = self.run, self.buffer
        found, rollbacks = f"iteration {run.iteration}: {error}", run.rollbacks + 1
        if rollbacks > run.args.max_rollbacks:
            raise FloatingPointError(
                f"training diverged at {found}, after {run.rollbacks} rollbacks; "
                "lower --lr or raise --energy-reg or --steps"
            ) from error
        state = self.states.pop() if len(self.states) > 1 else self.states[0]
        # the optimiser changes in place what it is given
        run.roll_back(copy.deepcopy(state["training"]), rollbacks)
        buffer.load_state_dict(state["buffer"])
        buffer.restart_broken(run.generator)
        self.guard.load_state_dict(state["guard"])
        now = run.settings
        if run.ranks.first:
            print(
                f"training left its healthy range at {found}; back to iteration {run.iteration} "
                f"with different noise, rollback {rollbacks} of {run.args.max_rollbacks}: "
                f"lr {now.lr:g}, steps {now.steps}, energy_reg {now.energy_reg:g}",
                file=sys.stderr,
                flush=True,
            )
