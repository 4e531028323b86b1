"""Report what a joint energy-based model promises, measured beside models without a density.

    python evaluate.py --checkpoint results/digits/jem.pt --quick

writes report.json, report.md and its figures: classification, calibration, out-of-distribution
detection, adversarial robustness, samples and chains.
"""

from __future__ import annotations

try:
    from sgld_nrg.support.commands import parse
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; run: pip install -r requirements.txt") from None

if __name__ == "__main__":
    args = parse("evaluate", doc=__doc__)  # here, so that --help answers before torch loads

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sgld_nrg.models import load_model
from sgld_nrg.support import looks
from sgld_nrg.support.checkpoints import Checkpoint, has_density, load_checkpoint, output_folder
from sgld_nrg.support.commands import command_line
from sgld_nrg.support.data import Dataset
from sgld_nrg.support.devices import pick_device
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.flags import DATA_DIR
from sgld_nrg.support.judges import judges
from sgld_nrg.support.log import git_commit, package_versions, report_files
from sgld_nrg.support.origin import check_same_data, data_dir_of, dataset_of
from sgld_nrg.support.parallel import Alone, over_cores, processes
from sgld_nrg.support.report import (
    class_conditional,
    classification,
    detection,
    long_chains,
    mixing,
    robustness,
    samples,
    unfamiliar,
)
from sgld_nrg.support.report import study as sizes_of
from sgld_nrg.support.report.study import PRECISION, Study
from sgld_nrg.support.report.words import percent, ratio

SECTIONS = {
    "classification": classification,
    "out_of_distribution": detection,
    "unfamiliar": unfamiliar,
    "robustness": robustness,
    "samples": samples,
    "class_conditional": class_conditional,
    "long_chains": long_chains,
    "chains": mixing,
}
LONG = ("robustness", "long_chains", "samples", "out_of_distribution", "classification")
LONGEST_FIRST = (*LONG, *(name for name in SECTIONS if name not in LONG))
COMPARED = {"classifier": "classifier.pt", "control": "control.pt"}  # what may lie beside jem.pt


def evaluate(args: Namespace, device: torch.device, ranks: Alone) -> None:
    """Measure everything and write the report; several ranks share out the sections."""
    checkpoint = load_checkpoint(args.checkpoint, "jem", device)
    args.data_dir = data_dir_of(checkpoint, args.data_dir)
    with ranks.first_on_each_node():
        dataset = dataset_of(checkpoint, args)
    if dataset.name == "folder":  # torchvision's sets lie elsewhere, and are not to come here
        args.data_dir = DATA_DIR.default
    sizes = sizes_of.DRY_RUN if args.dry_run else sizes_of.QUICK if args.quick else sizes_of.FULL
    sizes = {**sizes, "bins": args.bins, "longest": args.longest_chain or sizes["longest"]}
    if device.type == "cuda":  # which does more in the same minutes
        sizes |= {"attacked": 2 * sizes["attacked"], "long_chains": sizes["samples"]}
    sizes["attacked"] = args.attacked or sizes["attacked"]
    sizes["long_chains"] = args.chains or sizes["long_chains"]
    compared = {name: _compared(name, dataset, args) for name in COMPARED}
    found = {name: state for name, state in {**compared, "jem": checkpoint}.items() if state}
    models = {name: load_model(state, device).eval() for name, state in found.items()}
    detectors = {name: state["detector"] for name, state in found.items() if "detector" in state}
    with ranks.first_on_each_node():  # here, so that a mistake is told before anything is measured
        ood = detection.ood_sets(dataset, args, sizes["ood"], device)
    with output_folder(args, ranks) as folder:
        place = folder / "judges" if args.dry_run else Path(args.judges)
        networks = judges(dataset, place, device, ranks, 3 if args.dry_run else None)
        study = Study(
            args, sizes, device, dataset, checkpoint, models, networks, ood, folder, detectors
        )
        if ranks.first:
            looks.record("python evaluate.py", args, dataset.name, "report")
        mine = LONGEST_FIRST[ranks.rank :: ranks.count]
        work = over_cores(lambda name: SECTIONS[name].measure(study), mine, device)
        found = dict(tqdm(work, "sections", len(mine), disable=None if ranks.first else True))
        gathered = ranks.gathered_at_first(found)
        if not ranks.first:
            return
        everything = {name: part for found in gathered for name, part in found.items()}
        found = {"protocol": protocol(study)}
        found |= {name: everything[name] for name in SECTIONS}
        (folder / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        (folder / "report.md").write_text(markdown(found))
        print(summary(found))
        report_files(args, [folder / name for name in ("report.md", "report.json")])


def _compared(name: str, dataset: Dataset, args: Namespace) -> Checkpoint | None:
    """Return the checkpoint of a model to compare with, as named or beside the JEM, if any."""
    given = getattr(args, name)
    path = Path(given or Path(args.checkpoint).with_name(COMPARED[name]))
    if not given and not path.exists():
        return None
    found = load_checkpoint(path, "classifier" if name == "classifier" else "jem")
    if found["dataset"] != dataset.name:
        raise UserError(
            f"{str(path)!r} was trained on {found['dataset']}, the JEM on {dataset.name}: "
            f"name another --{name}"
        )
    if name == "control" and has_density(found["args"]):
        raise UserError(
            f"{str(path)!r} has a density, so it is no control: train one with --p-x-weight 0, "
            "or name another --control"
        )
    check_same_data(found, dataset, args, f"the {name} {path}")
    return found


def protocol(study: Study) -> dict[str, Any]:
    """Return what a reader must know to repeat the measurement."""
    dataset, checkpoint = study.dataset, study.checkpoint
    return {
        "command": command_line("python evaluate.py", study.args),
        "data_set": dataset.name,
        "classes": list(dataset.classes),
        "checkpoint": str(study.args.checkpoint),
        "models": list(study.models),
        "seed": study.args.seed,
        "sizes": study.sizes,
        "splits": {name: len(getattr(dataset, name).labels) for name in ("train", "val", "test")},
        "sgld": checkpoint["sgld"],
        "precision": PRECISION,
        "packages": package_versions(),
        "git_commit": git_commit(),
    }


def markdown(found: dict[str, Any]) -> str:
    """Return report.md for what was found, the dict that is written as report.json."""
    protocol = found["protocol"]
    parts = [
        f"# Report: JEM on {protocol['data_set']}",
        f"Made by `{protocol['command']}`; test images {protocol['splits']['test']}, seed "
        f"{protocol['seed']}, commit {protocol['git_commit']}, torch "
        f"{protocol['packages']['torch']}. In brackets bootstrap 95 % intervals over the images. "
        "Every number with its protocol and sample size is in `report.json`.",
    ]
    parts += [part.words(found[name], protocol["sizes"]) for name, part in SECTIONS.items()]
    return "\n\n".join(parts) + "\n"


def summary(found: dict[str, Any]) -> str:
    """Return the few lines that the script prints at its end."""
    lines = []
    for name, row in found["classification"].items():
        ece = percent(row["calibration"]["ece"])
        lines.append(f"{name}: accuracy {percent(row['accuracy'])}, ECE {ece}")
    for name, judge in found["samples"]["judges"].items():
        rows = {kind: row for kind, row in judge["kinds"].items() if "training" not in kind}
        ratios = "; ".join(f"{kind} {ratio(row)}" for kind, row in rows.items())
        lines.append(f"times the Fréchet floor, judge {name}: {ratios}")
    return "\n".join(lines)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    device = pick_device(args.device)
    with processes(device) as ranks:
        evaluate(args, device, ranks)


if __name__ == "__main__":
    main(args)
