"""Make walkthrough.ipynb, executed, from the cells of walkthrough.py: as long as that takes.

    python examples/make_notebook.py

A notebook is JSON (nbformat 4.5), so it needs no package of Jupyter's. The cells run in order in
one namespace; what they print and the figures that they leave open become their outputs. On one
machine the same script gives the same file, byte for byte.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from sgld_nrg.support.errors import exits_cleanly
from sgld_nrg.support.parser import Parser, flag

SCRIPT = Path(__file__).with_name("walkthrough.py")
MARKER, MARKDOWN = "# %%", "# %% [markdown]"
DPI = 80
FLAGS = (flag("--out", str, "notebook to write", "examples/walkthrough.ipynb"),)

Cell = dict[str, Any]


def cells_of(script: str) -> list[Cell]:
    """Split a script in the percent format into the cells of a notebook, not yet executed.

    What stands before the first marker, a docstring for those who run the script, is left out. A
    cell's id is its place, so an unchanged cell keeps its id.
    """
    cells: list[Cell] = []
    for line in script.splitlines():
        if line.startswith(MARKER):
            kind = "markdown" if line.strip() == MARKDOWN else "code"
            cells.append({"cell_type": kind, "id": f"cell-{len(cells):02}", "source": []})
        elif cells:
            cells[-1]["source"].append(line)
    for cell in cells:
        lines = "\n".join(cell["source"]).strip("\n").split("\n")
        if cell["cell_type"] == "markdown":
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:
            cell.update(execution_count=None, outputs=[])
        cell.update(metadata={}, source="\n".join(lines).splitlines(keepends=True))
    return cells


def execute(cells: Sequence[Cell]) -> None:
    """Run the code of cells in order in one namespace, and put what they give into them.

    An error in a cell is raised, with the cell's id as the name of its file.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    code_cells = [cell for cell in cells if cell["cell_type"] == "code"]
    plt.close("all")
    for count, cell in enumerate(code_cells, start=1):
        code = compile("".join(cell["source"]), cell["id"], "exec", dont_inherit=True)
        with redirect_stdout(io.StringIO()) as said:
            exec(code, namespace)
        cell.update(execution_count=count, outputs=[*_stream(said.getvalue()), *_figures()])


def _stream(text: str) -> list[dict[str, Any]]:
    """Return the output that holds what a cell printed, if it printed anything."""
    lines = text.splitlines(keepends=True)
    return [{"output_type": "stream", "name": "stdout", "text": lines}] if lines else []


def _figures() -> list[dict[str, Any]]:
    """Return the outputs that hold the open figures as PNGs, and close the figures."""
    outputs = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        # without matplotlib's version, which would change the file though the picture is the same
        plt.figure(number).savefig(file, format="png", dpi=DPI, metadata={"Software": None})
        png = base64.b64encode(file.getvalue()).decode()
        outputs.append({"output_type": "display_data", "data": {"image/png": png}, "metadata": {}})
    plt.close("all")
    return outputs


def notebook(cells: Sequence[Cell]) -> str:
    """Return the text of a notebook of these cells."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """Read a list of arguments, or the command line's."""
    return Parser(__doc__, (("example", FLAGS),)).parse_with_out(argv)


@exits_cleanly
def main(args: Namespace) -> None:
    """Split, execute, write."""
    cells = cells_of(SCRIPT.read_text(encoding="utf-8"))
    # what the script writes goes with this folder: the notebook holds the pictures
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        execute(cells)
    Path(args.out).write_text(notebook(cells), encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(parse())
