"""Rewrite the tables of the documents from the files that commands wrote.

    python results/tables.py

A table stands between "<!-- table NAME -->" and "<!-- end of table NAME -->", a number between
"<!-- NAME -->" and "<!-- end -->", in README.md and results/*.md. They come from results/reports,
what evaluate.py wrote, and from results/looks.csv, a line for each look at a test set.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.parser import Parser, flag
from sgld_nrg.support.presets import PRESETS
from sgld_nrg.support.report.words import table

ROOT = Path(__file__).resolve().parent.parent
SEEDS = ("mnist-0", "mnist-1", "mnist-2")
SHIPPED = ("mnist", "fashion-mnist", "cifar10")  # results/NAME.pt, reports/shipped-NAME.json
MODELS = {"jem": "JEM", "control": "attacks alone", "classifier": "plain classifier"}
SCORES = ("detector", "energy")
JUDGES = {"convmixer": "ConvMixer", "vgg": "VGG"}  # the one that finds larger ratios first
IN_TRAINING = ("constant", "black", "white", "inverted")  # among the outliers of a JEM's training
NOISY = "training images with the training's noise"
CLEANED = "fresh, cleaned"
FIRST_RADII = {"linf": "L∞ 0.1", "l2": "L2 1.5"}
# What the presets of MNIST and of the paper's run differ in, and why.
DIFFERENCES = {
    "arch": ("network", "a CPU can train it"),
    "p_x_weight": ("weight of log p(x)", "accuracy, robustness"),
    "steps": ("Langevin steps", "more iterations"),
    "step_size": ("step size", "with the noise, the temperature"),
    "noise_std": ("noise of a step", "warmer chains calibrate"),
    "pixel_grad_clip": ("bound of a pixel's gradient", "stability (JEM++, ICCV 2021)"),
    "clamp": ("pixels within ±", "black stays black"),
    "chain_batch_size": ("chains an iteration", "more iterations"),
    "long_chains": ("chains that never restart", "against drift"),
    "energy_reg": ("weight of E²", "energies near zero"),
    "outlier_weight": ("weight of the outlier loss", "detection"),
    "clean_share": ("cross-entropy on images as they are", "calibration"),
    "adversarial_eps": ("adversarial training, L∞", "robustness"),
    "lr": ("learning rate", "fewer iterations"),
    "ema_decay": ("averaging of the weights", "fresh chains"),
}

Report = dict[str, Any]
Value = Callable[[Report], float]


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    check = flag("--check", bool, "write nothing; end with an error if a document is stale")
    return Parser(__doc__, (("output", (check,)),)).parse(argv)


def spread(reports: Iterable[Report], value: Value, digits: int = 3, scale: float = 1) -> str:
    """Return the mean of a value over reports, and its standard deviation unless it rounds to 0."""
    values = [scale * value(report) for report in reports]
    mean = f"{statistics.mean(values):.{digits}f}"
    deviation = f"{statistics.stdev(values) if len(values) > 1 else 0:.{digits}f}"
    return f"{mean} ± {deviation}" if float(deviation) else mean


def accuracy(model: str) -> Value:
    """Return what reads a model's accuracy on the test set, in 0 to 1."""
    return lambda report: report["classification"][model]["accuracy"]


def ece(model: str, when: str = "calibration") -> Value:
    """Return what reads the ECE, in 0 to 1; when: a key, before or after the temperature."""
    return lambda report: report["classification"][model][when]["ece"]


def attacked(model: str, norm: str, which: int) -> Value:
    """Return what reads the accuracy under attack at the which-th epsilon, 0 being none."""
    return lambda report: report["robustness"]["curves"][norm][model][which]["accuracy"]


def auroc(model: str, data: str, score: str) -> Value:
    """Return what reads the AUROC of a model's score on a set, the set being positive."""
    return lambda report: report["out_of_distribution"]["results"][model][data][score]["auroc"]


def lowest(model: str, score: str) -> Value:
    """Return what reads the lowest AUROC over the sets that no training saw."""

    def value(report: Report) -> float:
        sets = [name for name in report["out_of_distribution"]["sets"] if name not in IN_TRAINING]
        return min(auroc(model, name, score)(report) for name in sets)

    return value


