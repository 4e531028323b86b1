"""Report what a joint energy-based model promises, measured, with the plain classifier it started from beside it.

    python evaluate.py --checkpoint results/digits/jem.pt --quick

writes report.json, report.md and its figures: classification, calibration, out-of-distribution detection, adversarial
robustness, samples and chains.
"""

from __future__ import annotations

import cli


def build_parser():
    """Return the parser of this script's command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    cli.add_data_dir_flag(group)
    group.add_argument(
        "--ood", nargs="+", metavar="NAME_OR_PATH",
        help="out-of-distribution sets: names of data.py, .npz or .npy files of images, folders of image files; without it "
        "all that are made from the test images and all of torchvision's that lie under --data-dir",
    )  # fmt: skip
    group.add_argument(
        "--download", action="store_true", help="download torchvision's out-of-distribution sets that are missing"
    )
    group = parser.add_argument_group("model")
    cli.add_checkpoint_flag(group)
    cli.add_classifier_flag(group)
    group = parser.add_argument_group("measurement")
    group.add_argument(
        "--attacks", nargs="+", choices=("linf", "l2", "none"), default=["linf", "l2"], help="norms of the attacks"
    )
    group.add_argument("--bins", type=cli.positive_int, default=15, help="equal-width bins of the calibration errors")
    group.add_argument(
        "--longest-chain", type=cli.positive_int, metavar="STEPS",
        help="Langevin steps after which the long chains end; without it 10000, with --quick 100",
    )  # fmt: skip
    group.add_argument("--quick", action="store_true", help="smaller samples and fewer attacks: an answer within a minute")
    cli.add_run_flags(parser)
    return parser


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    if "none" in args.attacks and len(args.attacks) > 1:
        parser.error("--attacks none cannot stand beside a norm")
    return args


if __name__ == "__main__":
    parse_args()  # --help and mistyped flags answer here, before torch is loaded

import json
from pathlib import Path

from tqdm import tqdm

import chain_quality
import data
import measurements
import parallel
import plots
import report
import runs
from cli import UserError

EPSILONS = {"linf": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5), "l2": (0.25, 0.5, 1.0, 1.5, 3.0, 10.0)}  # pixels on [0, 1]
# Sizes: images of each kind, and the steps, restarts and random draws of the attacks.
FULL = {
    "ood": 10_000, "attacked": 1000, "attack_steps": 40, "restarts": 2, "epsilons": EPSILONS,
    "refined": 100, "refined_steps": 5, "refined_attack_steps": 20, "refined_draws": 2,
    "refined_epsilons": {"linf": (0.05, 0.1, 0.2), "l2": (0.5, 1.5, 3.0)},
    "samples": 10_000, "conditional": 1000, "long_chains": 400, "longest": 10_000, "chains": 64, "chain_steps": 300,
    "resamples": 200,
}  # fmt: skip
QUICK = {
    "ood": 1000, "attacked": 100, "attack_steps": 10, "restarts": 1,
    "epsilons": {"linf": (0.05, 0.1, 0.5), "l2": (0.5, 1.5, 10.0)},
    "refined": 32, "refined_steps": 3, "refined_attack_steps": 5, "refined_draws": 2,
    "refined_epsilons": {"linf": (0.1,), "l2": (1.5,)},
    "samples": 1000, "conditional": 200, "long_chains": 200, "longest": 100, "chains": 32, "chain_steps": 60,
    "resamples": 100,
}  # fmt: skip
DRY_RUN = {
    **QUICK, "ood": 50, "attacked": 8, "attack_steps": 2, "refined": 4, "refined_attack_steps": 1,
    "samples": 100, "conditional": 40, "long_chains": 20, "longest": 10, "chains": 4, "chain_steps": 8, "resamples": 40,
}  # fmt: skip


def evaluate(args, device):
    """Measure everything and write the report; several ranks share the sections out among them."""
    checkpoint = runs.load_checkpoint(args.checkpoint, "jem", device)
    with parallel.first_on_each_node():
        dataset = data.load(checkpoint["dataset"], args.data_dir, checkpoint["model_config"]["image_size"])
    sizes = {**(DRY_RUN if args.dry_run else QUICK if args.quick else FULL), "bins": args.bins}
    if args.longest_chain:
        sizes["longest"] = args.longest_chain
    models = {"jem": runs.load_model(checkpoint, device).eval()}
    path = args.classifier or Path(args.checkpoint).with_name("classifier.pt")
    if args.classifier or path.exists():
        classifier = runs.load_checkpoint(path, "classifier", device)
        if classifier["dataset"] != dataset.name:
            raise UserError(
                f"{str(path)!r} was trained on {classifier['dataset']}, the JEM on {dataset.name}: name another --classifier"
            )
        models["classifier"] = runs.load_model(classifier, device).eval()
    jem = models["jem"]
    with parallel.first_on_each_node():
        ood = measurements.ood_sets(dataset, args, sizes, device)  # here, so that a mistake is told before anything is measured
    with runs.run_folder(args) as folder:
        network = chain_quality.feature_network(dataset, folder, device)
        sections = {
            "classification": lambda: measurements.classification(models, dataset, sizes),
            "out_of_distribution": lambda: measurements.out_of_distribution(models, dataset, ood, sizes, folder, device),
            "robustness": lambda: measurements.robustness(models, checkpoint, dataset, args, sizes, folder, device),
            "distal_adversarials": lambda: measurements.distal_adversarials(models, args, folder, device, dataset.shape),
            "samples": lambda: chain_quality.samples(checkpoint, jem, network, dataset, args, sizes, folder, device),
            "class_conditional": lambda: chain_quality.class_conditional(
                checkpoint, jem, network, dataset, args, sizes, folder, device
            ),
            "long_chains": lambda: chain_quality.long_chains(checkpoint, jem, network, dataset, args, sizes, folder, device),
            "chains": lambda: chain_quality.chains(checkpoint, jem, args, sizes, folder, device),
        }
        found = {"protocol": protocol(args, checkpoint, sizes, path if "classifier" in models else None, dataset)}
        bar = tqdm(list(sections)[parallel.rank() :: parallel.ranks()], disable=None if parallel.first() else True)
        for name in bar:
            bar.set_description(name)
            found[name] = sections[name]()
        everything = {name: part for found in parallel.gathered_at_first(found) for name, part in found.items()}
        if not parallel.first():
            return
        found = {name: everything[name] for name in ("protocol", *sections)}
        plots.save_reliability(found["classification"], folder / "reliability.png")
        plots.save_confusion(found["classification"]["jem"]["confusion"], folder / "confusion.png")
        (folder / "report.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
        (folder / "report.md").write_text(report.markdown(found))
        print(report.summary(found))
        runs.report_files(args, [folder / name for name in ("report.md", "report.json")])


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    device = runs.pick_device(args.device)
    with parallel.group(device):
        evaluate(args, device)


def protocol(args, checkpoint, sizes, classifier, dataset):
    """Return what a reader must know to repeat the measurement."""
    return {
        "command": command(args),
        "data_set": dataset.name,
        "checkpoint": str(args.checkpoint),
        "classifier": classifier and str(classifier),
        "seed": args.seed,
        "sizes": sizes,
        "splits": {name: len(getattr(dataset, name).labels) for name in ("train", "val", "test")},
        "sgld": checkpoint["sgld"],
        "precision": measurements.PRECISION,
        "packages": runs.package_versions(),
        "git_commit": runs.git_commit(),
    }


def command(args):
    """Return the command line that was given."""
    words = ["python evaluate.py"]
    for name in sorted(args.given):
        value = getattr(args, name)
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return " ".join(words)


if __name__ == "__main__":
    main()
