"""Report what a joint energy-based model promises, measured, beside the classifier it started from.

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
from torch import nn
from tqdm import tqdm

from sgld_nrg import train_classifier
from sgld_nrg.models import load_model
from sgld_nrg.support.checkpoints import Checkpoint, load_checkpoint, output_folder
from sgld_nrg.support.commands import command_line
from sgld_nrg.support.data import Dataset
from sgld_nrg.support.devices import pick_device
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.flags import DATA_DIR
from sgld_nrg.support.log import git_commit, package_versions, report_files
from sgld_nrg.support.origin import check_same_data, data_dir_of, dataset_of, differences
from sgld_nrg.support.parallel import Alone, processes
from sgld_nrg.support.report import (
    class_conditional,
    classification,
    detection,
    long_chains,
    mixing,
    robustness,
    samples,
)
from sgld_nrg.support.report import study as sizes_of
from sgld_nrg.support.report.study import PRECISION, Study
from sgld_nrg.support.report.words import percent
from sgld_nrg.support.training import Setup

SECTIONS = {
    "classification": classification,
    "out_of_distribution": detection,
    "robustness": robustness,
    "samples": samples,
    "class_conditional": class_conditional,
    "long_chains": long_chains,
    "chains": mixing,
}
FEATURE_SEED = 1_000_003  # of the independent classifier: no training here uses it


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
    models = {"jem": load_model(checkpoint, device).eval()}
    path = Path(args.classifier or Path(args.checkpoint).with_name("classifier.pt"))
    if args.classifier or path.exists():
        models["classifier"] = load_model(_classifier(path, dataset, args), device).eval()
    with ranks.first_on_each_node():  # here, so that a mistake is told before anything is measured
        ood = detection.ood_sets(dataset, args, sizes["ood"], device)
    with output_folder(args, ranks) as folder:
        network = feature_network(dataset, folder, device, ranks)
        study = Study(args, sizes, device, dataset, checkpoint, models, network, ood, folder)
        found = {}
        mine = list(SECTIONS)[ranks.rank :: ranks.count]
        bar = tqdm(mine, disable=None if ranks.first else True)
        for name in bar:
            bar.set_description(name)
            found[name] = SECTIONS[name].measure(study)
        gathered = ranks.gathered_at_first(found)
        if not ranks.first:
            return
        everything = {name: part for found in gathered for name, part in found.items()}
        found = {"protocol": protocol(study, path if "classifier" in models else None)}
        found |= {name: everything[name] for name in SECTIONS}
        (folder / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        (folder / "report.md").write_text(markdown(found))
        print(summary(found))
        report_files(args, [folder / name for name in ("report.md", "report.json")])


def _classifier(path: Path, dataset: Dataset, args: Namespace) -> Checkpoint:
    """Return the checkpoint of the classifier to compare with, of the same data."""
    found = load_checkpoint(path, "classifier")
    if found["dataset"] != dataset.name:
        raise UserError(
            f"{str(path)!r} was trained on {found['dataset']}, the JEM on {dataset.name}: "
            "name another --classifier"
        )
    check_same_data(found, dataset, args, f"the classifier {path}")
    return found


def feature_network(
    dataset: Dataset, folder: Path, device: torch.device, ranks: Alone
) -> nn.Module:
    """Return the independent classifier whose features judge samples; trained if missing.

    A small-cnn of its own seed, deep enough that its last map has one pixel; the features are its
    head's input (N, D). Its settings are its own but for the augmentation, so that a preset that
    changes is judged by the same network as before.
    """
    place = folder / f"feature-classifier-{dataset.name}"

    def make() -> Checkpoint:
        path = place / "classifier.pt"
        found = load_checkpoint(path, "classifier") if path.exists() else None
        if found and differences(found, dataset)[0]:
            print(f"the feature network in {str(place)!r} was of other data: it is replaced")
            found = None
        if found and found["finished"]:
            return found
        place.mkdir(exist_ok=True)
        epochs, decay = (3, 0.998) if len(dataset.train.labels) > 10_000 else (15, 0.99)
        depth = dataset.shape[1].bit_length() - 1
        flags = (
            f"--dataset {dataset.name} --arch small-cnn --width 16 --depth {depth} --stem-stride 1 "
            f"--seed {FEATURE_SEED} --epochs {epochs} --batch-size 64 --lr 1e-3 --lr-floor 0 "
            f"--warmup-iterations 200 --ema-decay {decay} --input-noise 0.04"
        )
        settings = parse("train_classifier", flags.split())
        setup = Setup(dataset, place, device, Alone())
        return train_classifier.train(settings, setup, found, go_on=train_classifier.AGAIN)

    return load_model(ranks.from_first(make), device)


def protocol(study: Study, classifier: Path | None) -> dict[str, Any]:
    """Return what a reader must know to repeat the measurement."""
    dataset, checkpoint = study.dataset, study.checkpoint
    return {
        "command": command_line("python evaluate.py", study.args),
        "data_set": dataset.name,
        "classes": list(dataset.classes),
        "checkpoint": str(study.args.checkpoint),
        "classifier": classifier and str(classifier),
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
    for kind in ("buffer", "fresh"):
        ratio = found["samples"]["kinds"][kind]["ratio_to_floor"]
        lines.append(f"{kind} chains: {ratio:.2f} times the Fréchet floor")
    return "\n".join(lines)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    device = pick_device(args.device)
    with processes(device) as ranks:
        evaluate(args, device, ranks)


if __name__ == "__main__":
    main(args)
