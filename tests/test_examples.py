"""Examples in docstrings give what they say; the walkthrough's notebook is its script, executed."""

import base64
import doctest
import json
import re
import struct
import sys

import pytest
from conftest import ROOT

from sgld_nrg import models, sgld, train_jem
from sgld_nrg.support import attacks, metrics, restarts, sample_metrics

OBJECTS = [
    sgld.run_chains,
    restarts.GaussianRestart,
    models.marginal_energy,
    models.joint_energy,
    models.mixture_energy,
    models.path_energy,
    train_jem.ReplayBuffer,
    train_jem.energy_loss,
    train_jem.energy_regulariser,
    attacks.apgd,
    metrics.calibration,
    metrics.detection,
    sample_metrics.frechet_distance,
]


@pytest.mark.parametrize("thing", OBJECTS, ids=lambda thing: thing.__qualname__)
def test_an_example_gives_what_it_says(thing, capsys):
    finder = doctest.DocTestFinder(recurse=False)
    names = vars(sys.modules[thing.__module__]).copy()
    [example] = finder.find(thing, thing.__name__, globs=names)
    assert example.examples
    result = doctest.DocTestRunner().run(example)
    assert result.failed == 0, capsys.readouterr().out


SCRIPT = ROOT / "examples" / "walkthrough.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
ABSOLUTE = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?[/\\]+\w[\w.-]*[/\\]")  # the start of a path
SMALL = """'''A docstring for those who run the script.'''

# %% [markdown]
# # A title
#
# Some words.

# %%
import matplotlib.pyplot as plt


# %%
def line():
    plt.plot([0, 1])  # a comment


line()
print("one\\ntwo")
"""


@pytest.fixture
def make_notebook(monkeypatch):
    """The script that makes the notebook."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import make_notebook

    return make_notebook


@pytest.fixture(scope="module")
def committed():
    """The notebook that comes with the project."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def code_cells(notebook):
    """Return the cells that hold code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(notebook):
    """Return all that the cells printed."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join("".join(output.get("text", [])) for output in outputs)


def pictures(notebook):
    """Return the bytes of each PNG among the outputs."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    coded = [output["data"]["image/png"] for output in outputs if "data" in output]
    return [base64.b64decode(png, validate=True) for png in coded]


def chunks(png):
    """Return the names of a PNG's chunks, in order."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    names, place = [], 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        names.append(png[place + 4 : place + 8].decode())
        place += 12 + length
    assert place == len(png)
    return names


def assert_is_nbformat(notebook):
    """Check what the format asks for, version 4.5, of notebooks with these outputs."""
    assert set(notebook) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        keys = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            keys |= {"execution_count", "outputs"}
        else:
            assert cell["cell_type"] == "markdown"
        assert set(cell) == keys and cell["metadata"] == {}
        assert all(isinstance(line, str) for line in cell["source"])
        assert all(line.endswith("\n") for line in cell["source"][:-1])
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                assert set(output) == {"output_type", "name", "text"}
                assert output["name"] == "stdout"
            else:
                assert output["output_type"] == "display_data"  # an error has another type
                assert set(output) == {"output_type", "data", "metadata"}
                assert set(output["data"]) == {"image/png"}


def test_the_cells_of_a_script_become_those_of_a_notebook(make_notebook):
    cells = make_notebook.cells_of(SMALL)
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code", "code"]
    assert cells[0]["source"] == ["# A title\n", "\n", "Some words."]
    assert cells[1]["source"] == ["import matplotlib.pyplot as plt"]
    assert cells[2]["source"][0] == "def line():\n"
    assert cells[2]["source"][-1] == 'print("one\\ntwo")'
    assert [cell["outputs"] for cell in cells[1:]] == [[], []]


