"""Judge pictures with a trained JEM: what they show, how sure that is, whether they look familiar.

    python predict.py my-digits/ --checkpoint results/digits/jem.pt

writes predictions.csv, a row for each picture: its name (the file, or the index in an array), the
likeliest class, its calibrated probability, the classes that are not ruled out at level --alpha
(joined by ";"; the likeliest class alone if the network errs less often than that), the energy
E(x), and a p-value: the share of held-out images that look at least as strange. Below --alpha the
picture looks unfamiliar; of pictures like those of the training, at most a share --alpha does.
predictions.png shows the pictures with their verdicts, the strangest first.
"""

from __future__ import annotations

try:
    from sgld_nrg.support.commands import parse
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error}; run: pip install -r requirements.txt") from None

if __name__ == "__main__":
    args = parse("predict", doc=__doc__)  # here, so that --help answers before torch loads

import csv
from argparse import Namespace
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from torch import Tensor, nn

from sgld_nrg.models import load_model
from sgld_nrg.support.checkpoints import Checkpoint, load_checkpoint, output_folder
from sgld_nrg.support.detector import Detector, detector_for
from sgld_nrg.support.devices import pick_device
from sgld_nrg.support.errors import UserError, exits_cleanly
from sgld_nrg.support.image_files import FilePictures
from sgld_nrg.support.images import Pictures, open_pictures, read_all, reading_from
from sgld_nrg.support.log import replacing, report_files
from sgld_nrg.support.origin import class_names, dataset_of
from sgld_nrg.support.pixels import to_unit
from sgld_nrg.support.report.words import counted

COLUMNS = ("name", "label", "probability", "label_set", "energy", "p_value")
CHUNK_SIZE = 250  # pictures in memory at once
SHOWN = 60  # pictures on the sheet
TOLD = 10  # lines on the terminal
DRY_RUN = 4  # pictures
SIDE, LINE = 84, 13  # of a picture on the sheet and of a line of text, pixels


class Verdict(NamedTuple):
    """What is said of one picture; its fields but the last two are the columns of the CSV."""

    name: str
    label: str
    probability: float
    label_set: list[str]
    energy: float
    p_value: float
    score: float
    image: Tensor

    def cells(self) -> list[str]:
        """Return the row of the CSV."""
        numbers = (f"{self.probability:.6f}", f"{self.energy:.4f}", f"{self.p_value:.9g}")
        return [self.name, self.label, numbers[0], ";".join(self.label_set), *numbers[1:]]

    def lines(self, alpha: float) -> list[str]:
        """Return the lines below the picture on the sheet."""
        unfamiliar = " unfamiliar" * (self.p_value < alpha)
        others = ", ".join(name for name in self.label_set if name != self.label)
        label = f"{self.label} {100 * self.probability:.1f} %"
        return [Path(self.name).name, label, others, f"p {self.p_value:.3g}{unfamiliar}"]


def detector_of(checkpoint: Checkpoint, model: nn.Module, args: Namespace) -> Detector:
    """Return the checkpoint's detector; if it has none, one that is fitted to its data now.

    Raises UserError if the data cannot be had.
    """
    if checkpoint.get("detector"):
        return Detector.from_state(model, checkpoint["detector"])
    try:
        dataset = dataset_of(checkpoint, args)
    except UserError as error:
        raise UserError(
            "the checkpoint has no detector, and without its data none can be fitted: " + str(error)
        ) from error
    print("the checkpoint has no detector: fitting one to its data", flush=True)
    return detector_for(model, dataset)


def name_of(found: Pictures, index: int, path: str, alone: bool) -> str:
    """Return a picture's name: its file, or its index in an array, after the path unless alone."""
    if isinstance(found, FilePictures):
        return str(found.paths[index]).encode(errors="backslashreplace").decode()
    return str(index) if alone else f"{path}[{index}]"


def verdicts(
    images: Tensor, names: list[str], detector: Detector, classes: list[str], alpha: float
) -> list[Verdict]:
    """Return the verdicts on images (N, C, H, W), pixels in [-1, 1]."""
    said = detector.verdicts(images)
    probability, labels = said.probabilities.max(1)
    inside = detector.label_sets(said, alpha)
    columns = (labels, probability, inside, said.energy, said.p_values, said.scores)
    rows = zip(names, *(x.tolist() for x in columns), map(Tensor.clone, images), strict=True)
    return [
        Verdict(name, classes[label], sure, list(compress(classes, kept)), *rest)
        for name, label, sure, kept, *rest in rows
    ]


