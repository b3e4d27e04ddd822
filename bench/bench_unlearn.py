"""A forget request on stored moments, up to the folded head, against what the paper's code does on stored features.

200 classes of 768 features; one class goes. The peer computes both covariances from the features and takes 50 steps of
Riemannian Adam on them. Checked before the clock starts: the optimum is certified and below the peer's loss on the
same objective, and the folded head is the head of the projected features.
"""

import torch
from torch import nn

from bench.compete import Rival, compete
from bench.peers.riemannian_adam import descend
from bench.problems import features
from loft_fast import GroupedMoments, fold, solve

CLASSES, DIM, RANK, GONE = 200, 768, 250, 7


def test_forget_a_class(benchmark):
    rows = 100 * CLASSES
    label = torch.arange(rows) % CLASSES
    x = features(rows, DIM, seed=0) + features(CLASSES, DIM, seed=1)[label]
    stored = GroupedMoments(DIM).update(x, label)
    stored.total()  # nothing waits
    head = nn.Sequential(nn.Linear(DIM, CLASSES))

    def ours(about="retain"):
        projection = solve(stored.without([GONE]), stored.select([GONE]), RANK, about)
        fold(head, projection, site="0")
        return projection

    def peer():
        kept, gone = x[label != GONE], x[label == GONE]
        retain, forget = (torch.cov(part.T).double() for part in (kept, gone))
        return descend(retain / retain.trace(), forget / forget.trace(), RANK)

    weight, bias = head[0].weight.detach().clone(), head[0].bias.detach().clone()
    projection = ours()
    assert torch.allclose(head(x[:64]), nn.functional.linear(projection(x[:64]), weight, bias), atol=1e-4)
    own = ours(about="own").certificate
    assert projection.certificate.relative_gap <= 1e-6
    assert own.relative_gap <= 1e-6
    assert own.loss < peer().loss
    rivals = {"covariances, then Riemannian Adam": Rival(peer, "geoopt", target=100)}
    case = f"1 of {CLASSES} classes, d = {DIM}, s = {RANK}"
    compete(benchmark, case, ours, rivals, projection.certificate.relative_gap, 5)
