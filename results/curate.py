"""Copy what the documents show out of the folders of runs, then rewrite the tables.

    python results/curate.py

takes from below results/ what is there of the runs that results/README.md names, and says what it
took.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import tables  # beside this script

from sgld_nrg.support.errors import exits_cleanly
from sgld_nrg.support.parser import Parser

HERE = Path(__file__).resolve().parent
REPORTS = ("mnist-0", "mnist-1", "mnist-2", "fashion-mnist-0")
# The gallery's files that the documents show, by what `sample.py` calls them.
GALLERY = {
    "samples-fresh.gif": "animation.gif",
    "samples-fresh-mixture-3-8.png": "mixture.png",
    "samples-images-inpaint-right.png": "inpainting.png",
    "samples-images-denoise.png": "denoising.png",
    "samples-fresh-interpolate-3-8.png": "interpolation.png",
}


def copies() -> Iterator[tuple[Path, Path]]:
    """Yield each file of a run and the file that it becomes, both below results/."""
    for name in REPORTS:
        yield HERE / name / "report" / "report.json", HERE / "reports" / f"{name}.json"
    for name in tables.SHIPPED:
        yield HERE / f"shipped-{name}" / "report.json", HERE / "reports" / f"shipped-{name}.json"
    figures = sorted((HERE / "shipped-mnist").glob("*.png"))
    for path in (HERE / "shipped-mnist" / "report.md", *figures):
        yield path, HERE / path.name
    rows = "samples-fresh-class-0-1-2-3-4-5-6-7-8-9.png"
    yield HERE / "gallery" / rows, HERE / "cifar10-classes.png"
    yield HERE / "digits" / "samples.png", HERE / "digits.png"
    for source, shown in GALLERY.items():
        yield HERE / "gallery" / source, HERE / shown


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    return Parser(__doc__, ()).parse(argv)


@exits_cleanly
def main(args: Namespace) -> None:
    """Run the script with what `parse` returned."""
    for source, shown in copies():
        if source.exists():
            shutil.copyfile(source, shown)
            print(f"{shown.relative_to(HERE)}: from {source.relative_to(HERE)}")
    tables.main(tables.parse([]))


if __name__ == "__main__":
    main(parse())