def sampled(judge: str, kind: str, score: str = "ratio_to_floor") -> Value:
    """Return what reads a judge's score of a kind of images."""
    return lambda report: report["samples"]["judges"][judge]["kinds"][kind][score]


def aged(judge: str, steps: str) -> Value:
    """Return what reads a judge's Fréchet ratio of chains after so many steps."""
    return lambda report: report["long_chains"]["judges"][judge]["steps"][steps]["ratio_to_floor"]


def read_as(judge: str, kind: str) -> Value:
    """Return what reads the share of class-conditional chains that a judge reads as asked."""
    return lambda report: report["class_conditional"]["judges"][judge][kind]["share"]


def summary(reports: list[Report], sets: dict[str, str]) -> str:
    """Return the main table: a row for each promise, a column for each model.

    sets: {name in the report: name in the table} of the sets that have a row of their own.
    """

    def percent(value: Value, digits: int = 2) -> str:
        return spread(reports, value, digits, 100) + " %"

    def by_score(label: str, value: Callable[[str, str], Value]) -> list[str]:
        cells = [
            " / ".join(spread(reports, value(model, score)) for score in SCORES) for model in MODELS
        ]
        return [f"{label}: detector / energy", *cells]

    def of_jem(label: str, cells: Iterable[str]) -> list[str]:
        return [label, " / ".join(cells), "", ""]

    rows = [
        ["accuracy", *(percent(accuracy(model)) for model in MODELS)],
        ["ECE, 15 bins", *(percent(ece(model)) for model in MODELS)],
    ]
    for norm, name in FIRST_RADII.items():
        cells = [spread(reports, attacked(model, norm, 1)) for model in MODELS]
        rows.append([f"accuracy under APGD, {name}", *cells])
    for data, name in sets.items():
        rows.append(by_score(f"AUROC, {name}", lambda model, score, d=data: auroc(model, d, score)))
    rows.append(by_score("lowest AUROC of the sets not in training", lowest))
    for judge, name in JUDGES.items():
        values = (sampled(judge, "buffer"), sampled(judge, "fresh"), aged(judge, "1000"))
        label = f"Fréchet ratio, {name}: buffer / fresh / 1,000 steps"
        rows.append(of_jem(label, (spread(reports, value, 1) for value in values)))
    return table(["", *MODELS.values()], rows)


def shipped(reports: dict[str, Report]) -> str:
    """Return a row for each promise, a column for each model that comes with the project."""

    def cells(value: Value, digits: int = 3, scale: float = 1, unit: str = "") -> list[str]:
        return [f"{scale * value(report):.{digits}f}{unit}" for report in reports.values()]

    def joined(*parts: list[str]) -> list[str]:
        return [" / ".join(cell) for cell in zip(*parts, strict=True)]

    def under_attack(report: Report) -> str:
        points = (report["robustness"]["curves"][norm]["jem"][1] for norm in FIRST_RADII)
        return " / ".join(f"{p['accuracy']:.3f} ({p['epsilon']:.2g})" for p in points)

    def unfamiliar(alpha: str) -> Value:
        return lambda report: report["unfamiliar"]["promises"][alpha]["unfamiliar"]["share"]

    fresh = {
        what: joined(*(cells(sampled(judge, kind), 1) for judge in JUDGES))
        for what, kind in (("fresh", "fresh"), ("cleaned", CLEANED))
    }
    judges = " / ".join(JUDGES.values())
    rows = [
        ["accuracy", *cells(accuracy("jem"), 2, 100, " %")],
        ["ECE", *cells(ece("jem"), 2, 100, " %")],
        ["APGD, L∞ / L2 (radius)", *map(under_attack, reports.values())],
        [
            "lowest AUROC of the sets not in training: detector / energy",
            *joined(*(cells(lowest("jem", score)) for score in SCORES)),
        ],
        [
            "called unfamiliar at α = 1 / 5 / 10 %",
            *joined(*(cells(unfamiliar(alpha), 2, 100, " %") for alpha in ("0.01", "0.05", "0.1"))),
        ],
        *([f"Fréchet ratio of {what} chains, {judges}", *row] for what, row in fresh.items()),
    ]
    return table(["", *(f"`{name}.pt`" for name in reports)], rows)