def save_sheet(shown: list[Verdict], path: Path, alpha: float) -> None:
    """Write the pictures with their verdicts as a PNG."""
    columns, width, height = min(len(shown), 10), SIDE + 36, SIDE + 4 * LINE + 8
    sheet = Image.new("RGB", (width * columns, height * -(-len(shown) // columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, verdict in enumerate(shown):
        left, top = width * (number % columns) + 4, height * (number // columns) + 4
        pixels = (to_unit(verdict.image).permute(1, 2, 0) * 255).round().byte()
        picture = Image.fromarray(pixels.expand(-1, -1, 3).contiguous().numpy())
        sheet.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top))
        colour = "#D55E00" if verdict.p_value < alpha else "black"
        for row, line in enumerate(verdict.lines(alpha)):
            text = line if len(line) <= 19 else f"{line[:18]}…"
            draw.text((left, top + SIDE + LINE * row), text, fill=colour, font_size=10)
    sheet.save(path)


def check_csv(path: Path) -> None:
    """Raise UserError if a file that is not a table of this script's would be replaced."""
    if not path.exists():
        return
    with path.open("rb") as file:
        if file.readline(200).strip() != ",".join(COLUMNS).encode():
            raise UserError(
                f"{str(path)!r} is there already and no table of predict.py's: remove it, or name "
                "another with --save-csv"
            )


def summary(strangest: list[Verdict], unfamiliar: int, count: int, args: Namespace) -> str:
    """Return the lines on the terminal: the strangest pictures, and how many look unfamiliar."""
    lines = [
        f"{each.name}: {each.label} ({100 * each.probability:.1f} %), not ruled out: "
        f"{', '.join(each.label_set)}; energy {each.energy:.1f}, p {each.p_value:.3g}"
        for each in strangest[:TOLD]
    ]
    share = f"of pictures like the training's at most {100 * args.alpha:g} % would"
    lines.append(f"{unfamiliar} of {count} look unfamiliar (p below {args.alpha:g}); {share}")
    return "\n".join(lines)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint, "jem", device)
    sources = {path: open_pictures(Path(path), reading_from(args)) for path in args.paths}
    model = load_model(checkpoint, device)
    classes, config = class_names(checkpoint), checkpoint["model_config"]
    shape = (config["channels"], config["image_size"], config["image_size"])
    strangest: list[Verdict] = []
    count = unfamiliar = 0
    with output_folder(args) as folder:
        written = [folder / "predictions.csv", folder / "predictions.png"]
        if args.save_csv and not args.dry_run:
            written[0] = Path(args.save_csv)
        check_csv(written[0])
        detector = detector_of(checkpoint, model, args)
        try:
            with replacing(written[0]) as file:
                table = csv.writer(file)
                table.writerow(COLUMNS)
                for path, found in sources.items():
                    pictures = counted(len(found), "picture")
                    print(f"{path}: {pictures} ({found.words})", flush=True)
                    indices = range(len(found))[: DRY_RUN if args.dry_run else None]
                    for start in indices[::CHUNK_SIZE]:
                        chunk = indices[start : start + CHUNK_SIZE]
                        names = [name_of(found, index, path, len(sources) == 1) for index in chunk]
                        images = read_all(found, chunk, shape)
                        rows = verdicts(images, names, detector, classes, args.alpha)
                        table.writerows(row.cells() for row in rows)
                        count += len(rows)
                        unfamiliar += sum(row.p_value < args.alpha for row in rows)
                        strangest = sorted([*strangest, *rows], key=lambda row: -row.score)[:SHOWN]
        finally:
            Path(f"{written[0]}.tmp").unlink(missing_ok=True)
        save_sheet(strangest, written[1], args.alpha)
        print(summary(strangest, unfamiliar, count, args))
        if detector.smallest >= args.alpha:
            print(f"none could: too few held-out images for p below {detector.smallest:.3g}")
        report_files(args, written)


if __name__ == "__main__":
    main(args)
