"""Train a classifier with cross-entropy: the starting point of a joint energy-based model, and its yardstick.

    python train_classifier.py --dataset digits

writes classifier.pt (the weights of the best validation epoch), metrics.csv, curves.png and config.json.
"""

from __future__ import annotations

import cli


def build_parser():
    """Return the parser of this script's command line."""
    parser = cli.Parser(__doc__)
    cli.add_data_flags(parser)
    cli.add_model_flags(parser)
    cli.add_optimisation_flags(parser)
    cli.add_rerun_flags(cli.add_run_flags(parser))
    return parser


if __name__ == "__main__":
    cli.parse(build_parser())  # --help and mistyped flags answer here, before torch is loaded

import functools
import math

from torch.nn.functional import cross_entropy

import data
import parallel
import runs
from models import predict
from training import Training


def evaluate(model, split):
    """Return (mean cross-entropy in nat, accuracy in 0..1) of a network on a data.Split."""
    logits = predict(model, split.images)
    labels = split.labels.to(logits.device)
    return cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def objective(run, images, labels):
    """Return the cross-entropy of a batch, and what is logged of it."""
    logits = run.logits(images, run.wrapped)
    loss = cross_entropy(logits, labels)
    return loss, {"cross_entropy": loss, "accuracy": (logits.argmax(1) == labels).float().mean()}


def train(args, dataset, folder, device, resumed=None, max_minutes=None):
    """Train a classifier and return its checkpoint, the dict that then lies in folder/classifier.pt.

    args: the parsed flags of this script; train_jem.py's have them too. dataset: data.Dataset. folder: pathlib.Path.
    resumed: the checkpoint of a stopped run, to go on from. max_minutes: wall-clock budget or None.
    "model" in the checkpoint holds the averaged weights of the epoch with the lowest validation cross-entropy.
    """
    run = Training(args, dataset, folder, "classifier", device, resumed=resumed, max_minutes=max_minutes)
    checkpoint = resumed
    best = {name: resumed[name] for name in ("model", "val_cross_entropy")} if resumed else {"val_cross_entropy": math.inf}
    for images, labels in run.batches():
        run.update(run.gradients(functools.partial(objective, run, run.augmented(images), labels)))

        if run.epoch_ends():
            val_loss, val_accuracy = evaluate(run.averaged, dataset.val)
            run.write_row(val_cross_entropy=val_loss, val_accuracy=val_accuracy)
            if val_loss < best["val_cross_entropy"]:
                best = {"model": run.averaged_weights(), "val_cross_entropy": val_loss}
        if run.save_is_due():
            checkpoint = {
                "model_config": run.model_config,
                "model": run.averaged_weights(),  # until an epoch has ended
                **best,
                "dataset": dataset.name,
                "args": runs.plain_arguments(args),
                "finished": run.done >= 1,
                "training": run.state_dict(),
            }
            run.save(checkpoint)
    return checkpoint


@cli.exits_cleanly
def main(argv=None):
    """Run the script with a list of arguments, or with the command line's."""
    args = cli.parse(build_parser(), argv)
    device = runs.pick_device(args.device)
    with parallel.group(device), runs.run_folder(args) as folder:
        resumed = runs.open_checkpoint(folder / "classifier.pt", args)
        with parallel.first_on_each_node():
            dataset = data.load(args.dataset, args.data_dir, args.image_size)
        print(cli.describe_settings(args), flush=True)
        checkpoint = train(args, dataset, folder, device, resumed, args.max_minutes)
        _, accuracy = evaluate(runs.load_model(checkpoint, device), dataset.test)
        runs.report_files(args, [folder / name for name in ("classifier.pt", "curves.png", "metrics.csv", "config.json")])
        print(f"test accuracy: {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
