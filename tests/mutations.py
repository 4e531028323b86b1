"""A mutation study: change the code in one place, run its tests, see whether they notice.

    python tests/mutations.py --sample 40 --seed 0

makes mutants of the files behind published numbers, runs each in a copy of the tree, and prints
killed or survived with the place and the change, and how many survive. A survivor is either
equivalent to the code, or a test is missing. Nothing here is collected by pytest. The public tools
do not fit: mutmut wants a package in a folder of its own name, cosmic-ray one test command for all.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TESTS = {  # file: the test files that answer for it, the quickest first; of two patterns the last
    "sgld.py": "sgld",
    "models.py": "models",
    "train_jem.py": "train_jem outliers guard",
    "train_classifier.py": "train_classifier origin train_jem",
    "predict.py": "predict",
    "evaluate.py": "evaluate",
    "support/attacks.py": "single_step attacks",
    "support/ball.py": "single_step attacks",
    "support/square.py": "attacks",
    "support/metrics.py": "metrics",
    "support/sample_metrics.py": "metrics",
    "support/ood.py": "evaluate images",
    "support/detector.py": "detector",
    "support/judges.py": "judges",
    "support/looks.py": "evaluate",
    "support/restarts.py": "restarts",
    "support/training.py": "training train_jem guard interruption",
    "support/schedule.py": "training",
    "support/augment.py": "training outliers data",
    "support/guard.py": "guard",
    "support/report/*.py": "evaluate",
    "support/report/classification.py": "report_classification evaluate",
    "support/report/robustness.py": "report_robustness",
    "benchmarks/time_to_quality.py": "benchmarks",
}
LEFT_OUT = (".*", "__pycache__", "*.egg-info")  # of a copy
PAIRS: list[tuple[Any, Any]] = [
    *((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE)),
    *((ast.Eq, ast.NotEq), (ast.And, ast.Or)),
    *(("min", "max"), ("amin", "amax"), ("clamp_min", "clamp_max")),
]
SWAPS = dict(PAIRS) | {other: one for one, other in PAIRS}


class Mutant(NamedTuple):
    """The change of this number in a file, at a line, in words."""

    file: str
    number: int
    line: int
    change: str


def changes(node: ast.AST) -> Iterator[tuple[str, Any]]:
    """Yield (field, another value) for each way to change one field of a node."""
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in SWAPS:
            yield "op", SWAPS[type(op)]()
        case ast.Compare(ops=[op]) if type(op) in SWAPS:
            yield "ops", [SWAPS[type(op)]()]
        case ast.UnaryOp(op=ast.USub()):
            yield "op", ast.UAdd()
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "operand", ast.UnaryOp(ast.Not(), operand)
        case ast.Constant(value=bool(value)):
            yield "value", not value
        case ast.Constant(value=int(value) | float(value)):
            yield "value", 1 - value if value in (0, 1) else 2 * value
        case ast.Name(id=name) if name in SWAPS:
            yield "id", SWAPS[name]
        case ast.Attribute(attr=name) if name in SWAPS:
            yield "attr", SWAPS[name]
        case ast.Expr(value=ast.Call()):
            yield "value", ast.Constant(...)
        case ast.Call(func=function, args=arguments, keywords=keywords):
            if len(arguments) > 1 and getattr(function, "id", None) not in ("min", "max"):
                yield "args", [arguments[1], arguments[0], *arguments[2:]]
            for each in keywords:
                yield "keywords", [other for other in keywords if other is not each]


def below(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below a node, but for the words of messages."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.Raise | ast.JoinedStr):
            yield child
            yield from below(child)


def mutants(file: str, tree: ast.Module) -> Iterator[Mutant]:
    """Change the tree in one place after another; each change lasts until the next is asked for."""
    number = 0
    for node in below(tree):
        for field, value in changes(node):
            before, original = ast.unparse(node), getattr(node, field)
            setattr(node, field, value)
            change = f"{before}  ->  {ast.unparse(node)}"
            yield Mutant(file, number, node.lineno, change)  # type: ignore[attr-defined]
            setattr(node, field, original)
            number += 1


def fails(snapshot: Path, tests: str, limit: float | None, mutant: Mutant | None = None) -> bool:
    """Tell whether the tests of a copy of the tree, with a mutant in it, fail or exceed limit s."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "sgld_nrg"  # the package's name
        shutil.copytree(snapshot, copy)
        if mutant:
            tree = ast.parse((copy / mutant.file).read_text())
            next(islice(mutants(mutant.file, tree), mutant.number, None))
            (copy / mutant.file).write_text(ast.unparse(tree))
        paths = [f"tests/test_{name}.py" for name in tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *paths]
        env, nowhere = {**os.environ, "PYTHONPATH": folder}, subprocess.DEVNULL
        settings: dict[str, Any] = {"stdout": nowhere, "stderr": nowhere, "start_new_session": True}
        run = subprocess.Popen(command, cwd=copy, env=env, **settings)
        try:
            return run.wait(limit) != 0
        except subprocess.TimeoutExpired:
            return True
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)  # and what the tests started
                run.wait()


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default 1)")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="mutants of these files alone")
    parser.add_argument("--sample", type=int, metavar="N", help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default 0)")
    args = parser.parse_args()
    if (ROOT.parent / "shared" / "data").is_dir():  # as conftest.py has it
        os.environ.setdefault("SGLD_NRG_DATA", str(ROOT.parent / "shared" / "data"))
    with TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        snapshot = Path(folder) / "snapshot"  # the tree may be edited meanwhile
        shutil.copytree(ROOT, snapshot, ignore=shutil.ignore_patterns(*LEFT_OUT))
        tests = {
            str(path.relative_to(snapshot)): names
            for pattern, names in TESTS.items()
            for path in sorted(snapshot.glob(pattern))
        }
        if unknown := set(args.only or ()) - set(tests):
            parser.error(f"--only: {', '.join(unknown)} is none of {', '.join(tests)}")
        chosen: list[Mutant] = []
        for file in args.only or tests:
            chosen += mutants(file, ast.parse((snapshot / file).read_text()))
        if args.sample:
            chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
        limits = {}
        for names in {tests[mutant.file]: None for mutant in chosen}:
            began = time.perf_counter()
            if fails(snapshot, names, None):
                sys.exit(f"error: the tests of {names} fail as they are: mend them first")
            limits[names] = 60 + 3 * (time.perf_counter() - began)

        def killed(mutant: Mutant) -> bool:
            names = tests[mutant.file]
            return fails(snapshot, names, limits[names], mutant)

        survivors = 0
        for mutant, dead in zip(chosen, pool.map(killed, chosen), strict=True):
            survivors += not dead
            verdict = "killed  " if dead else "SURVIVED"
            print(f"{verdict}  {mutant.file}:{mutant.line}  {mutant.change}", flush=True)
    print(f"{survivors} of {len(chosen)} survive")


if __name__ == "__main__":
    main()
