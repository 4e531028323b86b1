"""The processes of a run: alone, or as many as torchrun started, and what they hold in common."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sgld_nrg.support.errors import UserError, wait_for_first

PATIENCE = timedelta(hours=2)  # rank 0 may download or write for long


class Alone:
    """A run of one process, the only rank: every method gives back what it was given.

    rank: the number of this process, 0..count - 1. Rank 0, the first, writes and prints.
    """

    rank, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, total: int, flag: str) -> int:
        """Return an equal share of a total for each rank; UserError, with the flag, if none is."""
        if total % self.count:
            raise UserError(
                f"{flag} {total} cannot be shared equally among {self.count} processes: "
                f"make it a multiple of {self.count}"
            )
        return total // self.count

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the module to compute the loss with: its weight gradients are all ranks' mean."""
        return model

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what make() returns on rank 0; a UserError there ends them all."""
        return make()

    def largest(self, *values: float) -> list[float]:
        """Return the largest of all ranks' values, one by one."""
        return list(values)

    def mean(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return {name: mean over the ranks} of {name: scalar}; every rank has the same names."""
        return values

    def gathered(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks."""
        return [value]

    def gathered_at_first(self, value: Any) -> list[Any]:
        """Return every rank's value on rank 0, on the CPU; on the others only their own.

        value: plain types and tensors, in dicts and tuples.
        """
        return [value]

    @contextmanager
    def first_on_each_node(self) -> Iterator[None]:
        """Let one process of each machine go through the block first: it downloads once."""
        yield


class Group(Alone):
    """The processes that torchrun started; every rank must call the same methods in turn."""

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()

    def wrapped(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Return the model in DistributedDataParallel."""
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call make() on rank 0 and send what it returns."""
        made, error = None, None
        if self.first:
            try:
                made = make()
            except UserError as found:
                error = found
        box = [made, error is not None]
        distributed.broadcast_object_list(box)
        if error:
            raise error
        if box[1]:
            wait_for_first()
            raise SystemExit(2)
        return box[0]

    def largest(self, *values: float) -> list[float]:
        """Reduce by the maximum."""
        shared = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(shared, distributed.ReduceOp.MAX)
        return shared.tolist()

    def mean(self, values: dict[str, Any]) -> dict[str, Any]:
        """Reduce by the sum, and divide."""
        if not values:
            return values
        scalars = [torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in values.values()]
        shared = torch.stack(scalars)
        distributed.all_reduce(shared)
        return dict(zip(values, shared / self.count, strict=True))

    def gathered(self, value: Any) -> list[Any]:
        """Gather on every rank."""
        values = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def gathered_at_first(self, value: Any) -> list[Any]:
        """Gather on rank 0."""
        values = [None] * self.count if self.first else None
        distributed.gather_object(_on_cpu(value), values)
        return values or [value]

    @contextmanager
    def first_on_each_node(self) -> Iterator[None]:
        """Meet once: the first before the block, the others after it."""
        first_here = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first_here:
            self.largest(0)
        yield
        if first_here:
            self.largest(0)


@contextmanager
def processes(device: torch.device) -> Iterator[Alone]:
    """Yield the processes of this run: gloo on the CPU, NCCL on GPUs. Only rank 0 prints inside."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield Alone()
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=PATIENCE)
    ranks = Group()
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if ranks.first else nowhere):
        yield ranks
    distributed.destroy_process_group()  # not after an error: the others may not come


def over_cores(
    work: Callable[[str], Any], names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, Any]]:
    """Yield (name, work(name)) as they end: on a CPU in a process for each core, else by turns.

    What works on many small arrays keeps two processes busy and two threads not. The processes are
    forked, so that `work` need not be pickled, and take the names in turn, the longest work first.
    """
    count = min(torch.get_num_threads(), len(names))
    if count < 2 or device.type != "cpu" or not sys.platform.startswith("linux"):
        for name in names:
            yield name, work(name)
        return
    others, context = multiprocessing.active_children(), multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, _begin_on_core, (work,)) as pool:
        try:
            for done in as_completed([pool.submit(_on_core, name) for name in names]):
                yield done.result()
        except BrokenProcessPool as error:
            raise MemoryError("a process was killed") from error
        except BaseException:  # a signal, or nobody wants the rest: do not wait for it
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                if process not in others:
                    process.terminate()
            raise


_work: Callable[[str], Any]  # of a forked process


def _begin_on_core(work: Callable[[str], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to tell
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def _on_core(name: str) -> tuple[str, Any]:
    return name, _work(name)


def nth_seed(seed: int, number: int) -> int:
    """Return a seed for one of several streams of noise: the seed for 0, far ones for the rest."""
    if number == 0:
        return seed
    # torch's CPU generator reads 32 bits, no more
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_on_cpu, value))
    return value.cpu() if isinstance(value, Tensor) else value


def keep_share(buffer: Any, ranks: Alone) -> None:
    """Keep one rank's share of a replay buffer's ordinary and long chains; give up the others'."""
    slots = torch.arange(len(buffer), device=buffer.images.device)
    kinds = slots.tensor_split([len(buffer) - buffer.long_chains])
    ordinary, long = (kind.tensor_split(ranks.count)[ranks.rank] for kind in kinds)
    buffer.long_chains, kept = len(long), torch.cat([ordinary, long])
    buffer.load_state_dict({name: value[kept] for name, value in buffer.state_dict().items()})


def whole_state(buffer: Any, ranks: Alone) -> dict[str, Tensor]:
    """Return, on rank 0, the state_dict of the replay buffer that the ranks' shares make up."""
    shares = ranks.gathered_at_first((buffer.long_chains, buffer.state_dict()))
    ordinary = [(state, slice(len(state["labels"]) - long)) for long, state in shares]
    long = [(state, slice(len(state["labels"]) - long, None)) for long, state in shares]
    return {
        name: torch.cat([state[name][part] for state, part in ordinary + long])
        for name in buffer.state_dict()
    }
