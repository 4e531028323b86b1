"""Train a classifier with cross-entropy: where a JEM starts, and the yardstick beside it.

    python train_classifier.py --dataset digits

writes classifier.pt (the weights of the best validation epoch), metrics.csv, curves.png and
config.json.
"""

from __future__ import annotations

try:
    from sgld_nrg.support.commands import parse
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; run: pip install -r requirements.txt") from None

if __name__ == "__main__":
    args = parse("train_classifier", doc=__doc__)  # here, so that --help answers before torch loads

import math
from argparse import Namespace
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.functional import cross_entropy

from sgld_nrg.models import load_model, predict
from sgld_nrg.support import looks
from sgld_nrg.support.augment import augmented
from sgld_nrg.support.checkpoints import Checkpoint, load_for_all
from sgld_nrg.support.data import Split
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.log import report_files
from sgld_nrg.support.origin import check_same_data, differences
from sgld_nrg.support.parser import plain
from sgld_nrg.support.training import Setup, Training, model_config_from, set_up

OUTPUTS = ("classifier.pt", "curves.png", "metrics.csv", "config.json")
PRETRAINING_SHARE = 0.2  # of --max-minutes, at most
AGAIN = "the same command again goes on with it"
# The flags that decide what a pretraining gives.
PRETRAINING_FLAGS = (
    *("dataset", "image_size", "arch", "width", "depth", "stem_stride", "seed"),
    *("pretrain_epochs", "max_minutes", "batch_norm", "batch_size", "optimizer", "lr", "lr_floor"),
    *("warmup_iterations", "weight_decay", "max_grad_norm", "ema_decay", "input_noise"),
    *("augment", "shift", "flip_prob", "precision", "pixel_range", "channel_axis", "background"),
)


def train(
    args: Namespace,
    setup: Setup,
    resumed: Checkpoint | None = None,
    max_minutes: float | None = None,
    go_on: str | None = None,
) -> Checkpoint:
    """Train a classifier and return its checkpoint, the dict that then lies in classifier.pt.

    args: the flags of this script; train_jem.py's have them too. resumed: the checkpoint of a
    stopped run. max_minutes: wall-clock budget. go_on: as in `Training.open`.
    "model" in the checkpoint holds the averaged weights of the epoch with the lowest validation
    cross-entropy.
    """
    run = Training(args, setup, "classifier", resumed=resumed, max_minutes=max_minutes)
    run.open(go_on)
    best: dict[str, Any] = {"val_cross_entropy": math.inf}
    checkpoint = resumed
    if resumed:
        best = {name: resumed[name] for name in ("model", "val_cross_entropy")}
    for images, labels in run.batches():
        logits = run.logits_for_loss(augmented(images, args, run.generator))
        loss = cross_entropy(logits, labels)
        run.backward(loss)
        accuracy = (logits.argmax(1) == labels).float().mean()
        run.update({"cross_entropy": loss.detach(), "accuracy": accuracy})

        if run.epoch_ends():
            val_loss, val_accuracy = evaluate(run.averaged, setup.dataset.val)
            run.write_row(val_cross_entropy=val_loss, val_accuracy=val_accuracy)
            if val_loss < best["val_cross_entropy"]:
                best = {"model": run.averaged_weights(), "val_cross_entropy": val_loss}
        if run.save_is_due():
            run.check_weights()
            checkpoint = {
                "model_config": run.model_config,
                "model": run.averaged_weights(),  # until an epoch has ended
                **best,
                "dataset": setup.dataset.name,
                "origin": setup.dataset.origin,
                "args": plain(args),
                "finished": run.progress >= 1,
                "training": run.state_dict(),
            }
            run.journal.save(checkpoint)
    assert checkpoint is not None
    return checkpoint


