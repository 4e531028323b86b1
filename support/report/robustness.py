"""Section: accuracy under attack of each model, and of the JEM behind Langevin refinement."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgld_nrg.models import energy_of
from sgld_nrg.support import metrics, plots
from sgld_nrg.support.attacks import Logits, pgd, refined
from sgld_nrg.support.checkpoints import langevin_from
from sgld_nrg.support.report.study import PRECISION, Study
from sgld_nrg.support.report.words import interval, table

ATTACK_BATCH = 100  # images attacked at once


def measure(study: Study) -> dict[str, Any]:
    """Attack each model, and the refined JEM, in each norm; check the attack, draw the curves.

    Returns {"curves": {norm: {model: [{epsilon, accuracy, ...}, ...]}}, "checks": {norm: {...}}}.
    """
    sizes, device, seed = study.sizes, study.device, study.args.seed
    images, labels = (part[: sizes["attacked"]].to(device) for part in study.dataset.test)
    few, jem = slice(0, sizes["refined"]), study.models["jem"]
    curves: dict[str, Any] = {}
    checks = {}
    plain = {"attack_steps": sizes["attack_steps"], "random_starts": sizes["random_starts"]}
    adaptive = {"attack_steps": sizes["refined_attack_steps"], "draws": sizes["refined_draws"]}
    langevin, energy = langevin_from(study.checkpoint), energy_of(jem, PRECISION)
    for norm in [norm for norm in study.args.attacks if norm != "none"]:
        curves[norm] = {
            name: [
                attack(model, model, images, labels, norm, epsilon, seed=seed, **plain)
                for epsilon in (0.0, *sizes["epsilons"][norm])
            ]
            for name, model in study.models.items()
        }
        behind = refined(energy, jem, sizes["refined_steps"], langevin, study.generator(1))
        settings = {"seed": seed, "transferred_from": jem, **adaptive}
        curves[norm][f"jem-{sizes['refined_steps']}"] = [
            attack(behind, jem, images[few], labels[few], norm, epsilon, **settings)
            for epsilon in (0.0, *sizes["refined_epsilons"][norm])
        ]
        checks[norm] = check_attack(jem, images, labels, norm, curves[norm]["jem"], sizes, seed)
    if curves:
        plots.save_robustness(curves, study.folder / "robustness.png")
    return {"curves": curves, "checks": checks}


def attack(
    logits_of: Logits,
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
    epsilon: float,
    *,
    seed: int,
    attack_steps: int,
    random_starts: int = 1,
    draws: int = 1,
    transferred_from: nn.Module | None = None,
) -> dict[str, Any]:
    """Return one point of an accuracy-against-epsilon curve with its interval.

    As in attacks.pgd; epsilon 0 measures without attack. transferred_from: a classifier whose
    adversarial images (same settings, one draw) must be survived as well; the accuracy is then
    that under the worse of the two.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    if epsilon == 0:
        attack_steps = random_starts = 1  # the ball is the image itself
    settings: dict[str, Any] = {"attack_steps": attack_steps, "random_starts": random_starts}
    settings |= {"generator": generator, "module": module}
    correct, losses = [], []
    batches = zip(images.split(ATTACK_BATCH), labels.split(ATTACK_BATCH), strict=True)
    for x, y in batches:
        found = pgd(logits_of, x, y, norm, epsilon, draws=draws, **settings)
        survived = found.correct
        if transferred_from is not None:
            elsewhere = pgd(transferred_from, x, y, norm, epsilon, **settings).images
            with torch.no_grad():
                drawn = [logits_of(elsewhere).softmax(1) for _ in range(draws)]
            survived = survived & (torch.stack(drawn).mean(0).argmax(1) == y)
        correct.append(survived)
        losses.append(found.losses * len(x))
    right = torch.cat(correct).double().cpu().numpy()
    mean_losses = torch.stack(losses).sum(0) / len(right)
    return {
        "epsilon": epsilon,
        "accuracy": float(right.mean()),
        "interval": metrics.bootstrap(np.mean, right),
        "images": len(right),
        "attack_steps": attack_steps,
        "random_starts": random_starts,
        "draws": draws,
        "losses": [round(float(loss), 4) for loss in mean_losses],
    }


