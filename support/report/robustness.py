"""Section: accuracy under attack of each model, and of the JEM behind Langevin refinement."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sgld_nrg.models import energy_of
from sgld_nrg.support import metrics, plots
from sgld_nrg.support.attacks import THROUGH, refined, strongest
from sgld_nrg.support.ball import Attack, Logits
from sgld_nrg.support.checkpoints import langevin_from
from sgld_nrg.support.report.study import PRECISION, Study
from sgld_nrg.support.report.words import counted, interval, table
from sgld_nrg.support.square import square

ATTACK_BATCH = 500  # images attacked at once
STRONGER = 3  # times as many starts and targets, of twice as many steps, check an attack

# Called as survives(images, labels, epsilon=...): whether each is still classified right, (n,).
Survives = Callable[..., Tensor]


def measure(study: Study) -> dict[str, Any]:
    """Attack each model, and the refined JEM, in each norm; check the attack, draw the curves.

    Returns {"curves": {norm: {model: [{epsilon, accuracy, ...}, ...]}}, "checks": {norm: {...}}},
    the models in the order of study.models.
    """
    sizes, device, jem = study.sizes, study.device, study.models["jem"]
    images, labels = (part[: sizes["attacked"]].to(device) for part in study.dataset.test)
    radii = sizes["epsilons"]["colour" if images.shape[1] == 3 else "grey"]
    few, steps = slice(0, sizes["refined"]), sizes["refined_steps"]
    langevin, energy = langevin_from(study.checkpoint), energy_of(jem, PRECISION)
    counts = {name: sizes[name] for name in ("attack_steps", "random_starts", "targets")}
    behind = {"attack_steps": sizes["refined_attack_steps"], "draws": sizes["refined_draws"]}
    behind["targets"] = 1
    curves: dict[str, Any] = {}
    checks = {}
    for norm in [norm for norm in study.args.attacks if norm != "none"]:
        settings: dict[str, Any] = {"norm": norm, "seed": study.args.seed}
        curves[norm] = {}
        for name, model in study.models.items():
            white_box = partial(survivors, model, model, **settings, **counts)
            curves[norm][name], standing = curve({"APGD": white_box}, images, labels, radii[norm])
            if name == "jem":
                given = (images, labels, standing, radii[norm][0], sizes)
                checks[norm] = check_attack(jem, *given, **settings)
                checks[norm]["accuracy_at_largest"] = curves[norm][name][-1]["accuracy"]
        every: dict[str, Survives] = {
            through: partial(
                survivors,
                refined(energy, jem, steps, langevin, study.generator(1), through=through),
                jem,
                **settings,
                **behind,
            )
            for through in THROUGH
        }
        rows, _ = curve(every, images[few], labels[few], radii[norm][: sizes["refined_epsilons"]])
        curves[norm][f"jem-{steps}"] = rows
    if curves:
        plots.save_robustness(curves, study.folder / "robustness.png")
    return {"curves": curves, "checks": checks}


def curve(
    attacks: dict[str, Survives], images: Tensor, labels: Tensor, epsilons: tuple[float, ...]
) -> tuple[list[dict[str, Any]], Tensor]:
    """Return the accuracy under several attacks at 0 and at rising epsilons, and who stands first.

    An image counts at an epsilon only if it survives every attack there and at all smaller ones,
    whose images lie in the larger ball too; what is broken is not attacked again. Without attack,
    at 0, the first of the attacks alone judges.
    Returns a row for each epsilon, "after" being the accuracy after each attack, and whether an
    image still stands at the first of the epsilons, (N,) bool.
    """
    standing, rows = torch.ones_like(labels, dtype=torch.bool), []
    standing_first = standing
    for epsilon in (0.0, *epsilons):
        after = {}
        for name, survives in attacks.items() if epsilon else list(attacks.items())[:1]:
            left = standing.nonzero().squeeze(1)
            if len(left):
                standing[left] &= survives(images[left], labels[left], epsilon=epsilon)
            after[name] = float(standing.double().mean())
        rows.append(point(epsilon, standing) | {"after": after})
        if epsilon == epsilons[0]:
            standing_first = standing.clone()
    return rows, standing_first


def point(epsilon: float, correct: Tensor) -> dict[str, Any]:
    """Return one point of an accuracy-against-epsilon curve with its interval."""
    right = correct.double().cpu().numpy()
    return {
        "epsilon": epsilon,
        "accuracy": float(right.mean()),
        "interval": metrics.bootstrap(np.mean, right),
        "images": len(right),
    }


def survivors(
    logits_of: Logits,
    module: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    norm: str,
    epsilon: float,
    seed: int,
    by: Callable[..., Attack] = strongest,
    **settings: Any,
) -> Tensor:
    """Return whether each image survives the attack `by`, (N,) bool, in batches."""
    settings |= {"generator": torch.Generator(images.device).manual_seed(seed), "module": module}
    batches = zip(images.split(ATTACK_BATCH), labels.split(ATTACK_BATCH), strict=True)
    return torch.cat([by(logits_of, x, y, norm, epsilon, **settings).correct for x, y in batches])


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
    targets: int = 3,
) -> dict[str, Any]:
    """Return the accuracy of a network under `attacks.strongest`, with its interval."""
    counts = {"attack_steps": attack_steps, "random_starts": random_starts, "targets": targets}
    settings: dict[str, Any] = {"norm": norm, "epsilon": epsilon, "seed": seed, **counts}
    return point(epsilon, survivors(logits_of, module, images, labels, **settings)) | counts


def check_attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    standing: Tensor,
    epsilon: float,
    sizes: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Attack in two other ways, so that a weak attack is not mistaken for robustness.

    standing: (N,) bool, what survived the report's attack at epsilon. settings: norm and seed.
    Square, which sees no gradient, attacks the first images; an attack of six times the steps, the
    first that stand. Returns the accuracy by each, and by how much it lowers the report's.
    """
    settings |= {"epsilon": epsilon}
    few = slice(0, sizes["square_images"])
    by_square = survivors(
        model,
        model,
        images[few],
        labels[few],
        by=square,
        queries=sizes["square_queries"],
        **settings,
    )
    rows = standing.nonzero().squeeze(1)[: sizes["stronger_images"]]
    stronger = {name: STRONGER * sizes[name] for name in ("random_starts", "targets")}
    stronger["attack_steps"] = 2 * sizes["attack_steps"]
    left = standing[rows]
    if len(rows):
        left = survivors(model, model, images[rows], labels[rows], **stronger, **settings)
    accuracy = standing.double().mean()
    return {
        "epsilon": epsilon,
        "square": {
            "images": len(by_square),
            "queries": sizes["square_queries"],
            "white_box": float(standing[few].double().mean()),
            "square": float(by_square.double().mean()),
            "both": float((standing[few] & by_square).double().mean()),
        },
        "stronger": {
            **stronger,
            "images": len(rows),
            "broken": int((~left).sum()),
            "lowers_by": float(accuracy * (1 - left.double().mean())) if len(rows) else 0.0,
        },
    }


