"""The rivals: each looks at the features and labels of the training rows once and returns a map of features."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """What a method may look at: train features z (n, d), labels y, which rows to forget, and the head reading z."""

    z: Tensor
    y: Tensor
    forget: Tensor
    head: nn.Linear
    seed: int


def original(problem: Problem) -> Map:
    """Forgets nothing."""
    return lambda z: z


def leace_is_forget(problem: Problem) -> Map:
    """LEACE with one concept: is this a row to forget?"""
    return _leace(problem, problem.forget.unsqueeze(1))


def leace_one_hot(problem: Problem) -> Map:
    """LEACE with one concept per class that has rows to forget; all retain rows are zero in every concept."""
    gone = problem.y[problem.forget].unique()
    return _leace(problem, (problem.y.unsqueeze(1) == gone) & problem.forget.unsqueeze(1))


def _leace(problem: Problem, concept: Tensor) -> Map:
    from concept_erasure import LeaceEraser

    eraser = LeaceEraser.fit(problem.z.double(), concept.double())
    return lambda z: eraser(z.double()).to(z)


def paper(problem: Problem) -> Map:
    """The paper's objective by its authors' optimiser, one direction per class that stays: z -> U U^T z."""
    from bench.peers.riemannian_adam import minimise

    rank = len(problem.y[~problem.forget].unique())
    retain, forget = (torch.cov(problem.z[rows].double().T) for rows in (~problem.forget, problem.forget))
    basis = minimise(retain / retain.trace(), forget / forget.trace(), rank, seed=problem.seed)
    return lambda z: z @ basis.to(z) @ basis.to(z).T


def ours(problem: Problem, erase: bool = False) -> Map:
    """This package's default: affine, positive part, angle found from moments and head."""
    from loft_fast import GroupedMoments, solve

    retain, forget = (
        GroupedMoments(problem.z.shape[1]).update(problem.z[rows], problem.y[rows])
        for rows in (~problem.forget, problem.forget)
    )
    return solve(retain, forget, head=problem.head, erase=erase)


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