def photographs(report: Report) -> str:
    """Return the results on CIFAR-10 beside the plain classifier's and the paper's."""

    def both(value: Callable[[str], Value], digits: int, scale: float, unit: str = "") -> list[str]:
        models = ("jem", "classifier")
        return [f"{scale * value(model)(report):.{digits}f}{unit}" for model in models]

    scores = [both(lambda m, s=score: auroc(m, "test", s), 3, 1) for score in SCORES]
    ratios = [
        " / ".join(f"{sampled(judge, kind)(report):.1f}" for kind in ("fresh", CLEANED))
        for judge in JUDGES
    ]
    rows = [
        ["accuracy", *both(accuracy, 2, 100, " %"), "92.9 %"],
        ["ECE, 15 bins", *both(ece, 2, 100, " %"), ""],
        [
            "under APGD, 60 images (paper: AutoAttack), L2 0.5",
            *both(lambda model: attacked(model, "l2", 1), 3, 1),
            "0.405",
        ],
        [
            "AUROC, CIFAR-100: detector / energy (paper: best)",
            *(" / ".join(pair) for pair in zip(*scores, strict=True)),
            "0.87",
        ],
        [
            f"Fréchet ratio, fresh / cleaned: {', '.join(JUDGES.values())}",
            ", ".join(ratios),
            "",
            "",
        ],
    ]
    return table(["", "JEM", "plain classifier", "the paper's JEM"], rows)


def density(reports: list[Report]) -> str:
    """Return the sentence that says what the density buys and costs against attacks alone."""

    def instead(value: Callable[[str], Value], digits: int = 3, scale: float = 1) -> str:
        jem, control = (
            scale * statistics.mean(map(value(model), reports)) for model in ("jem", "control")
        )
        return f"{jem:.{digits}f} instead of {control:.{digits}f}"

    interpolated, kmnist = (
        instead(lambda model, d=data: auroc(model, d, "detector"))
        for data in ("interpolations", "kmnist-test")
    )
    linf, l2 = (instead(lambda model, n=norm: attacked(model, n, 1)) for norm in FIRST_RADII)
    rotated = instead(lambda model: auroc(model, "rotated", "energy"))
    return (
        "Beside attacks alone, the density buys samples and, by the detector, an AUROC of "
        f"{interpolated} on interpolated digits and of {kmnist} on KMNIST; it costs accuracy "
        f"({instead(accuracy, 2, 100)} %), also under L∞ ({linf}) and L2 ({l2}), calibration (an "
        f"ECE of {instead(ece, 2, 100)} %) and, by energy, rotated digits (an AUROC of {rotated})."
    )


def classification(reports: list[Report]) -> str:
    """Return accuracy and calibration of each model."""
    rows = [
        [
            name,
            spread(reports, accuracy(model), 2, 100) + " %",
            spread(reports, ece(model), 2, 100) + " %",
            spread(reports, lambda report, m=model: report["classification"][m]["temperature"], 2),
            spread(reports, ece(model, "calibration_after_temperature"), 2, 100) + " %",
        ]
        for model, name in MODELS.items()
    ]
    header = ["", "accuracy", "ECE", "fitted temperature", "ECE after it"]
    return table(header, rows)


def robustness(reports: list[Report]) -> str:
    """Return the accuracy of each model, and of the JEM behind Langevin steps, under attack."""
    rows = []
    for norm, name in (("linf", "L∞"), ("l2", "L2")):
        points = reports[0]["robustness"]["curves"][norm]["jem"]
        for which in (1, 2):
            cells = [spread(reports, attacked(model, norm, which)) for model in MODELS]
            behind = spread(reports, attacked("jem-5", norm, which)) if which == 1 else ""
            rows.append([f"{name}, {points[which]['epsilon']:g}", *cells, behind])
    return table(["ε", *MODELS.values(), "JEM behind 5 steps, 40 images"], rows)


def unlike(reports: list[Report]) -> str:
    """Return the AUROC of each model's detector and energy on each set."""
    rows = []
    for data in reports[0]["out_of_distribution"]["sets"]:
        cells = [spread(reports, auroc(model, data, score)) for score in SCORES for model in MODELS]
        rows.append([data + " (in training)" * (data in IN_TRAINING), *cells])
    header = [f"{score}: {name}" for score in SCORES for name in MODELS.values()]
    return table(["", *header], rows)


