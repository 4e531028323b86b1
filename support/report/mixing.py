"""Section: what fresh chains do on their way, and how fast they forget where they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgld_nrg.support import plots, sample_metrics
from sgld_nrg.support.report.study import Study, fresh_chains


def measure(study: Study) -> dict[str, Any]:
    """Follow chains: energy, displacement, saturation; after half split R-hat, autocorrelation."""
    energies: list[Tensor] = []
    displacements: list[float] = []
    saturated: list[float] = []
    last: Tensor | None = None

    def follow(step: int, x: Tensor, values: Tensor) -> None:
        nonlocal last
        energies.append(values.cpu())
        saturated.append(float((x.abs() >= 1).float().mean()))
        if last is not None:
            displacements.append(float((x - last).flatten(1).norm(dim=1).mean()))
        last = x

    chains, steps = study.sizes["chains"], study.sizes["chain_steps"]
    model = study.models["jem"]
    fresh_chains(study.checkpoint, model, chains, steps, study.generator(2), follow)
    series = torch.stack(energies, dim=1)
    settled = series[:, series.shape[1] // 2 :]
    correlation = sample_metrics.autocorrelation(settled, min(100, settled.shape[1] // 2))
    ends, lags = (0, series.shape[1] // 2, series.shape[1] - 1), (1, 10, 30, 100)
    figure = study.folder / "chains.png"
    plots.save_chains(series, correlation, displacements, saturated, figure)
    return {
        "chains": chains,
        "steps": steps,
        "mean_energy": {str(step): float(series[:, step].mean()) for step in ends},
        "split_rhat_of_energy": sample_metrics.split_rhat(settled),
        "autocorrelation_of_energy": {
            str(lag): correlation[lag] for lag in lags if lag < len(correlation)
        },
        "mean_displacement_per_step": float(np.mean(displacements)),
        "saturated_share_at_end": saturated[-1],
    }


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    energies = ", ".join(f"{v:.2f} at step {step}" for step, v in found["mean_energy"].items())
    correlations = found["autocorrelation_of_energy"].items()
    lags = ", ".join(f"{value:.2f} at lag {lag}" for lag, value in correlations)
    return (
        f"## Chains\n\n{found['chains']} fresh chains of {found['steps']} steps: mean energy "
        f"{energies}. In their second half split R-hat of the energy is "
        f"{found['split_rhat_of_energy']:.2f} (1 when chains have mixed), its autocorrelation "
        f"{lags}. A step moves a chain by {found['mean_displacement_per_step']:.3f}; "
        f"{100 * found['saturated_share_at_end']:.0f} % of the pixels are saturated at the end."
        "\n\n![Chains](chains.png)"
    )