def test_cells_are_executed_in_one_namespace_and_give_what_they_print_and_draw(make_notebook):
    cells, again = make_notebook.cells_of(SMALL), make_notebook.cells_of(SMALL)
    make_notebook.execute(cells)
    made = json.loads(make_notebook.notebook(cells))
    assert_is_nbformat(made)
    first, second = code_cells(made)
    assert (first["execution_count"], second["execution_count"]) == (1, 2)
    assert first["outputs"] == []
    assert second["outputs"][0]["text"] == ["one\n", "two\n"] and len(second["outputs"]) == 2
    [picture] = pictures(made)
    assert set(chunks(picture)) == {"IHDR", "pHYs", "IDAT", "IEND"}
    make_notebook.execute(again)
    assert make_notebook.notebook(again) == make_notebook.notebook(cells)


def test_an_error_in_a_cell_makes_no_notebook(make_notebook):
    with pytest.raises(ZeroDivisionError):
        make_notebook.execute(make_notebook.cells_of("# %%\n1 / 0\n"))


def test_the_notebook_has_the_cells_of_the_walkthrough(make_notebook, committed):
    cells = make_notebook.cells_of(SCRIPT.read_text(encoding="utf-8"))
    kept = ("cell_type", "id", "source")
    found = [{key: cell[key] for key in kept} for cell in committed["cells"]]
    assert found == [{key: cell[key] for key in kept} for cell in cells], (
        "run: python examples/make_notebook.py"
    )


def test_the_notebook_has_been_executed_in_order_and_without_an_error(committed):
    assert_is_nbformat(committed)
    counts = [cell["execution_count"] for cell in code_cells(committed)]
    assert counts == list(range(1, len(counts) + 1))
    calls = [
        re.findall(r"^print\(|^show\w*\(", "".join(c["source"]), re.M)
        for c in code_cells(committed)
    ]
    assert all(
        cell["outputs"] for cell, call in zip(code_cells(committed), calls, strict=True) if call
    )


def test_the_notebook_holds_pictures_and_nothing_of_the_machine_it_was_made_on(committed):
    found = pictures(committed)
    assert len(found) >= 10
    for picture in found:
        width, height = struct.unpack(">II", picture[16:24])
        assert width > 300 and height > 80
        assert set(chunks(picture)) == {"IHDR", "pHYs", "IDAT", "IEND"}  # no text, no time
    told = printed(committed)
    assert told and not ABSOLUTE.search(told), ABSOLUTE.search(told)
    assert NOTEBOOK.stat().st_size < 700_000


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("in /home/me/x.png", True),
        (r"in C:\Users\me", True),
        ("~/runs/a", True),
        ("results/walkthrough and 3 / 4 a/b", False),
        ("https://arxiv.org/abs/1912.03263", False),
    ],
)
def test_an_absolute_path_is_recognised(text, is_one):
    assert bool(ABSOLUTE.search(text)) is is_one


def test_the_notebook_shows_a_whole_training(committed):
    told = printed(committed)
    default = int(re.search(r'"ITERATIONS", "(\d+)"', SCRIPT.read_text(encoding="utf-8"))[1])
    reported = [int(number) for number in re.findall(r"iteration (\d+): energy gap", told)]
    assert reported == list(range(0, default, default // 10))
    assert float(re.search(r"JEM: ([\d.]+) %", told)[1]) > 90
    assert int(re.search(r"read as the class asked for: (\d+) %", told)[1]) > 90
    shares = dict(re.findall(r"(.*): (\d+) % called unfamiliar", told))
    assert int(shares["test digits"]) < 12 and int(shares["uniform-noise"]) > 90


@pytest.mark.slow
def test_the_notebook_is_made_twice_alike(make_notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ITERATIONS", "10")
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        make_notebook.main(make_notebook.parse(["--out", f"{name}.ipynb"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.ipynb", "second.ipynb"]
    first, second = (tmp_path / f"{name}.ipynb" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    made = json.loads(first.read_text(encoding="utf-8"))
    assert_is_nbformat(made)
    assert len(pictures(made)) >= 10 and "iteration 9: energy gap" in printed(made)
    assert str(tmp_path) not in first.read_text(encoding="utf-8")
