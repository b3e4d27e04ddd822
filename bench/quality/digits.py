"""Forgetting on 5000 MNIST digits: the demo's network, every digit by itself, over several originals.

python -m bench.quality.digits --digits 0 1 2 3 4 5 6 7 8 9 --seeds 0 1 2 --json results.json
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from bench.quality.results import Run, median_table, summarise, table, write
from loft_fast.demo.compare import compare
from loft_fast.demo.digits import Digits, load_digits
from loft_fast.demo.run import prepare

DATA, MODEL, TASK = "mnist-5000", "CNN 32-64-512-10", "one digit"
RANK = 32  # of the published method


def forgotten(data: Digits, digits: tuple[int, ...], seed: int, cache: Path) -> Iterator[Run]:
    """The retrained network and every method, for these digits and one original."""
    problem, originals = prepare(data, digits, RANK, seed, cache, tqdm.write, progress=False)
    outcomes = {outcome.method: outcome for outcome in compare(problem, *originals)}
    retrained = outcomes["retrain"]
    for name, outcome in outcomes.items():
        yield Run(TASK, name, seed, outcome.evaluation, retrained.evaluation, outcome.seconds, retrained.seconds)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", nargs="+", type=int, default=list(range(10)), help="each is forgotten by itself")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one original each")
    parser.add_argument("--json", type=Path, help="add the rows to this file")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    data = load_digits()
    problems = list(itertools.product(options.seeds, options.digits))
    runs = [run for seed, digit in tqdm(problems) for run in forgotten(data, (digit,), seed, options.cache)]
    rows = summarise(runs, DATA, MODEL)
    print(table(rows), median_table(rows), sep="\n\n")
    if options.json:
        write(rows, options.json)


if __name__ == "__main__":
    main()
