"""The report card of evaluate.py as Markdown tables: only words and numbers, nothing is measured here."""

from __future__ import annotations


def markdown(found):
    """Return report.md for what evaluate.py found (the dict that it writes as report.json)."""
    protocol = found["protocol"]
    parts = [
        f"# Report: JEM on {protocol['data_set']}",
        f"Made by `{protocol['command']}`; test images {protocol['splits']['test']}, seed {protocol['seed']}, commit "
        f"{protocol['git_commit']}, torch {protocol['packages']['torch']}. In brackets bootstrap 95 % intervals over the "
        "images. Every number with its protocol and sample size is in `report.json`.",
        _classification(found["classification"], protocol["sizes"]["bins"]),
        _out_of_distribution(found["out_of_distribution"]),
        _robustness(found["robustness"], protocol["sizes"]),
        _distal(found["distal_adversarials"]),
        _samples(found["samples"]),
        _class_conditional(found["class_conditional"]),
        _long_chains(found["long_chains"]),
        _chains(found["chains"]),
    ]
    return "\n\n".join(parts) + "\n"


def summary(found):
    """Return the few lines that evaluate.py prints at its end."""
    lines = []
    for name, row in found["classification"].items():
        lines.append(f"{name}: accuracy {_percent(row['accuracy'])}, ECE {_percent(row['calibration']['ece'])}")
    for kind in ("buffer", "fresh"):
        lines.append(f"{kind} chains: {found['samples']['kinds'][kind]['ratio_to_floor']:.2f} times the Fréchet floor")
    return "\n".join(lines)


def _table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def _percent(value):
    return f"{100 * value:.2f} %"


def _interval(pair, scale=1.0, digits=3):
    return f"[{scale * pair[0]:.{digits}f}, {scale * pair[1]:.{digits}f}]"


def _classification(found, bins):
    rows = [
        ("accuracy", lambda r: f"{_percent(r['accuracy'])} {_interval(r['intervals']['accuracy'], 100, 2)}"),
        ("negative log-likelihood [nat]", lambda r: f"{r['nll']:.4f} {_interval(r['intervals']['nll'], digits=4)}"),
        ("Brier score (0 to 2)", lambda r: f"{r['brier']:.4f} {_interval(r['intervals']['brier'], digits=4)}"),
        (
            f"ECE, {bins} equal-width bins",
            lambda r: f"{_percent(r['calibration']['ece'])} {_interval(r['intervals']['ece'], 100, 2)}",
        ),
        (
            f"adaptive ECE, {bins} equal-mass bins",
            lambda r: f"{_percent(r['calibration']['adaptive_ece'])} {_interval(r['intervals']['adaptive_ece'], 100, 2)}",
        ),
        (
            "maximum calibration error",
            lambda r: f"{_percent(r['calibration']['mce'])} {_interval(r['intervals']['mce'], 100, 2)}",
        ),
        ("temperature, fitted on the validation split", lambda r: f"{r['temperature']:.3f}"),
        ("ECE after temperature scaling", lambda r: _percent(r["calibration_after_temperature"]["ece"])),
        ("adaptive ECE after it", lambda r: _percent(r["calibration_after_temperature"]["adaptive_ece"])),
    ]
    table = _table(["", *found], [[name, *(cell(row) for row in found.values())] for name, cell in rows])
    return (
        f"## Classification and calibration\n\n{table}\n\n![Reliability diagrams](reliability.png)\n\n"
        "![Confusion matrix of the JEM](confusion.png)"
    )


def _out_of_distribution(found):
    tables = []
    for model, sets in found["results"].items():
        scores = list(next(iter(sets.values())))
        rows = [
            [
                name,
                *(
                    f"{row[s]['auroc']:.3f} {_interval(row[s]['intervals']['auroc'])} / {row[s]['average_precision']:.3f} / {row[s]['fpr95']:.3f}"
                    for s in scores
                ),
            ]
            for name, row in sets.items()
        ]
        tables.append(f"### {model}: AUROC / average precision / FPR at 95 % TPR\n\n" + _table(["set", *scores], rows))
        tables.append(f"![Histograms of the scores of the {model}](ood-histograms-{model}.png)")
    sets = "\n".join(f"- {name}: {words}" for name, words in found["sets"].items())
    skipped = "\n".join(f"- skipped: {line}" for line in found["skipped"])
    return "\n\n".join(
        [
            "## Out-of-distribution detection",
            "The positive class is the data out of distribution, the negative class the test set; a high score means out of "
            "distribution. energy is E(x), max_prob minus the largest softmax probability, grad_norm ‖∂E/∂x‖.",
            *tables,
            "![ROC curves](ood-roc.png)",
            sets + ("\n" + skipped if skipped else ""),
        ]
    )


