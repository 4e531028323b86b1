"""sgld-nrg: joint energy-based models in PyTorch, after arXiv 1912.03263.

    from sgld_nrg import Langevin, ReplayBuffer, energy_loss, run_chains

The names below are imported when they are first asked for, so that `import sgld_nrg` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sgld_nrg.models import joint_energy, load_model, marginal_energy
    from sgld_nrg.sgld import Langevin, run_chains
    from sgld_nrg.support.attacks import apgd
    from sgld_nrg.support.detector import Detector
    from sgld_nrg.support.restarts import GaussianRestart, UniformRestart
    from sgld_nrg.train_jem import ReplayBuffer, energy_loss, energy_regulariser

_HOMES = {
    "Langevin": "sgld",
    "run_chains": "sgld",
    "joint_energy": "models",
    "load_model": "models",
    "marginal_energy": "models",
    "ReplayBuffer": "train_jem",
    "energy_loss": "train_jem",
    "energy_regulariser": "train_jem",
    "Detector": "support.detector",
    "GaussianRestart": "support.restarts",
    "UniformRestart": "support.restarts",
    "apgd": "support.attacks",
}
__all__ = [
    "Detector",
    "GaussianRestart",
    "Langevin",
    "ReplayBuffer",
    "UniformRestart",
    "apgd",
    "energy_loss",
    "energy_regulariser",
    "joint_energy",
    "load_model",
    "marginal_energy",
    "run_chains",
]


def __getattr__(name: str) -> Any:
    """Import one of the names above from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sgld_nrg' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sgld_nrg.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted([*globals(), *__all__])
