"""The tables of the documents are made from files, and a change of either is noticed."""

import csv
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from sgld_nrg.support.errors import UserError

sys.path.insert(0, str(ROOT / "results"))
import tables

sys.path.remove(str(ROOT / "results"))


def committed_looks():
    """Return results/looks.csv without the lines that the user's own runs have added since."""
    show = ["git", "show", "HEAD:results/looks.csv"]
    done = subprocess.run(show, cwd=ROOT, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else (ROOT / "results/looks.csv").read_text()


@pytest.fixture
def copied(tmp_path):
    """A copy of the documents and of the files that they are made from."""
    for path in tables.documents_of(ROOT):
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, tmp_path / path.relative_to(ROOT))
    (tmp_path / "results/looks.csv").write_text(committed_looks())
    shutil.copyfile(
        ROOT / "results/detector-ablation.csv", tmp_path / "results/detector-ablation.csv"
    )
    shutil.copytree(ROOT / "results/reports", tmp_path / "results/reports")
    return tmp_path


def change(path, find, put):
    """Replace one piece of a file."""
    text = path.read_text()
    assert text.count(find)
    path.write_text(text.replace(find, put, 1))


def test_no_table_or_number_is_stale(copied):
    assert [path.name for path in tables.stale(copied)] == []


def test_a_changed_number_in_a_table_is_stale_and_is_mended(copied):
    number = tables.parts(ROOT)[0]["mnist"].splitlines()[2].split(" | ")[1]
    change(copied / "README.md", number, "99.99 %")
    found = tables.stale(copied)
    assert list(found) == [copied / "README.md"]
    assert found[copied / "README.md"] == (ROOT / "README.md").read_text()


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_report_makes_the_documents_stale(copied, seed):
    path = copied / f"results/reports/mnist-{seed}.json"
    found = json.loads(path.read_text())
    found["classification"]["jem"]["accuracy"] -= 0.01
    path.write_text(json.dumps(found))
    assert set(tables.stale(copied)) == {copied / "README.md", copied / "results/README.md"}


def test_another_look_makes_the_documents_stale(copied):
    with open(copied / "results/looks.csv", "a", newline="") as file:
        csv.writer(file).writerow(["2026-11-28T00:00+00:00", "0", "mnist", "python x.py", "report"])
    assert copied / "README.md" in tables.stale(copied)


def test_the_readme_quotes_the_number_of_looks():
    looks = len(list(csv.reader(committed_looks().splitlines()))) - 1
    assert f"<!-- looks -->{looks}<!-- end -->" in (ROOT / "README.md").read_text()


def test_a_missing_report_ends_with_a_sentence_that_names_it(copied):
    (copied / "results/reports/mnist-1.json").unlink()
    with pytest.raises(UserError, match=r"mnist-1\.json"):
        tables.stale(copied)


def test_a_name_that_nothing_makes_is_refused():
    with pytest.raises(UserError, match="'nothing'"):
        tables.rewritten("<!-- table nothing -->\n<!-- end of table nothing -->", {"a": ""}, {})


def test_every_table_and_number_that_is_made_stands_in_a_document():
    text = "".join(path.read_text() for path in tables.documents_of(ROOT))
    for name in tables.parts(ROOT)[0]:
        assert f"<!-- table {name} -->" in text, name
    for name in tables.parts(ROOT)[1]:
        assert f"<!-- {name} -->" in text, name
    assert len(re.findall("<!-- table ", text)) == len(re.findall("<!-- end of table ", text))


def test_every_table_of_the_documents_stands_between_marks_unless_it_is_of_words():
    for path in (ROOT / "README.md", ROOT / "results/README.md", ROOT / "results/trials.md"):
        outside = re.sub(r"<!-- table (\S+) -->.*?<!-- end of", "", path.read_text(), flags=re.S)
        rows = [line for line in outside.splitlines() if line.startswith("|")]
        assert not [row for row in rows if re.search(r"\d", row)], path.name


def test_every_report_was_counted_as_a_look():
    with open(ROOT / "results/looks.csv", newline="") as file:
        commands = [row["command"] for row in csv.DictReader(file) if row["what_for"] == "report"]
    for path in (ROOT / "results/reports").glob("*.json"):
        checkpoint = json.loads(path.read_text())["protocol"]["checkpoint"]
        assert any(f"--checkpoint {checkpoint} " in f"{each} " for each in commands), path.name


def seeds():
    """Return the reports of the seeds."""
    paths = [ROOT / f"results/reports/{name}.json" for name in tables.SEEDS]
    return [json.loads(path.read_text()) for path in paths]


def test_the_reports_of_the_seeds_are_of_these_seeds_and_of_one_protocol():
    protocols = [report["protocol"] for report in seeds()]
    for name, protocol in zip(tables.SEEDS, protocols, strict=True):
        for model in ("--checkpoint", "--control", "--classifier"):
            assert f"{model} results/{name}/" in protocol["command"]
        for key in ("sizes", "splits", "sgld", "git_commit", "models", "seed"):
            assert protocol[key] == protocols[0][key], key


def test_a_mean_has_its_standard_deviation_unless_that_rounds_to_zero():
    values = [{"x": 0.1}, {"x": 0.2}, {"x": 0.3}]
    assert tables.spread(values, lambda row: row["x"]) == "0.200 ± 0.100"
    assert tables.spread(values, lambda row: row["x"], 1, 100) == "20.0 ± 10.0"
    assert tables.spread(values, lambda row: row["x"], 0) == "0"
    assert tables.spread(values[:1], lambda row: row["x"]) == "0.100"


def test_the_lowest_auroc_is_of_sets_that_no_training_saw():
    results = {"white": 0.0, "rotated": 0.9, "kmnist-test": 0.8}
    found = {
        "sets": dict.fromkeys(results, ""),
        "results": {"jem": {name: {"energy": {"auroc": x}} for name, x in results.items()}},
    }
    assert tables.lowest("jem", "energy")({"out_of_distribution": found}) == 0.8


def test_the_judge_named_first_finds_the_larger_ratios():
    first, second = (tables.sampled(judge, "fresh") for judge in tables.JUDGES)
    assert all(first(report) > second(report) for report in seeds())


@pytest.mark.parametrize("flags", [[], ["--check"]])
def test_the_script_rewrites_or_complains(copied, monkeypatch, capsys, flags):
    monkeypatch.setattr(tables, "ROOT", copied)
    stale = tables.stale
    monkeypatch.setattr(tables, "stale", lambda: stale(copied))
    change(copied / "README.md", "<!-- looks -->", "<!-- looks -->9")
    if flags:
        with pytest.raises(SystemExit) as ended:
            tables.main(tables.parse(flags))
        assert ended.value.code == 2 and "README.md: stale" in capsys.readouterr().out
    else:
        tables.main(tables.parse(flags))
        assert (copied / "README.md").read_text() == (ROOT / "README.md").read_text()
