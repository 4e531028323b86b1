"""Which quantities the detector needs: each alone and each left out, and what rounding does.

    python benchmarks/detector_ablation.py --checkpoint jem=results/mnist/jem.pt \\
        classifier=results/mnist/classifier.pt --out results/detector-ablation.csv

writes, for each model and choice of quantities, the AUROC on sets made for choosing and the share
called unfamiliar at p < 0.05 on them and on ordinary disturbances of validation images. It looks at
training and validation images only, and at no set that evaluate.py reports.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, pad

from sgld_nrg.models import load_model, predict
from sgld_nrg.support import flags
from sgld_nrg.support.augment import add_noise
from sgld_nrg.support.checkpoints import load_checkpoint, read_state
from sgld_nrg.support.detector import MOST_REFERENCE, Detector, Mixture, Ranks, quantities
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.log import replacing
from sgld_nrg.support.metrics import detection
from sgld_nrg.support.origin import dataset_of
from sgld_nrg.support.parser import Parser, flag, positive_int

Made = Callable[[Tensor, torch.Generator], Tensor]
ALPHA = 0.05
FLAGS = (
    flag("--checkpoint", str, "models", nargs="+", metavar="NAME=FILE", required=True),
    flags.CHECKPOINT_DATA_DIR,
    flags.OTHER_DATA,
    *flags.READING,
    flag("--count", positive_int, "images of each set", 500),
    flag("--out", str, "table to write", "results/detector-ablation.csv", metavar="FILE"),
)


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    return Parser(__doc__, (("ablation", FLAGS),)).parse(argv)


def _uniform(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return one number in [0, 1) for each image."""
    return torch.rand(len(images), 1, 1, 1, generator=generator)


def _shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    return images[torch.randperm(len(images), generator=generator)]


def _drawn(images: Tensor, generator: torch.Generator) -> Tensor:
    """Draw lines, arcs and polygons with a pen as thick as a digit's."""
    numbers = np.random.default_rng(int(torch.randint(1 << 30, (), generator=generator)))
    drawn = []
    for number in range(len(images)):
        picture = Image.new("L", (112, 112))
        draw, pen = ImageDraw.Draw(picture), {"fill": 255, "width": int(numbers.integers(8, 15))}
        points = [tuple(map(int, point)) for point in numbers.integers(18, 94, (5, 2))]
        if number % 3 == 0:
            draw.line(points, joint="curve", **pen)
        elif number % 3 == 1:
            draw.line([*points[:4], points[0]], joint="curve", **pen)
        else:
            for (x, y), (start, turn) in zip(points[:3], points[2:], strict=True):
                draw.arc((x - 24, y - 24, x + 24, y + 24), 3 * start, 3 * (start + turn), **pen)
        small = picture.resize(images.shape[:1:-1], Image.Resampling.LANCZOS)
        drawn.append(torch.from_numpy(np.asarray(small) / np.float32(127.5) - 1))
    return torch.stack(drawn)[:, None].expand_as(images)


def _noisy(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return add_noise(images, std, generator).clamp(-1, 1)


COLUMNS = ("model", "judged", "kind", "set", "auroc", "unfamiliar")
STRANGE: dict[str, Made] = {
    "drawn": _drawn,
    "transposed": lambda x, g: x.transpose(2, 3),
    "other lower half": lambda x, g: torch.cat(
        [x[:, :, : x.shape[2] // 2], _shuffled(x, g)[:, :, x.shape[2] // 2 :]], dim=2
    ),
    "quarters exchanged": lambda x, g: x.roll((x.shape[2] // 2, x.shape[3] // 2), (2, 3)),
    "two on each other": lambda x, g: torch.maximum(x, _shuffled(x, g)),
    "half the size": lambda x, g: pad(avg_pool2d(x, 2), (x.shape[3] // 4,) * 4, value=-1),
    "on grey": lambda x, g: torch.maximum(x, 1.2 * _uniform(x, g) - 0.7),
    "faint": lambda x, g: x * (0.1 + 0.25 * _uniform(x, g)) + _uniform(x, g) - 0.5,
    "noise field": lambda x, g: interpolate(_noisy(0 * x, 0.8, g)[..., ::4, ::4], x.shape[2:]),
    "strong noise": lambda x, g: _noisy(x, 0.6, g),
}
ORDINARY: dict[str, Made] = {
    "as they are": lambda x, g: x,
    "noise 0.04": lambda x, g: _noisy(x, 0.04, g),
    "noise 0.1": lambda x, g: _noisy(x, 0.1, g),
    "blurred": lambda x, g: 0.7 * x + 0.3 * avg_pool2d(pad(x, (1,) * 4, value=-1), 3, stride=1),
    "shifted by 1": lambda x, g: x.roll((1, -1), (2, 3)),
    "shifted by 2": lambda x, g: x.roll((2, 0), (2, 3)),
    "thicker": lambda x, g: max_pool2d(pad(x, (1, 0, 1, 0), value=-1), 2, 1),
}


def scorers(model: nn.Module, reference: Tensor) -> Iterator[tuple[str, Callable]]:
    """Yield (what is judged, a function from images to scores (N,)), high = strange."""
    yield "energy by its sign", lambda x: -predict(model, x).logsumexp(1)
    for levels in sorted({Detector.fit(model, reference[:1000]).levels, 0}, reverse=True):
        values, classes = quantities(model, reference, levels)
        last = values.shape[1]
        columns = {"logits": range(last - 2), "energy": [last - 2], "entropy": [last - 1]}
        choices = {"all": tuple(columns)} | {name: (name,) for name in columns}
        choices |= {f"without {out}": tuple(n for n in columns if n != out) for out in columns}
        for choice, names in choices.items():
            rows = [column for name in names for column in columns[name]]
            mixture = Mixture.fit(values[:, rows], classes, len(predict(model, reference[:1])[0]))

            def score(x: Tensor, levels=levels, rows=rows, mixture=mixture) -> Tensor:
                return mixture.strangeness(quantities(model, x, levels)[0][:, rows])

            yield f"{choice}{'' if levels else ', not rounded'}", score


@exits_cleanly
def main(args: Namespace) -> None:
    """Measure each model and write the table."""
    rows: list[tuple[str, ...]] = []
    for name, _, file in (each.partition("=") for each in args.checkpoint):
        state = read_state(Path(file))
        if not file or state is None:
            raise UserError(f"--checkpoint {name}={file}: write NAME=FILE, FILE a checkpoint")
        checkpoint = load_checkpoint(file, str(state.get("kind")))
        model, dataset = load_model(checkpoint), dataset_of(checkpoint, args)
        train, val = dataset.train.images, dataset.val.images
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        made = {
            key: make(val[: args.count], torch.Generator().manual_seed(1))
            for key, make in (STRANGE | ORDINARY).items()
        }
        for judged, score in scorers(model, train[chosen[:MOST_REFERENCE]]):
            inside = score(val[args.count :])
            ranks = Ranks.of(inside)
            for key, images in made.items():
                scores = score(images)
                share = (ranks.p_values(scores) < ALPHA).double().mean().item()
                auroc = detection(inside, scores)["auroc"]
                kind = "strange" if key in STRANGE else "ordinary"
                rows.append((name, judged, kind, key, f"{auroc:.4f}", f"{share:.4f}"))
            mean = np.mean([float(row[4]) for row in rows[-len(made) :][: len(STRANGE)]])
            print(f"{name}: {judged}: mean AUROC {mean:.4f}", flush=True)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with replacing(Path(args.out)) as file:
        csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main(parse())