def promise(reports: list[Report]) -> str:
    """Return how often the detector errs on test images."""
    rows = []
    for alpha in reports[0]["unfamiliar"]["promises"]:
        found = [report["unfamiliar"]["promises"][alpha] for report in reports]
        shares = [
            spread(found, lambda row, k=kind: row[k]["share"], 2, 100) + " %"
            for kind in ("unfamiliar", "label_missed")
        ]
        rows.append([f"{100 * float(alpha):g} %", *shares])
    return table(["promised, at most", "called unfamiliar", "true class ruled out"], rows)


def disturbed(reports: list[Report]) -> str:
    """Return how often the detector calls disturbed test images unfamiliar."""
    rows = [
        [name, spread(reports, lambda r, n=name: r["unfamiliar"]["disturbed"][n]["share"], 1, 100)]
        for name in reports[0]["unfamiliar"]["disturbed"]
    ]
    return table(["test images with", "called unfamiliar at α = 5 %, in %"], rows)


def samples(reports: list[Report]) -> str:
    """Return how near to the data the buffer's and fresh chains are, by each judge."""
    rows = [
        [
            name,
            kind,
            spread(reports, sampled(judge, kind), 2),
            spread(reports, sampled(judge, kind, "precision"), 2),
            spread(reports, sampled(judge, kind, "recall"), 2),
        ]
        for judge, name in JUDGES.items()
        for kind in reports[0]["samples"]["judges"][judge]["kinds"]
    ]
    return table(["judge", "10,000", "Fréchet ratio", "precision", "recall"], rows)


def long_chains(reports: list[Report]) -> str:
    """Return the Fréchet ratio after more and more steps, by each judge."""
    rows = [
        [f"{int(steps):,}", *(spread(reports, aged(judge, steps), 1) for judge in JUDGES)]
        for steps in reports[0]["long_chains"]["judges"]["vgg"]["steps"]
    ]
    return table(["steps", *JUDGES.values()], rows)


def classes(reports: list[Report]) -> str:
    """Return the share of class-conditional chains that each judge reads as asked."""
    kinds = ("of_the_starts", "as_asked", "changed_before", "changed")
    rows = [
        [name, *(spread(reports, read_as(judge, kind), 1, 100) + " %" for kind in kinds)]
        for judge, name in JUDGES.items()
    ]
    header = ["judge", "own class: at the start", "after 30 steps"]
    return table([*header, "another class: at the start", "after 100 steps"], rows)


def between(values: Iterable[float]) -> str:
    """Return the range of some numbers, rounded, in words."""
    low, *_, high = sorted(values)
    return f"{low:.0f} to {high:.0f}"


def in_sentences(mnist: list[Report], fashion: list[Report], ships: Report) -> dict[str, str]:
    """Return the numbers that stand in sentences."""
    ratios = [sampled(judge, kind) for judge in JUDGES for kind in ("buffer", "fresh")]
    fresh = [statistics.mean(map(sampled(judge, "fresh"), mnist)) for judge in JUDGES]
    changed = [read_as(judge, "changed") for judge in JUDGES]
    checks = [check for report in mnist for check in report["robustness"]["checks"].values()]
    square, stronger = ([check[name] for check in checks] for name in ("square", "stronger"))
    attacked_by_square, still_standing = (
        sum(row["images"] for row in rows) for rows in (square, stronger)
    )
    more = sum((row["white_box"] - row["both"]) * row["images"] for row in square)
    return {
        "square": f"{more:.0f} of {attacked_by_square:,}",
        "stronger": f"{sum(row['broken'] for row in stronger)} of {still_standing:,}",
        "largest": f"{max(check['accuracy_at_largest'] for check in checks):.3f}",
        "judges": f"{max(fresh) / min(fresh):.0f}",
        "changed": between(100 * value(report) for value in changed for report in mnist),
        "fashion-ratios": between(value(report) for value in ratios for report in fashion),
        **{f"noise-{judge}": f"{sampled(judge, NOISY)(ships):.1f}" for judge in JUDGES},
        **{f"cleaned-{judge}": f"{sampled(judge, CLEANED)(ships):.1f}" for judge in JUDGES},
        "fashion-energy": spread(fashion, auroc("jem", "mnist", "energy")),
    }


