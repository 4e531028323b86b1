"""Train recipes under one budget and draw quality against minutes.

    python benchmarks/time_to_quality.py --dataset digits --minutes 0.5

trains each --variant (a name and flags of train_jem.py; without any the preset itself) with each
--seed, measures its checkpoint of every --save-minutes after the training, off its clock, on the
validation split, and writes quality.json, quality.md and quality.png: accuracy, calibration,
samples, OOD, attacks. With --test the end of each run is measured on the test set instead; that is
for reports, not for choosing, and results/looks.csv counts it. Judges, floors and attacks are those
of evaluate.py.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm

from sgld_nrg.models import load_model, marginal_energy, predict
from sgld_nrg.support import flags, looks, metrics, plots
from sgld_nrg.support.checkpoints import load_checkpoint
from sgld_nrg.support.data import Dataset, load
from sgld_nrg.support.detector import Detector
from sgld_nrg.support.devices import pick_device
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.judges import JUDGES, judges
from sgld_nrg.support.ood import load_ood
from sgld_nrg.support.parallel import Alone
from sgld_nrg.support.parser import HERE, Parser, flag, positive, positive_int, seed
from sgld_nrg.support.presets import FRESH_STEPS
from sgld_nrg.support.report.robustness import attack
from sgld_nrg.support.report.study import FULL as REPORT
from sgld_nrg.support.report.study import Yardstick, cleaned, extend, fresh_chains

# Sizes of a measurement: chains of each kind, steps after which the long ones end (0: no such),
# attacked images, and steps of the attack.
POINT = {"samples": 500, "longest": 0, "attacked": 200, "attack_steps": 10}
QUICK = {"samples": 1000, "longest": 500, "attacked": 300, "attack_steps": 20}
FULL = {"samples": 5000, "longest": 1000, "attacked": 1000, "attack_steps": 75}
ATTACK = {name: REPORT[name] for name in ("random_starts", "targets")}
OOD = {name: name for name in ("rotated", "inverted")}
SCORES = ("deviation", "precision", "recall", "entropy")  # of chains, besides the Fréchet ratio
CHOSEN_BY = JUDGES[0]
FIGURE = ("accuracy", "ece", f"buffer {CHOSEN_BY}", f"fresh {CHOSEN_BY}", "ood rotated", "linf")
FLAGS = (
    flags.DATA_DIR,
    flags.DATASET._replace(default="mnist"),
    flag("--minutes", positive, "wall-clock budget of each training", 10.0),
    flag("--seeds", seed, "seeds of the trainings", [0], nargs="+"),
    flag(
        "--variant",
        str,
        "a name, a colon and flags of train_jem.py, in one string; once for each variant",
        action="append",
        metavar="NAME:FLAGS",
    ),
    flag("--jobs", positive_int, "trainings, then measurements, at once, sharing the cores", 1),
    flag("--save-minutes", positive, "minutes between two points of the curve", 0.5),
    flags.JUDGES,
    flags.DEVICE,
    flag("--quick", bool, "fewer chains and weaker attacks at the end of each run"),
    flag("--kmnist", str, ".npz of KMNIST test images, for --test", metavar="FILE"),
    flag("--test", bool, "measure the end of each run on the test set"),
    flag("--resume", bool, "do not repeat the trainings that --out-dir already holds to the end"),
    flags.OUT_DIR._replace(default="results/quality"),
)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    parser = Parser(__doc__, (("measurement", FLAGS),))
    args = parser.parse(argv)
    args.variant = [word.partition(":")[::2] for word in args.variant or ["preset:"]]
    names = [name for name, _ in args.variant]
    if len(set(names)) < len(names) or len(set(args.seeds)) < len(args.seeds):
        parser.error("two variants have one name, or a seed is given twice: each has one folder")
    args.words = sys.argv[1:] if argv is None else list(argv)
    return args


def train(
    args: Namespace, name: str, more: str, seed: int, cores: list[int], stop: threading.Event
) -> tuple[int, list[Path]]:
    """Run train_jem.py under the budget and keep a copy of its checkpoint every --save-minutes.

    stop: ends the training when set; then no record says that it is done. Returns the exit code and
    the copies' paths.
    """
    # quoted, so that two names have two folders
    folder = Path(args.out_dir) / "runs" / f"{quote(name, safe='')}-seed-{seed}"
    points, record = folder / "points", folder / "training.json"
    settings = {"dataset": args.dataset, "seed": seed, "minutes": args.minutes, "flags": more}
    if args.resume and record.exists():
        done = json.loads(record.read_text())
        if done["settings"] == settings:
            return done["exit_code"], sorted(points.iterdir())
    shutil.rmtree(folder, ignore_errors=True)
    points.mkdir(parents=True)
    flags_of_run = {
        "--dataset": args.dataset,
        "--seed": seed,
        "--max-minutes": args.minutes,
        "--save-minutes": args.save_minutes,
        "--device": args.device,
        "--out-dir": folder,
    }
    if args.dataset != "digits":  # which come with scikit-learn
        flags_of_run["--data-dir"] = args.data_dir
    words = ["--no-test", *(str(word) for pair in flags_of_run.items() for word in pair)]
    command = [sys.executable, str(HERE / "train_jem.py"), *words, *shlex.split(more)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(cores))}
    checkpoint, kept, seen, last = folder / "jem.pt", [], None, time.monotonic()
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(process.pid, cores)
        ended = told = False
        while not ended:
            if stop.is_set() and not told:
                process.terminate()  # once: a second signal would not let it save
                told = True
            ended = process.poll() is not None
            # a training also saves at each epoch's end
            due = ended or time.monotonic() > last + 60 * args.save_minutes
            if due and checkpoint.exists() and checkpoint.stat().st_mtime_ns != seen:
                seen, last = checkpoint.stat().st_mtime_ns, time.monotonic()
                kept.append(points / f"{len(kept):04d}.pt")
                shutil.copyfile(checkpoint, kept[-1])  # always whole: it is renamed into its place
            if not ended:
                time.sleep(0.2)
    code = process.returncode
    if stop.is_set():
        return code, kept
    record.write_text(json.dumps({"settings": settings, "exit_code": code}) + "\n")
    print(f"{name}, seed {seed}: exit code {code}, {len(kept)} checkpoints", flush=True)
    return code, kept


def judge(
    path: Path,
    dataset: Dataset,
    part: str,
    networks: dict[str, Any],
    sizes: dict[str, int],
    sets: dict[str, str],
) -> dict[str, Any]:
    """Measure a checkpoint on a split ("val" or "test").

    networks: the judges. sets: {label: OOD set}. Returns, besides shares and AUROCs in 0..1, the
    Fréchet ratio of each kind of chains by each judge, as "fresh vgg", and its SCORES, as
    "fresh vgg recall". Every kind has as many chains, the long ones being the fresh ones run on.
    """
    device = next(networks[CHOSEN_BY].parameters()).device
    checkpoint = load_checkpoint(path, "jem", device)
    model, split = load_model(checkpoint, device).eval(), getattr(dataset, part).to(device)
    logits, training = predict(model, split.images), checkpoint["training"]
    row = {name: training[name] for name in ("minutes", "iteration", "rollbacks")}
    row["accuracy"] = float((logits.argmax(1) == split.labels).double().mean())
    row["ece"] = metrics.calibration(logits, split.labels)["ece"]

    buffer, train_images = checkpoint["buffer"]["images"], dataset.train.images
    count = min(sizes["samples"], len(split.labels), len(train_images), len(buffer))
    chosen = torch.randperm(len(buffer), generator=torch.Generator().manual_seed(0))[:count]
    generator = torch.Generator(device).manual_seed(0)
    fresh = fresh_chains(checkpoint, model, count, FRESH_STEPS, generator)
    clean = cleaned(checkpoint, model, fresh, generator)
    kinds = {"buffer": buffer[chosen], "fresh": fresh, "cleaned": clean}
    if sizes["longest"]:
        more = sizes["longest"] - FRESH_STEPS
        kinds["long"] = extend(checkpoint, model, fresh, more, generator)
    for name, network in networks.items():
        yardstick = Yardstick(network, split.images[:count], train_images)
        for kind, images in kinds.items():
            found = yardstick.judge_images(images)
            row[f"{kind} {name}"] = found["ratio_to_floor"]
            row |= {f"{kind} {name} {score}": found[score] for score in SCORES}

    inside = marginal_energy(logits)
    chains = marginal_energy(predict(model, kinds["buffer"]))
    row["energy gap"] = float(chains.mean() - inside.mean())
    kept = checkpoint.get("detector")  # of a training that has ended
    detector = Detector.from_state(model, kept) if kept else None
    for label, name in sets.items():
        source = torch.Generator().manual_seed(0)
        images, _ = load_ood(name, split.images.cpu(), "", 10_000, source)
        outside = marginal_energy(predict(model, images))
        row[f"ood {label}"] = metrics.detection(inside, outside, label)["auroc"]
        if detector:
            scores = (detector.scores(x) for x in (split.images, images))
            row[f"ood {label}, detector"] = metrics.detection(*scores, label)["auroc"]
    images, labels = (values[: sizes["attacked"]] for values in split)
    settings = {"seed": 0, "attack_steps": sizes["attack_steps"], **ATTACK}
    for norm, radii in REPORT["epsilons"]["colour" if images.shape[1] == 3 else "grey"].items():
        found = attack(model, model, images, labels, norm, radii[0], **settings)
        row[norm] = found["accuracy"]
    return row


def measure(
    args: Namespace,
    threads: int,
    sizes: tuple[dict[str, int], dict[str, int]],
    trained: tuple[dict[str, Any], list[Path]],
) -> dict[str, Any]:
    """Measure one training, in a process of its own: a dict with its points and its end, if any.

    threads: for this process. sizes: those of a point and of the end. trained: a dict that says
    what was trained, and the paths of its checkpoints.
    """
    torch.set_num_threads(max(threads, 1))
    run, points = trained
    dataset = load(args.dataset, args.data_dir)
    networks = judges(dataset, Path(args.judges), pick_device(args.device), Alone())
    part = "test" if args.test else "val"
    sets = {"kmnist": args.kmnist, **OOD} if args.test and args.kmnist else OOD
    rows = [judge(point, dataset, "val", networks, sizes[0], OOD) for point in points]
    end = judge(points[-1], dataset, part, networks, sizes[1], sets) if points else None
    return {**run, "points": rows, part: end}


def markdown(args: Namespace, found: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of the runs' ends: mean and standard deviation over the seeds."""
    part = "test" if args.test else "val"
    ends = {
        name: [run[part] for run in runs if run[part] and not run["exit_code"]]
        for name, runs in found.items()
    }
    where = "test set" if args.test else "validation split"
    lines = [
        f"Made by `python benchmarks/time_to_quality.py {shlex.join(args.words)}`.",
        "",
        f"At the end, {where}, {args.minutes:g} minutes; recipes are chosen by {CHOSEN_BY}:",
        "",
        "| | " + " | ".join(found) + " |",
        "| --- " * (len(found) + 1) + "|",
    ]
    for score in next((rows[0] for rows in ends.values() if rows), {}):
        cells = []
        for rows in ends.values():
            values = [row[score] for row in rows if score in row]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "–")
        lines.append(f"| {score} | " + " | ".join(cells) + " |")
    failed = (
        f"{sum(run['exit_code'] != 0 for run in runs)} of {len(runs)}" for runs in found.values()
    )
    lines.append("| runs that diverged | " + " | ".join(failed) + " |")
    return "\n".join(lines) + "\n"


