"""Which device and which arithmetic a run uses."""

from __future__ import annotations

import os

import torch

from sgld_nrg.support.errors import UserError, first_line


def pick_device(name: str) -> torch.device:
    """Return the device for a --device value; auto takes CUDA, else the CPU.

    Of several processes that torchrun started on a machine each gets a GPU of its own.
    Raises UserError if the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"device {name!r} cannot be used here ({first_line(error)}): "
            "use --device auto or --device cpu"
        ) from error
    torch.backends.cudnn.benchmark = True  # a run's shapes are few: the fastest algorithm of each
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """Resolve a --precision value to float32 or bf16."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    if device.type == "cpu":  # without matrix units bf16 takes half as long again as float32
        matrix_units = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
        return "bf16" if matrix_units else "float32"
    return "float32"
