"""Can any projection of the features forget rows within classes? Every objective at every strength, the best reported.

python -m bench.quality.projections --data debian-sections --task "random 10%"

The best strength is picked by the gap to the retrained network itself, which no user could do: a bound, not a method.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bench.quality.data import DATA, load
from bench.quality.execute import Case, prepare
from bench.quality.measures import Seen, gap
from bench.quality.networks import features, linear_map, with_map
from bench.quality.originals import hardness
from bench.quality.setups import RECIPES
from bench.quality.tasks import TASKS, make
from loft_fast import GroupedMoments, Projection, solve

SHARES = (0.9, 0.99, 0.999, 0.9999)  # of the retain variance to be kept at least
WEIGHTS = (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # of the forget variance
DROPPED = (1, 2, 4, 8, 16, 32, 64, 128)  # directions


class Features:
    """What the head reads of the retain and the forget rows: features, labels, moments by class."""

    def __init__(self, case: Case) -> None:
        sets = case.sets
        self.retain, self.forget = (
            features(case.original.model, rows.x).double() for rows in (sets.retain_train, sets.forget_train)
        )
        self.y, self.y_forget = sets.retain_train.y, sets.forget_train.y
        dim = self.retain.shape[1]
        self.moments = (
            GroupedMoments(dim).update(self.retain, self.y),
            GroupedMoments(dim).update(self.forget, self.y_forget),
        )

    @property
    def residuals(self) -> tuple[Tensor, Tensor]:
        """Rows about the retain mean of their class."""
        means = torch.zeros(int(self.y.max()) + 1, self.retain.shape[1], dtype=torch.float64)
        for key in self.moments[0]:
            means[key] = self.moments[0][key].mean
        return self.retain - means[self.y], self.forget - means[self.y_forget]


def candidates(found: Features, head: torch.nn.Linear) -> Iterator[tuple[str, torch.nn.Module]]:
    """(objective, map of features), every objective at several strengths."""
    yield "as solve chooses", solve(*found.moments, head=head)
    yield "as solve chooses, erase", solve(*found.moments, head=head, erase=True)
    for share in SHARES:
        yield "a constraint: this much of the retain variance stays", solve(*found.moments, min_retain_kept=share)
    for weight in WEIGHTS:
        yield "a weight on the forget variance", solve(*found.moments, forget_weight=weight)
    residuals = found.residuals
    inside = [GroupedMoments(part.shape[1]).update(part, torch.zeros(len(part)).long()) for part in residuals]
    for weight in WEIGHTS:
        projection = solve(*inside, forget_weight=weight)
        # Class means stay: only what is inside the classes is projected, about the retain mean of all.
        yield "class-conditional centring", Projection(projection.basis, found.moments[0].total().mean)
    retain, forget = (part.T @ part / len(part) for part in residuals)
    retain.diagonal().add_(1e-6 * retain.trace() / len(retain))
    lower = torch.linalg.cholesky(retain)
    left = torch.linalg.solve_triangular(lower, forget, upper=False)
    white = torch.linalg.solve_triangular(lower, left.T, upper=False)
    yield from _dropping("whitening by the retain covariance", lower, torch.linalg.eigh(white).eigenvectors)
    own = torch.linalg.svd(residuals[1], full_matrices=False).Vh.T
    yield from _dropping("residual directions of the forget rows", None, own.flip(1))


def _dropping(name: str, lower: Tensor | None, vectors: Tensor) -> Iterator[tuple[str, torch.nn.Module]]:
    """Without the last few of these directions, in coordinates z = lower w if `lower` is given."""
    dim = len(vectors)
    for count in (count for count in DROPPED if count < vectors.shape[1]):
        gone = vectors[:, -count:]
        matrix = torch.eye(dim, dtype=torch.float64) - gone @ gone.T
        if lower is not None:
            matrix = torch.linalg.solve_triangular(lower, lower @ matrix, upper=False, left=False)
        yield name, linear_map(matrix, torch.zeros(dim))


def best(case: Case) -> dict[str, float]:
    """The smallest gap of every objective."""
    reference = Seen.of(case.retrained.model, case.sets)
    found = {"nothing is done": gap(Seen.of(case.original.model, case.sets), reference)}
    rows = Features(case)
    for name, change in candidates(rows, case.original.model.fc):
        problem = case.problem(case.original.model, torch.zeros_like(case.task.train), case.task.train, (), 0)
        reached = gap(Seen.of(with_map(problem.copy(), change), case.sets), reference)
        found[name] = min(found.get(name, torch.inf), reached)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="debian-sections")
    parser.add_argument("--task", choices=TASKS, default="random 10%")
    parser.add_argument("--seed", type=int, default=0, help="of the original")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quality"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = load(options.data, options.cache)
    for network, recipe in RECIPES[options.data].items():
        task = make(options.task, data, lambda: hardness(recipe, data, options.cache / "models"))  # noqa: B023
        for name, reached in best(prepare(recipe, data, task, options.seed, options.cache / "models")).items():
            print(f"{options.data} {network}: {options.task}  {name:60}{reached:8.2f}")


if __name__ == "__main__":
    main()