def ablation(rows: list[dict[str, str]]) -> str:
    """Return the mean AUROC over the sets made for choosing, by what the detector judges."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["kind"] == "strange":
            found.setdefault((row["judged"], row["model"]), []).append(float(row["auroc"]))
    choices = dict.fromkeys(row["judged"] for row in rows)
    shown = [name for name in choices if "not rounded" not in name]
    cells = [
        [name, *(f"{statistics.mean(found[name, model]):.3f}" for model in MODELS)]
        for name in shown
    ]
    return table(["what is judged", *MODELS.values()], cells)


def counted(looks: list[dict[str, str]]) -> str:
    """Return the number of looks at each test set."""
    return table(["test set", "looks"], sorted(Counter(look["data_set"] for look in looks).items()))


def differences() -> str:
    """Return what the paper's run and MNIST's preset set differently."""
    rows = []
    for name, (what, why) in DIFFERENCES.items():
        values = (PRESETS[preset][name] for preset in ("paper", "mnist"))
        cells = (value if isinstance(value, str) else f"{value:g}" for value in values)
        rows.append([f"{what}, `--{name.replace('_', '-')}`", *cells, why])
    return table(["what, flag", "paper", "here", "why"], rows)


def parts(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the tables and the numbers of the documents are to be, by their names.

    Raises UserError if a file that they come from is missing.
    """
    try:
        reports = {
            name: json.loads((root / f"results/reports/{name}.json").read_text())
            for name in (*SEEDS, "fashion-mnist-0", *(f"shipped-{name}" for name in SHIPPED))
        }
        looks, ablated = (
            list(csv.DictReader((root / f"results/{name}.csv").read_text().splitlines()))
            for name in ("looks", "detector-ablation")
        )
    except FileNotFoundError as error:
        raise UserError(f"the tables need {error.filename}, which is missing") from error
    mnist = [reports[name] for name in SEEDS]
    fashion = [reports["fashion-mnist-0"]]
    makers = (classification, robustness, unlike, promise, disturbed, samples)
    makers += (long_chains, classes, density)
    tables = {make.__name__: make(mnist) for make in makers}
    tables["mnist"] = summary(mnist, {"kmnist-test": "KMNIST"})
    tables["shipped"] = shipped({name: reports[f"shipped-{name}"] for name in SHIPPED})
    tables["cifar10"] = photographs(reports["shipped-cifar10"])
    tables |= {"looks": counted(looks), "differences": differences(), "ablation": ablation(ablated)}
    return tables, {
        "looks": str(len(looks)),
        **in_sentences(mnist, fashion, reports["shipped-mnist"]),
    }


def rewritten(text: str, tables: dict[str, str], numbers: dict[str, str]) -> str:
    """Return a document with every table and number as it is to be.

    Raises UserError for one that has no such name.
    """

    def fresh_table(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- table {name} -->\n\n{named(tables, name)}\n\n<!-- end of table {name} -->"

    def fresh_number(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->{named(numbers, found[1])}<!-- end -->"

    text = re.sub(r"<!-- table (\S+) -->.*?<!-- end of table \1 -->", fresh_table, text, flags=re.S)
    return re.sub(r"<!-- (\S+) -->[^<\n]*<!-- end -->", fresh_number, text)


def named(made: dict[str, str], name: str) -> str:
    """Return what was made under a name; raises UserError if nothing was."""
    if name not in made:
        raise UserError(f"no table or number is called {name!r}; there are {', '.join(made)}")
    return made[name]


def stale(root: Path = ROOT) -> dict[Path, str]:
    """Return what the documents whose tables or numbers are not those of the files should say."""
    made = parts(root)
    documents = {path: path.read_text() for path in documents_of(root)}
    fresh = {path: rewritten(text, *made) for path, text in documents.items()}
    return {path: text for path, text in fresh.items() if text != documents[path]}


def documents_of(root: Path) -> list[Path]:
    """Return the documents that may have tables or numbers."""
    return [root / "README.md", *sorted((root / "results").glob("*.md"))]


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    found = stale()
    for path, text in found.items():
        if not args.check:
            path.write_text(text)
        print(f"{path.relative_to(ROOT)}: {'stale' if args.check else 'rewritten'}")
    if args.check and found:
        raise UserError("run python results/tables.py")


if __name__ == "__main__":
    main(parse())
