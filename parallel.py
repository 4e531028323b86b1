"""Several processes, as torchrun starts them: which rank this one is, and what all ranks must hold in common.

A script that was started by itself is the first and only rank, and every function here then gives back what it was given.
Collective functions must be called by every rank.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import cli
from cli import UserError

PATIENCE = timedelta(hours=2)  # rank 0 may download or write for long; torchrun ends the others when one fails

_alone = False  # while rank 0 does for all what the others wait for, it acts as the only one


@contextmanager
def group(device):
    """Join the group of processes that torchrun started: gloo on the CPU, NCCL on GPUs. Only rank 0 prints inside it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if first() else nowhere):
        yield
    distributed.destroy_process_group()  # not after an error: the others may not come


def ranks():
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


def rank():
    """Return the number of this process, 0..ranks() - 1."""
    return distributed.get_rank() if distributed.is_initialized() and not _alone else 0


def first():
    """Tell whether this is rank 0, the one that writes and prints."""
    return rank() == 0


def share(total, flag):
    """Return an equal share of a total for each rank. Raises UserError, naming the flag, where there is none."""
    if total % ranks():
        raise UserError(f"{flag} {total} cannot be shared equally among {ranks()} processes: make it a multiple of {ranks()}")
    return total // ranks()


def nth_seed(seed, number):
    """Return a seed for one of several streams of noise: the seed itself for number 0, far ones for the others."""
    if number == 0:
        return seed
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])  # torch's CPU generator reads 32 bits, no more


def wrapped(model, device):
    """Return the module through which the loss is computed, so that every rank gets the mean of all weight gradients."""
    if ranks() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def from_first(make):
    """Return on every rank what make() returns on rank 0, where alone it is called; a UserError ends every rank.

    Inside make() rank 0 is the only rank, so that it may call what is collective elsewhere.
    """
    global _alone
    if ranks() == 1:
        return make()
    made, error = None, None
    if first():
        _alone = True
        try:
            made = make()
        except UserError as found:
            error = found
        finally:
            _alone = False
    box = [made, error is not None]
    distributed.broadcast_object_list(box)
    if error:
        raise error
    if box[1]:
        cli.wait_for_first()
        raise SystemExit(2)
    return box[0]


def largest(*values):
    """Return the largest of all ranks' values, one by one."""
    if ranks() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.float64)
    distributed.all_reduce(shared, distributed.ReduceOp.MAX)
    return shared.tolist()


def mean(values):
    """Return {name: mean over the ranks} of {name: scalar}; every rank has the same names."""
    if ranks() == 1 or not values:
        return values
    shared = torch.stack([torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in values.values()])
    distributed.all_reduce(shared)
    return dict(zip(values, shared / ranks(), strict=True))


def gathered(value):
    """Return every rank's value, a list in the order of the ranks."""
    if ranks() == 1:
        return [value]
    values = [None] * ranks()
    distributed.all_gather_object(values, value)
    return values


def gathered_at_first(value):
    """Return every rank's value on rank 0, a list in the order of the ranks; on the others only their own.

    value: plain types and tensors, in dicts and tuples; the tensors come back on the CPU.
    """
    if ranks() == 1:
        return [value]
    values = [None] * ranks() if first() else None
    distributed.gather_object(_on_cpu(value), values)
    return values or [value]


def _on_cpu(value):
    if isinstance(value, dict):
        return {name: _on_cpu(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_on_cpu, value))
    return value.cpu() if isinstance(value, torch.Tensor) else value


@contextmanager
def first_on_each_node():
    """Let one process of each machine go through the block before the others: a download then happens once."""
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first_here:
        largest(0)
    yield
    if first_here:
        largest(0)