def check_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str,
    curve: list[dict[str, Any]],
    sizes: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Tell whether an attack works, so that a broken one is not mistaken for robustness.

    It works if accuracy is below 5 % at the largest epsilon, if more steps never help the defender
    by more than one image in a hundred, and if the loss rises along the attack.
    """
    epsilons, steps, some = sizes["epsilons"][norm], sizes["attack_steps"], slice(0, 200)
    epsilon = epsilons[(len(epsilons) - 1) // 2]
    rows = [
        attack(model, model, images[some], labels[some], norm, epsilon, seed=seed, attack_steps=n)
        for n in (steps // 4 or 1, steps, 2 * steps)
    ]
    accuracies, rises = [row["accuracy"] for row in rows], np.diff(rows[-1]["losses"]) >= -1e-3
    return {
        "accuracy_at_largest_epsilon": curve[-1]["accuracy"],
        "falls_to_zero": curve[-1]["accuracy"] < 0.05,
        "epsilon": epsilon,
        "accuracy_by_attack_steps": {str(row["attack_steps"]): row["accuracy"] for row in rows},
        "more_steps_never_help": bool(np.all(np.diff(accuracies) <= 0.01)),
        "share_of_steps_on_which_the_loss_rises": float(rises.mean()),
    }


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    if not found["curves"]:
        return "## Adversarial robustness\n\nNot measured (`--attacks none`)."
    steps = sizes["refined_steps"]
    parts = [
        "## Adversarial robustness",
        f"PGD, {sizes['attack_steps']} steps of 2.5 ε / steps, {sizes['random_starts']} random "
        f"starts, {sizes['attacked']} test images at most; ε on pixels in [0, 1]. jem-{steps} is "
        f"the JEM behind {steps} Langevin steps, attacked through them "
        f"({sizes['refined_attack_steps']} steps, gradients averaged over {sizes['refined_draws']} "
        f"draws of the noise, {sizes['refined']} images).",
    ]
    for norm, models in found["curves"].items():
        cells = {name: {row["epsilon"]: row for row in rows} for name, rows in models.items()}
        rows = []
        for epsilon in sorted({epsilon for cell in cells.values() for epsilon in cell}):
            points = [cell.get(epsilon) for cell in cells.values()]
            shown = [
                f"{point['accuracy']:.3f} {interval(point['interval'], digits=2)}" if point else ""
                for point in points
            ]
            rows.append([f"{epsilon:g}", *shown])
        title = "L∞" if norm == "linf" else "L2"
        parts.append(f"### {title}\n\n" + table(["ε", *models], rows))
        parts.append(_about_the_attack(found["checks"][norm]))
    parts.append("![Accuracy against ε](robustness.png)")
    return "\n\n".join(parts)


def _about_the_attack(check: dict[str, Any]) -> str:
    by_steps = check["accuracy_by_attack_steps"].items()
    accuracies = ", ".join(f"{steps} steps {value:.3f}" for steps, value in by_steps)
    works = "it works"
    if not check["falls_to_zero"]:
        works = "**not near zero: do not trust the numbers above**"
    more = "more steps never help the defender"
    if not check["more_steps_never_help"]:
        more = "**more steps helped the defender**"
    return (
        "The attack itself, on the JEM: accuracy "
        f"{check['accuracy_at_largest_epsilon']:.3f} at the largest ε ({works}); at ε = "
        f"{check['epsilon']:g} {accuracies} ({more}); the loss rises on "
        f"{100 * check['share_of_steps_on_which_the_loss_rises']:.0f} % of the steps."
    )
