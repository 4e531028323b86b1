"""Train one or more recipes under one budget and draw quality against minutes: accuracy, calibration, samples, OOD, attacks.

    python benchmarks/time_to_quality.py --dataset digits --minutes 0.5

trains each --variant (a name and flags of train_jem.py; without any the preset itself) with each --seed, measures its
checkpoint of every --save-minutes after the training, off its clock, on the validation split, and writes quality.json,
quality.md and quality.png. With --test the end of each run is measured on the test set instead; that is for reports, not
for choosing.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli

# Sizes of a measurement: buffer's and fresh chains, long chains and their steps; images, steps and restarts of the attacks.
POINT = {"buffer": 2000, "fresh": 500, "long": 0, "longest": 0, "attacked": 200, "attack_steps": 10, "restarts": 1}
QUICK = {"buffer": 5000, "fresh": 5000, "long": 400, "longest": 1000, "attacked": 300, "attack_steps": 20, "restarts": 1}
FULL = {"buffer": 10_000, "fresh": 10_000, "long": 500, "longest": 1000, "attacked": 1000, "attack_steps": 40, "restarts": 2}
OOD = {"val": ("rotated", "inverted"), "test": ("kmnist", "rotated", "inverted")}
ATTACKS = {"linf": 0.1, "l2": 1.5}  # radius, pixels on [0, 1]
FIGURE = ("accuracy", "ece", "buffer", "fresh", "ood rotated", "linf 0.1")


def parse_args(argv=None):
    """Parse a command line; contradictory flags end the program with one sentence and exit code 2."""
    parser = cli.Parser(__doc__)
    cli.add_data_dir_flag(parser)
    parser.add_argument("--dataset", choices=cli.DATASETS, default="mnist", help="data set, and with it the preset")
    parser.add_argument("--minutes", type=cli.positive, default=10.0, help="wall-clock budget of each training")
    parser.add_argument("--seeds", type=cli.seed, nargs="+", default=[0], help="seeds of the trainings")
    parser.add_argument(
        "--variant", action="append", metavar="NAME:FLAGS",
        help="a name, a colon and flags of train_jem.py, in one string; once for each variant",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=cli.positive_int, default=1, help="trainings, and then measurements, at once, the cores shared out"
    )
    parser.add_argument("--save-minutes", type=cli.positive, default=0.5, help="minutes between two points of the curve")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps, of trainings and measurements")
    parser.add_argument("--quick", action="store_true", help="fewer chains and weaker attacks at the end of each run")
    parser.add_argument("--kmnist", metavar="FILE", help=".npz of KMNIST test images, for --test")
    parser.add_argument("--test", action="store_true", help="measure the end of each run on the test set")
    parser.add_argument(
        "--resume", action="store_true", help="do not repeat the trainings that --out-dir already holds to the end"
    )
    parser.add_argument("--out-dir", default="results/quality", help="folder that receives everything the script writes")
    args = parser.parse_args(argv)
    args.variant = [word.partition(":")[::2] for word in args.variant or ["preset:"]]
    return args


def train(args, name, flags, seed, cores):
    """Run train_jem.py under the budget and keep a copy of its checkpoint every --save-minutes; returns their paths."""
    folder = Path(args.out_dir) / "runs" / f"{name.replace(' ', '-')}-seed-{seed}"
    points, record = folder / "points", folder / "training.json"
    settings = {"dataset": args.dataset, "seed": seed, "minutes": args.minutes, "flags": flags}
    if args.resume and record.exists() and (done := json.loads(record.read_text()))["settings"] == settings:
        return done["exit_code"], sorted(points.iterdir())
    shutil.rmtree(folder, ignore_errors=True)
    points.mkdir(parents=True)
    command = [
        sys.executable, str(ROOT / "train_jem.py"), "--dataset", args.dataset, "--data-dir", args.data_dir,
        "--seed", str(seed), "--max-minutes", str(args.minutes), "--save-minutes", str(args.save_minutes),
        "--device", args.device, "--out-dir", str(folder), *shlex.split(flags),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    checkpoint, kept, seen, last = folder / "jem.pt", [], None, time.monotonic()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)
        while True:
            ended = process.poll() is not None
            due = ended or time.monotonic() > last + 60 * args.save_minutes  # a training also saves at each epoch's end
            if due and checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen:
                seen, last = checkpoint.stat().st_mtime_ns, time.monotonic()
                kept.append(points / f"{len(kept):04d}.pt")
                shutil.copyfile(checkpoint, kept[-1])  # always a whole file: a checkpoint is renamed into its place
            if ended:
                break
            time.sleep(0.2)
    record.write_text(json.dumps({"settings": settings, "exit_code": process.returncode}) + "\n")
    print(f"{name}, seed {seed}: exit code {process.returncode}, {len(kept)} checkpoints", flush=True)
    return process.returncode, kept


def judge(path, dataset, part, network, sizes, sets):
    """Measure a checkpoint on a split ("val" or "test"): a dict of plain numbers, shares in 0..1, Fréchet ratios."""
    import torch
    from sklearn.metrics import roc_auc_score

    import chain_quality
    import data
    import measurements
    import metrics
    import runs
    from models import energy, predict

    device = next(network.parameters()).device
    checkpoint = runs.load_checkpoint(path, "jem", device)
    model, split = runs.load_model(checkpoint, device).eval(), getattr(dataset, part).to(device)
    logits = predict(model, split.images)
    calibration = metrics.calibration(logits, split.labels)
    row = {
        "minutes": checkpoint["training"]["minutes"], "step": checkpoint["training"]["step"],
        "rollbacks": checkpoint["training"]["rollbacks"],
        "accuracy": float((logits.argmax(1) == split.labels).double().mean()), "ece": calibration["ece"],
    }  # fmt: skip
    generator, buffer = torch.Generator(device).manual_seed(0), checkpoint["buffer"]["images"]
    train = dataset.train.images[torch.randperm(len(dataset.train.labels), device=device, generator=generator).cpu()]
    reference = chain_quality.features_of(network, split.images)
    chosen = torch.randperm(len(buffer), device=device, generator=generator)
    for kind, steps in (("buffer", 0), ("fresh", runs.FRESH_STEPS), ("long", sizes["longest"])):
        count = min(sizes[kind], len(split.labels), len(train))
        if not count:
            continue
        if kind == "buffer":
            images = buffer[chosen[:count]]  # all of a smaller buffer
        else:
            images = chain_quality.fresh_chains(checkpoint, model, count, steps, generator)
        floor = metrics.frechet_distance(chain_quality.features_of(network, train[: len(images)]), reference)
        features = chain_quality.features_of(network, images)
        found = chain_quality.compare(network, features, reference, floor, dataset.num_classes)
        row[kind], row[f"{kind} class entropy"] = found["ratio_to_floor"], found["entropy"]
    inside = energy(logits)
    row["energy gap"] = float(energy(predict(model, buffer[: POINT["buffer"]])).mean() - inside.mean())
    for label, name in sets.items():
        images, _ = data.load_ood(name, split.images.cpu(), "", 10_000, torch.Generator().manual_seed(0))
        scores = torch.cat([inside, energy(predict(model, images))])
        row[f"ood {label}"] = float(roc_auc_score([0] * len(inside) + [1] * len(images), scores.cpu().numpy()))
    images, labels = (tensor[: sizes["attacked"]] for tensor in split)
    settings = {"seed": 0, "steps": sizes["attack_steps"], "restarts": sizes["restarts"]}
    for norm, radius in ATTACKS.items():
        row[f"{norm} {radius:g}"] = measurements.attack(model, model, images, labels, norm, radius, **settings)["accuracy"]
    return row


def measure(args, threads, sizes, trained):
    """Measure one training, in a process of its own: a dict with its points and, unless it left none, its end.

    args: parsed flags. threads: for this process. sizes: those of a point and of the end. trained: a dict that says what
    was trained, and the paths of its checkpoints.
    """
    import torch

    import chain_quality
    import data
    import runs

    torch.set_num_threads(max(threads, 1))
    run, points = trained
    dataset = data.load(args.dataset, args.data_dir)
    network = chain_quality.feature_network(dataset, Path(args.out_dir), runs.pick_device(args.device))
    sets = {part: {name: args.kmnist if name == "kmnist" else name for name in names} for part, names in OOD.items()}
    if not args.kmnist:
        del sets["test"]["kmnist"]
    part = "test" if args.test else "val"
    points_found = [judge(point, dataset, "val", network, sizes[0], sets["val"]) for point in points]
    end = judge(points[-1], dataset, part, network, sizes[1], sets[part]) if points else None
    return {**run, "points": points_found, part: end}


def markdown(args, found):
    """Return the table of the runs' ends: mean and standard deviation over the seeds."""
    import statistics

    lines = [f"Made by `python benchmarks/time_to_quality.py {shlex.join(args.given)}`.", ""]
    part = "test" if args.test else "val"
    ends = {name: [run[part] for run in runs if run[part] and not run["exit_code"]] for name, runs in found.items()}
    failed = {name: sum(run["exit_code"] != 0 for run in runs) for name, runs in found.items()}
    lines += [f"At the end, {'test set' if args.test else 'validation split'}, {args.minutes:g} minutes:", ""]
    lines += ["| | " + " | ".join(found) + " |", "| --- " * (len(found) + 1) + "|"]
    for score in next((rows[0] for rows in ends.values() if rows), {}):
        cells = []
        for rows in ends.values():
            values = [row[score] for row in rows]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "–")
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    lines.append("| runs that diverged | " + " | ".join(f"{failed[name]} of {len(found[name])}" for name in found) + " |")
    return "\n".join(lines) + "\n"


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = parse_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    if args.kmnist and not os.path.isfile(args.kmnist):
        raise cli.UserError(f"there is no file {args.kmnist!r}: name KMNIST's test images with --kmnist, or leave it out")
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    shares = [cores[job :: args.jobs] or cores for job in range(args.jobs)]
    wanted = [(name, flags, seed) for name, flags in args.variant for seed in args.seeds]

    def work(number):
        return [(index, *train(args, *wanted[index], shares[number])) for index in range(number, len(wanted), args.jobs)]

    with ThreadPoolExecutor(args.jobs) as pool:
        trained = sorted(itertools.chain.from_iterable(pool.map(work, range(args.jobs))))

    from tqdm import tqdm

    import chain_quality
    import data
    import plots
    import runs

    chain_quality.feature_network(data.load(args.dataset, args.data_dir), folder, runs.pick_device(args.device))
    tasks = [
        ({"flags": flags, "seed": seed, "exit_code": exit_code}, points)
        for (_, flags, seed), (_, exit_code, points) in zip(wanted, trained, strict=True)
    ]
    sizes, found = (POINT, QUICK if args.quick else FULL), {}
    # SIGINT is for this process to answer, which ends the others
    with multiprocessing.get_context("spawn").Pool(args.jobs, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        results = pool.imap(partial(measure, args, len(cores) // args.jobs, sizes), tasks)
        for (name, _, _), run in zip(wanted, tqdm(results, total=len(tasks), disable=None), strict=True):
            found.setdefault(name, []).append(run)
            (folder / "quality.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    (folder / "quality.md").write_text(markdown(args, found))
    plots.save_quality({name: [run["points"] for run in runs] for name, runs in found.items()}, FIGURE, folder / "quality.png")
    print(markdown(args, found))


if __name__ == "__main__":
    main()
