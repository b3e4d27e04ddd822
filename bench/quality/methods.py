"""The rivals: each looks at the features and labels of the training rows once and returns a map of features."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from bench.peers.leace import Leace
from bench.peers.riemannian_adam import descend
from loft_fast import GroupedMoments, solve
from loft_fast.objective import build_objective

Map = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """What a method may look at: train features z (n, d), labels y, which rows to forget, and the head reading z."""

    z: Tensor
    y: Tensor
    forget: Tensor
    head: nn.Linear
    seed: int

    def moments(self) -> tuple[GroupedMoments, GroupedMoments]:
        """Moments by class of the rows to retain and of those to forget."""
        retain, forget = (
            GroupedMoments(self.z.shape[1]).update(self.z[rows], self.y[rows]) for rows in (~self.forget, self.forget)
        )
        return retain, forget


def original(problem: Problem) -> Map:
    """Forgets nothing."""
    return lambda z: z


def leace_is_forget(problem: Problem) -> Map:
    """LEACE with one concept: is this a row to forget?"""
    return Leace(problem.z, problem.forget.unsqueeze(1))


def leace_one_hot(problem: Problem) -> Map:
    """LEACE with one concept per class that has rows to forget; all retain rows are zero in every concept."""
    gone = problem.y[problem.forget].unique()
    return Leace(problem.z, (problem.y.unsqueeze(1) == gone) & problem.forget.unsqueeze(1))


def paper(problem: Problem) -> Map:
    """The paper's objective by its authors' optimiser, one direction per class that stays: z -> U U^T z."""
    retain, forget = (moments.total() for moments in problem.moments())
    objective = build_objective(retain, forget, about="own")
    rank = len(problem.y[~problem.forget].unique())
    basis = descend(objective.retain, objective.forget, rank, seed=problem.seed).basis.to(problem.z)
    return lambda z: z @ basis @ basis.T


def ours(problem: Problem, erase: bool = False) -> Map:
    """This package's default: affine, positive part, angle found from moments and head."""
    return solve(*problem.moments(), head=problem.head, erase=erase)


def ours_erase(problem: Problem) -> Map:
    """Like `ours`, but a linear probe is not to find the forget rows either."""
    return ours(problem, erase=True)


METHODS: dict[str, Callable[[Problem], Map]] = {
    "original": original,
    "leace is-forget": leace_is_forget,
    "leace one-hot": leace_one_hot,
    "paper": paper,
    "ours": ours,
    "ours erase": ours_erase,
}