def _robustness(found, sizes):
    parts = ["## Adversarial robustness"]
    if not found["curves"]:
        return "## Adversarial robustness\n\nNot measured (`--attacks none`)."
    parts.append(
        f"PGD, {sizes['attack_steps']} steps of 2.5 ε / steps, {sizes['restarts']} random starts, {sizes['attacked']} test images at "
        f"most; ε on pixels in [0, 1]. jem-{sizes['refined_steps']} is the JEM behind {sizes['refined_steps']} Langevin steps, attacked "
        f"through them ({sizes['refined_attack_steps']} steps, gradients averaged over {sizes['refined_draws']} draws of the noise, "
        f"{sizes['refined']} images)."
    )
    for norm, models in found["curves"].items():
        epsilons = sorted({row["epsilon"] for rows in models.values() for row in rows})
        cells = {name: {row["epsilon"]: row for row in rows} for name, rows in models.items()}
        rows = [
            [
                f"{epsilon:g}",
                *(
                    f"{cell[epsilon]['accuracy']:.3f} {_interval(cell[epsilon]['interval'], digits=2)}"
                    if epsilon in cell
                    else ""
                    for cell in cells.values()
                ),
            ]
            for epsilon in epsilons
        ]
        check = found["checks"][norm]
        title = "L∞" if norm == "linf" else "L2"
        by_steps = ", ".join(f"{steps} steps {value:.3f}" for steps, value in check["accuracy_by_steps"].items())
        parts.append(f"### {title}\n\n" + _table(["ε", *models], rows))
        parts.append(
            f"The attack itself, on the JEM: accuracy {check['accuracy_at_largest_epsilon']:.3f} at the largest ε "
            f"({'it works' if check['falls_to_zero'] else '**not near zero: do not trust the numbers above**'}); at ε = "
            f"{check['epsilon']:g} {by_steps} ({'more steps never help the defender' if check['more_steps_never_help'] else '**more steps helped the defender**'}); "
            f"the loss rises on {100 * check['share_of_steps_on_which_the_loss_rises']:.0f} % of the steps."
        )
    parts.append("![Accuracy against ε](robustness.png)")
    return "\n\n".join(parts)


def _distal(found):
    rows = [[name, *(f"{value:.3f}" for value in values)] for name, values in found.items()]
    classes = [str(label) for label in range(len(next(iter(found.values()))))]
    return (
        "## Distal adversarials\n\nOne image of uniform noise, 100 steps up each class's confidence; the confidence reached, "
        f"and what came out, a row for each model.\n\n{_table(['class', *classes], rows)}\n\n![Distal adversarials](distal.png)"
    )


def _samples(found):
    rows = []
    for kind, row in found["kinds"].items():
        nearest = row.get("distance_to_nearest_training_image")
        near = f"{nearest['median']:.2f} / {nearest['smallest']:.2f}" if nearest else ""
        if "frechet_distance" in row:
            cells = [
                f"{row['frechet_distance']:.2f}",
                f"{row['ratio_to_floor']:.2f}",
                f"{row['precision']:.3f}",
                f"{row['recall']:.3f}",
            ]
            rows.append([kind, *cells, f"{row['entropy']:.4f}", near])
        else:
            rows.append([kind, "", "", "", "", "", near])
    header = [
        "",
        "Fréchet distance",
        "of the floor",
        "precision",
        "recall",
        "class entropy / ln K",
        "nearest training image: median / smallest",
    ]
    return "\n\n".join(
        [
            "## Samples",
            f"Fréchet distance over the {found['feature_dimensions']} features of an independent classifier (not the FID of "
            f"Inception features), {found['images']} images of each kind, to as many test images; the floor is that of training images. "
            f"Fresh chains start in the restart distribution and take {found['fresh_steps']} steps. Distances are L2, pixels on [-1, 1].",
            _table(header, rows),
            "Fresh chains:\n\n![Fresh chains](fresh.png)",
            "Chains of the replay buffer:\n\n![Chains of the buffer](buffer.png)",
            "A random dozen of fresh chains, and below each its nearest training image:\n\n![Nearest training images](nearest.png)",
            "![Distances to the nearest training image](nearest-distances.png)",
        ]
    )


def _class_conditional(found):
    return (
        f"## Class-conditional chains\n\nOf {found['chains']} chains of {found['steps']} steps on E(x, y), started in the class's "
        f"restart distribution, the independent classifier reads {_percent(found['share_as_asked'])} "
        f"{_interval(found['interval'], 100, 1)} as the class that was asked for (of their starts "
        f"{_percent(found['share_of_the_starts'])}). A row for each class:\n\n![Class-conditional chains](class-conditional.png)"
    )


def _long_chains(found):
    rows = [
        [steps, f"{row['frechet_distance']:.2f}", f"{row['ratio_to_floor']:.2f}", f"{row['entropy']:.4f}"]
        for steps, row in found["steps"].items()
    ]
    return (
        f"## Long chains\n\n{found['chains']} fresh chains, judged after more and more steps; the floor is {found['floor']:.2f}, that "
        f"of as many training images.\n\n{_table(['steps', 'Fréchet distance', 'of the floor', 'class entropy / ln K'], rows)}\n\n"
        "The same chains in each row, the number of steps growing downwards:\n\n![Long chains](long-chains.png)"
    )


def _chains(found):
    energies = ", ".join(f"{value:.2f} at step {step}" for step, value in found["mean_energy"].items())
    lags = ", ".join(f"{value:.2f} at lag {lag}" for lag, value in found["autocorrelation_of_energy"].items())
    return (
        f"## Chains\n\n{found['chains']} fresh chains of {found['steps']} steps: mean energy {energies}. In their second half split "
        f"R-hat of the energy is {found['split_rhat_of_energy']:.2f} (1 where chains have mixed), its autocorrelation {lags}. A step "
        f"moves a chain by {found['mean_displacement_per_step']:.3f}; {100 * found['saturated_share_at_end']:.0f} % of the pixels "
        "are saturated at the end.\n\n![Chains](chains.png)"
    )