def save_figure(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """Draw quality against minutes: a panel for each score, a colour for each variant.

    curves: {variant: [run, ...]}, a run being a list of {"minutes", score: value, ...}.
    """
    figure, axes = plots.panels_of(2, -(-len(FIGURE) // 2), 3.4, 2.6)
    for axis, name in zip(axes.flat, FIGURE, strict=False):
        colours = itertools.cycle(plots.SERIES_COLOURS)
        for (variant, runs), colour in zip(curves.items(), colours, strict=False):
            for number, run in enumerate(runs):
                points = [(row["minutes"], row[name]) for row in run if name in row]
                if points:
                    label = variant if number == 0 else None
                    style = {"color": colour, "marker": ".", "linewidth": 1.2}
                    axis.plot(*zip(*points, strict=True), label=label, **style)
        ratio = name.endswith(CHOSEN_BY)
        axis.set(title=f"{name}: Fréchet / floor" if ratio else name, xlabel="minutes")
        axis.set(yscale="log" if ratio else "linear")
        axis.grid(alpha=0.3)
    plots.legend(figure, axes, ncols=2)
    plots.finish(figure, path)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    if args.kmnist and not os.path.isfile(args.kmnist):
        raise UserError(
            f"there is no file {args.kmnist!r}: name KMNIST's test images with --kmnist, "
            "or leave it out"
        )
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cores = list(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    shares = [cores[job :: args.jobs] or cores for job in range(args.jobs)]
    wanted = [(name, more, seed) for name, more in args.variant for seed in args.seeds]

    stop = threading.Event()

    def work(job: int) -> list[tuple[int, int, list[Path]]]:
        mine = (index for index in range(job, len(wanted), args.jobs) if not stop.is_set())
        return [(index, *train(args, *wanted[index], shares[job], stop)) for index in mine]

    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            trained = sorted(itertools.chain.from_iterable(pool.map(work, range(args.jobs))))
        finally:
            stop.set()  # after a signal the pool waits for trainings, which are to end
    dataset, device = load(args.dataset, args.data_dir), pick_device(args.device)
    judges(dataset, Path(args.judges), device, Alone())  # trained once, before the measurements
    if args.test:
        given = {**vars(args), "variant": [":".join(pair) for pair in args.variant]}
        script = "python benchmarks/time_to_quality.py"
        looks.record(script, Namespace(**given), args.dataset, "time to quality")
    tasks = [
        ({"flags": more, "seed": seed, "exit_code": code}, points)
        for (_, more, seed), (_, code, points) in zip(wanted, trained, strict=True)
    ]
    sizes, found = (POINT, QUICK if args.quick else FULL), {}
    # SIGINT is for this process to answer, which ends the others
    ignored = (signal.SIGINT, signal.SIG_IGN)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(args.jobs, signal.signal, ignored) as pool:
        results = pool.imap(partial(measure, args, len(cores) // args.jobs, sizes), tasks)
        bar = tqdm(results, total=len(tasks), disable=None)
        for (name, _, _), run in zip(wanted, bar, strict=True):
            found.setdefault(name, []).append(run)
            text = json.dumps(found, indent=1, allow_nan=False) + "\n"
            (folder / "quality.json").write_text(text)
    (folder / "quality.md").write_text(markdown(args, found))
    curves = {name: [run["points"] for run in runs] for name, runs in found.items()}
    save_figure(curves, folder / "quality.png")
    print(markdown(args, found))


if __name__ == "__main__":
    main(parse())