def pretrained(args: Namespace, setup: Setup) -> Checkpoint:
    """Return the classifier that a JEM starts from, and say which one it is.

    It is --classifier, or a finished one that train_classifier.py left in the run's folder; else
    one is trained there with this run's flags, or goes on if it was stopped. Raises UserError if
    what is there was trained with other flags, or has another architecture or data set.
    """
    path = Path(args.classifier or setup.folder / "classifier.pt")
    own = {"epochs": args.pretrain_epochs, "lr": args.pretrain_lr or args.lr}
    args = Namespace(**{**vars(args), **own})
    found = load_for_all(path, "classifier", setup.ranks, optional=not args.classifier)
    if not args.classifier:
        found = _of_this_run(found, path, args, setup)
    if found:
        _check_fits(found, path, args, setup)
    if found is None or not (found["finished"] or args.classifier):
        print(f"no finished classifier in {setup.folder}: training one first", flush=True)
        budget = args.max_minutes and args.max_minutes * PRETRAINING_SHARE
        found = train(args, setup, found, budget, AGAIN)
    else:
        print(f"starting from the classifier {path}", flush=True)
    return found


def _check_fits(found: Checkpoint, path: Path, args: Namespace, setup: Setup) -> None:
    """Raise UserError for a classifier of another network or of other data."""
    wanted, name = model_config_from(args, setup.dataset), setup.dataset.name
    if found["model_config"] != wanted or found["dataset"] != name:
        raise UserError(
            f"the classifier {str(path)!r} was trained on {found['dataset']} with "
            f"{found['model_config']}, and this run is for {name} with {wanted}: "
            "give the same --arch, --width and --depth, or another --classifier"
        )
    check_same_data(found, setup.dataset, args, f"the classifier {path}")


def _of_this_run(
    found: Checkpoint | None, path: Path, args: Namespace, setup: Setup
) -> Checkpoint | None:
    """Return the classifier of a run's folder if this run may use it, None if it is replaced.

    One that a pretraining left must have this run's flags; one of train_classifier.py is the
    user's own choice, if it is finished.
    """
    if found is None:
        return None
    if "pretrain_epochs" not in found["args"]:
        if not found["finished"]:
            raise UserError(
                f"{str(path)!r} is an unfinished classifier of train_classifier.py: finish it "
                "there with --resume, or start from it as it is with --classifier"
            )
        return found
    for name in PRETRAINING_FLAGS:
        before, now = found["args"].get(name), getattr(args, name)
        if before != now and args.overwrite:
            print(f"the classifier {path} had {name} {before}, not {now}: it is replaced")
            return None
        if before != now:
            flag = "--" + "pretrain-" * (name == "lr") + name.replace("_", "-")
            raise UserError(
                f"{str(path)!r} was pretrained with {flag} {before}, and this run has {now}: give "
                f"the same flags, train it anew with --overwrite, or use it with --classifier"
            )
    other, _ = differences(found, setup.dataset)
    if other and args.overwrite and not args.other_data:
        print(f"the classifier {path} was of other data ({'; '.join(other)}): it is replaced")
        return None
    return found


def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return the mean cross-entropy [nat] and the accuracy [0..1] of a network on a split."""
    logits = predict(model, split.images)
    labels = split.labels.to(logits.device)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return cross_entropy(logits, labels).item(), accuracy.item()


def look_at_test(script: str, args: Namespace, setup: Setup, checkpoint: Checkpoint) -> None:
    """Print the accuracy on the test set, a look that is counted, unless with --no-test.

    script: as on the command line.
    """
    if args.no_test:
        return
    if setup.ranks.first:
        looks.record(script, args, args.dataset, "accuracy after training")
    _, accuracy = evaluate(load_model(checkpoint, setup.device), setup.dataset.test)
    print(f"test accuracy: {100 * accuracy:.2f} %")


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    with set_up(args, "classifier") as (setup, resumed):
        checkpoint = train(args, setup, resumed, args.max_minutes)
        report_files(args, [setup.folder / name for name in OUTPUTS])
        look_at_test("python train_classifier.py", args, setup, checkpoint)


if __name__ == "__main__":
    main(args)