def words(found: dict[str, Any], sizes: dict[str, Any]) -> str:
    """Return the section of report.md."""
    if not found["curves"]:
        return "## Adversarial robustness\n\nNot measured (`--attacks none`)."
    steps = sizes["refined_steps"]
    parts = [
        "## Adversarial robustness",
        f"Auto-PGD of {sizes['attack_steps']} steps on the cross-entropy, "
        f"{counted(sizes['random_starts'], 'random start')}, then on the logits of the likeliest "
        f"wrong classes of what stands, {counted(sizes['targets'], 'target')}; "
        f"{sizes['attacked']} test images at most; ε on pixels in [0, 1]. What is broken at a "
        f"smaller ε stays so. jem-{steps} is the JEM behind {steps} Langevin steps: there an image "
        "counts only if it survives three such attacks, whose gradient goes around the steps (a "
        "transfer from the JEM), straight through them and through each of them "
        f"({sizes['refined_attack_steps']} attack steps, 1 target, "
        f"{counted(sizes['refined_draws'], 'draw')} of the noise, {sizes['refined']} images).",
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
            rows.append([f"{epsilon:.3g}", *shown])
        title = "L∞" if norm == "linf" else "L2"
        parts.append(f"### {title}\n\n" + table(["ε", *models], rows))
        parts.append(_behind_the_steps(models[f"jem-{steps}"], steps))
        parts.append(_about_the_attack(found["checks"][norm]))
    parts.append("![Accuracy against ε](robustness.png)")
    return "\n\n".join(parts)


def _behind_the_steps(rows: list[dict[str, Any]], steps: int) -> str:
    shown = (
        f"at ε = {row['epsilon']:.3g} "
        + ", ".join(f"{name} {accuracy:.3f}" for name, accuracy in row["after"].items())
        for row in rows[1:]
    )
    return f"jem-{steps}, one attack after the other: {'; '.join(shown)}."


def _about_the_attack(check: dict[str, Any]) -> str:
    by_square, stronger, largest = (
        check[name] for name in ("square", "stronger", "accuracy_at_largest")
    )
    masked = by_square["square"] < by_square["white_box"]
    # one image of a few dozen tells nothing
    by_stronger = stronger["lowers_by"] if stronger["broken"] > 1 else 0.0
    lowers_by = max(by_stronger, by_square["white_box"] - by_square["both"])
    verdicts = {
        "**the attack does not work: do not trust the numbers above**": largest >= 0.05,
        "**an attack without gradients does better: they are masked**": masked,
        "**the numbers above are too high by more than two points**": lowers_by > 0.02,
    }
    faults = [verdict for verdict, holds in verdicts.items() if holds]
    return (
        f"The attack itself, on the JEM: accuracy {largest:.3f} at the largest ε. At ε = "
        f"{check['epsilon']:.3g} Square, {by_square['queries']} queries without a gradient, leaves "
        f"{by_square['square']:.3f} of {by_square['images']} images where the attack leaves "
        f"{by_square['white_box']:.3f}, and both {by_square['both']:.3f}; an attack of six times "
        f"the steps breaks {stronger['broken']} of {stronger['images']} that stand, which lowers "
        f"the accuracy by {stronger['lowers_by']:.3f}. "
        f"{'; '.join(faults) or 'So it works'}."
    )
