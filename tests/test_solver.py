import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    GENERIC,
    KINDS,
    SIZES,
    Problem,
    best_distance_bound,
    distance_bound,
    kept,
    make_problem,
    maximum,
    rows_with,
    support,
)

from loft_fast import GroupedMoments, InputError, Moments, solve
from loft_fast.peers.riemannian_adam import descend
from loft_fast.search import Optimum

TOLERANCE = 1e-6  # the default of `solve`


def close(loss):
    """How far above the optimum a loss may be: the tolerance, of losses below 1e-9 that of 1e-9."""
    return TOLERANCE * max(loss, 1e-9) + 1e-12


def shares(projection, A, B):
    """a and b, from basis and matrices alone."""
    basis = projection.basis.numpy()
    return kept(A, basis), kept(B, basis)


def check_certificate(projection, A, B, loss):
    """Whatever was minimised: the basis is orthonormal and has the shares, loss and gap that are claimed for it."""
    certificate, basis = projection.certificate, projection.basis.numpy()
    a, b = shares(projection, A, B)
    assert np.abs(basis.T @ basis - np.eye(projection.rank)).max() < 1e-12
    assert certificate.rank == projection.rank
    assert certificate.retain_kept == pytest.approx(a, abs=1e-12)
    assert certificate.forget_kept == pytest.approx(b, abs=1e-12)
    assert certificate.loss == pytest.approx(loss(a, b), rel=1e-9, abs=1e-12)
    assert certificate.lower_bound <= certificate.loss
    assert certificate.loss - certificate.lower_bound <= close(certificate.loss)
    assert certificate.relative_gap <= TOLERANCE


def check_optimal(problem, about="retain", weight=1.0, **options):
    """The optimum at the problem's rank, against bounds that the solver has no part in."""
    A, B = problem.matrices(about)
    projection = solve(*problem.moments, rank=problem.rank, about=about, **options)
    certificate = projection.certificate
    check_certificate(projection, A, B, lambda a, b: (1 - a) ** 2 + weight * b**2)
    assert projection.rank == problem.rank
    bound = best_distance_bound(A, B, problem.rank, weight)
    assert certificate.loss - bound <= close(certificate.loss)
    assert bound <= certificate.loss * (1 + 1e-9) + 1e-12
    assert certificate.lower_bound <= bound * (1 + 1e-9) + 1e-12
    return projection


# ---- the paper's objective ----


@pytest.mark.parametrize("index", range(len(SIZES)), ids=[f"d{size}" for size in SIZES])
@pytest.mark.parametrize("kind", KINDS)
def test_optimum_is_global(kind, index):
    # The rank walks with the kind, too, so that every kind meets every rank from 1 to d - 1.
    check_optimal(make_problem(kind, SIZES[index], index + list(KINDS).index(kind)))


@pytest.mark.parametrize("index", range(0, len(SIZES) - 1, 2), ids=[f"d{size}" for size in SIZES[:-1:2]])
@pytest.mark.parametrize("kind", GENERIC)
def test_optimum_about_own_is_global(kind, index):
    problem = make_problem(kind, SIZES[index], index)
    if kind == "two rows":
        assert np.linalg.matrix_rank(problem.matrices("own")[1]) == 1
    projection = check_optimal(problem, about="own")
    assert not projection.center.any()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_optimum_is_global_in_two_and_three_dimensions(kind, dim, rank):
    problem = make_problem(kind, dim)
    check_optimal(Problem(problem.retain, problem.forget, min(rank, dim - 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_no_angle_refutes_the_optimum(kind):
    problem = make_problem(kind, 24, index=2)
    A, B = problem.matrices()
    loss = solve(*problem.moments, rank=problem.rank).certificate.loss
    bounds = [distance_bound(A, B, problem.rank, angle) for angle in np.linspace(0, math.pi / 2, 400)]
    assert max(bounds) <= loss + 1e-12


numbers = st.floats(0, 1, allow_subnormal=False).map(lambda x: round(x, 3))


@given(st.data())
def test_no_set_of_coordinates_beats_the_optimum(data):
    dim = data.draw(st.integers(2, 7))
    rank = data.draw(st.integers(1, dim - 1))
    spectrum = st.lists(numbers, min_size=dim, max_size=dim).filter(any)
    retain, forget = (np.array(data.draw(spectrum)) for _ in range(2))
    projection = check_optimal(Problem(rows_with(retain, np.eye(dim)), rows_with(forget, np.eye(dim)), rank))
    a, b = retain / retain.sum(), forget / forget.sum()
    losses = [
        (1 - a[list(subset)].sum()) ** 2 + b[list(subset)].sum() ** 2
        for subset in itertools.combinations(range(dim), rank)
    ]
    assert projection.certificate.loss <= min(losses) + close(min(losses))


def test_everything_is_kept_and_forgotten_where_the_supports_allow_it():
    problem = make_problem("disjoint", 16)
    projection = solve(*problem.moments, rank=8)
    assert shares(projection, *problem.matrices()) == pytest.approx((1.0, 0.0), abs=1e-9)
    assert projection.certificate.loss < 1e-12


def test_flat_side_is_reached_by_rotation():
    # A = B: every loss is (1 - a)^2 + a^2, and a = 1/2 is between what any choice of eigenvectors gives.
    problem = make_problem("equal", 13)
    projection = solve(*problem.moments, rank=6)
    assert shares(projection, *problem.matrices()) == pytest.approx((0.5, 0.5), abs=1e-7)
    assert projection.certificate.loss == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("alive", [slice(0, 8), slice(0, 160)])
def test_optimum_of_sets_alike_and_white_is_the_share_of_the_rank(alive):
    # Every projector of rank s keeps at most s / live of both; M(pi / 4) is zero.
    signs = torch.ones(1, 1)
    while len(signs) < 512:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    x = torch.zeros(512, 160)
    x[:, alive] = signs[:, 1 : 1 + alive.stop]
    rank = alive.stop // 2
    projection = solve(Moments(160).update(x), Moments(160).update(x.clone()), rank)
    assert projection.certificate.loss == pytest.approx(0.5, rel=1e-6)
    assert projection.certificate.relative_gap <= 1e-6
    assert projection.basis.isfinite().all()


def test_optimum_where_of_the_thinned_features_only_one_varies():
    x, y = rows(500, 160), rows(300, 160) + 0.3
    x[:, 8::8] = y[:, 8::8] = 0
    certificate = solve(moments(x), moments(y), 40).certificate
    alive = x.any(0)
    expected = solve(moments(x[:, alive]), moments(y[:, alive]), 40).certificate
    assert certificate.loss == pytest.approx(expected.loss, rel=2e-6)
    assert 0 <= certificate.relative_gap <= 1e-6


@pytest.mark.parametrize(("loss", "bound"), [(math.nan, 0.1), (0.1, math.nan), (math.nan, math.nan)])
def test_what_is_no_number_is_not_proven(loss, bound):
    assert not Optimum(None, loss, bound).relative_gap <= 1e-6


def test_tighter_tolerance_is_met():
    problem = make_problem("power law", 48, index=2)
    certificate = solve(*problem.moments, rank=problem.rank, tolerance=1e-11).certificate
    assert certificate.relative_gap <= 1e-11


def test_looser_tolerance_costs_less():
    problem = make_problem("power law", 48, index=2)
    loose, tight = (solve(*problem.moments, rank=problem.rank, tolerance=t).certificate for t in (0.1, 1e-9))
    assert loose.eigen_solves < tight.eigen_solves
    assert tight.loss <= loose.loss


@pytest.mark.parametrize("learning_rate", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("kind", ["power law", "steep", "gaussian rows", "fewer rows than features", "low rank"])
def test_descent_never_gets_below(kind, learning_rate):
    problem = make_problem(kind, 33, index=3)
    A, B = problem.matrices("own")
    certificate = solve(*problem.moments, rank=problem.rank, about="own").certificate
    descent = descend(torch.from_numpy(A), torch.from_numpy(B), problem.rank, learning_rate=learning_rate)
    assert certificate.loss <= descent.loss
    assert certificate.lower_bound <= min((1 - a) ** 2 + b**2 for a, b in descent.path) + 1e-6  # float32


def test_center_and_site_come_from_the_retain_moments():
    problem = make_problem("power law", 12)
    retain, forget = problem.moments
    retain.site = "fc:input"
    projection = solve(retain, forget, rank=3)
    assert torch.equal(projection.center, retain.mean)
    assert projection.site == "fc:input"


def test_grouped_moments_are_pooled():
    problem = make_problem("gaussian rows", 12)
    rows = torch.from_numpy(problem.retain)
    grouped = GroupedMoments(12).update(rows, torch.arange(len(rows)) % 3)
    pooled, plain = (solve(retain, problem.moments[1], rank=4) for retain in (grouped, problem.moments[0]))
    torch.testing.assert_close(pooled.matrix(), plain.matrix(), rtol=0, atol=1e-9)


def test_result_is_the_same_every_time():
    problem = make_problem("equal on a block", 24, index=3)
    first, second = (solve(*problem.moments, rank=problem.rank) for _ in range(2))
    assert torch.equal(first.basis, second.basis)


# ---- other trade-offs ----


@pytest.mark.parametrize("weight", [1e-4, 0.1, 10.0, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_forget_weight_is_optimal(kind, weight):
    problem = make_problem(kind, 16, index=2)
    projection = check_optimal(problem, weight=weight, forget_weight=weight)
    assert f"{weight:g} b^2" in projection.certificate.goal


@pytest.mark.parametrize("weight", [0.03, 1.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
def test_forget_weight_without_rank_beats_every_rank(kind, weight):
    problem = make_problem(kind, 9)
    A, B = problem.matrices()
    projection = solve(*problem.moments, forget_weight=weight)
    check_certificate(projection, A, B, lambda a, b: (1 - a) ** 2 + weight * b**2)
    bounds = {rank: best_distance_bound(A, B, rank, weight) for rank in range(1, 9)}
    assert projection.certificate.loss <= min(bounds.values()) + 2 * close(projection.certificate.loss)
    assert projection.certificate.lower_bound <= min(bounds.values()) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("weight", [0.05, 0.2, 0.5, 1.0, 3.0])
def test_best_rank_is_found_along_a_flat_side(weight):
    # Seven directions of the same ratio: at one angle the positive part jumps from rank 1 to rank 8.
    retain, forget = np.array([0.3] + [0.1] * 7), np.array([0.02] + [0.14] * 7)
    problem = Problem(rows_with(retain, np.eye(8)), rows_with(forget, np.eye(8)), 1)
    projection = solve(*problem.moments, forget_weight=weight)
    losses = {rank: (1 - retain[:rank].sum()) ** 2 + weight * forget[:rank].sum() ** 2 for rank in range(1, 8)}
    assert projection.rank == min(losses, key=losses.get)
    assert projection.certificate.loss == pytest.approx(min(losses.values()), rel=TOLERANCE)
    assert projection.certificate.relative_gap <= TOLERANCE


def least_forget_kept(A, B, rank, share):
    """The largest lower bound on b where a >= share: a line of the frontier for every angle."""
    return maximum(
        lambda angle: (math.cos(angle) * share - support(A, B, rank, angle)) / max(math.sin(angle), 1e-9), math.pi / 2
    )


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 0.99, 0.9999])
@pytest.mark.parametrize("rank", [1, 8, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_least_is_kept_of_forget_under_a_floor_for_retain(kind, rank, fraction):
    problem = make_problem(kind, 16)
    A, B = problem.matrices()
    share = fraction * support(A, B, rank, 0.0)  # of the most that this rank can keep
    projection = solve(*problem.moments, rank=rank, min_retain_kept=share)
    check_certificate(projection, A, B, lambda a, b: b)
    a, b = shares(projection, A, B)
    assert a >= share - 1e-11
    assert b == pytest.approx(max(0.0, least_forget_kept(A, B, rank, share)), rel=2 * TOLERANCE, abs=1e-9)
    assert f"a >= {share:g}" in projection.certificate.goal


@pytest.mark.parametrize("kind", ["power law", "commuting", "equal", "tied", "low rank"])
def test_floor_for_retain_without_rank_beats_every_rank(kind):
    problem = make_problem(kind, 9)
    A, B = problem.matrices()
    projection = solve(*problem.moments, min_retain_kept=0.8)
    check_certificate(projection, A, B, lambda a, b: b)
    bounds = [least_forget_kept(A, B, rank, 0.8) for rank in range(1, 9) if support(A, B, rank, 0.0) >= 0.8]
    assert projection.certificate.loss <= max(0.0, min(bounds)) + 1e-9 + 2 * close(projection.certificate.loss)


@pytest.mark.parametrize("extra", [0, 3, None])
@pytest.mark.parametrize("kind", ["low rank", "fewer rows than features", "two rows", "one direction", "disjoint"])
def test_all_of_retain_can_be_kept_where_it_has_few_directions(kind, extra):
    problem = make_problem(kind, 24)
    A, B = problem.matrices()
    values, vectors = np.linalg.eigh(A)
    needed = vectors[:, values > 1e-9]
    rank = None if extra is None else needed.shape[1] + extra
    projection = solve(*problem.moments, rank=rank, min_retain_kept=1.0)
    check_certificate(projection, A, B, lambda a, b: b)
    assert projection.certificate.retain_kept >= 1 - 1e-11
    # What retain needs must stay; the rest of the rank, if any, hides where forget has nothing if it can.
    free = 24 - np.linalg.matrix_rank(np.stack([A, B]).reshape(48, 24))
    if (extra or 0) <= free:
        assert projection.certificate.forget_kept == pytest.approx(kept(B, needed), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind", ["power law", "gaussian rows", "commuting", "tied", "low rank"])
def test_smallest_rank_that_reaches_a_loss(kind):
    problem = make_problem(kind, 20)
    A, B = problem.matrices()
    bounds = {rank: best_distance_bound(A, B, rank) for rank in range(1, 20)}
    limit = 1.1 * min(bounds.values()) + 0.01
    projection = solve(*problem.moments, max_loss=limit)
    check_certificate(projection, A, B, lambda a, b: (1 - a) ** 2 + b**2)
    assert projection.certificate.loss <= limit
    assert all(bounds[rank] > limit for rank in range(1, projection.rank))


def test_any_rank_reaches_the_largest_loss():
    assert solve(*make_problem("power law", 12).moments, max_loss=2.0).rank == 1


@pytest.mark.parametrize("angle", [0.0, 0.2, math.pi / 4, 1.2, math.pi / 2])
@pytest.mark.parametrize("kind", ["power law", "fewer rows than features", "commuting", "equal on a block"])
def test_angle_fixes_the_rate_of_exchange(kind, angle):
    problem = make_problem(kind, 16)
    A, B = problem.matrices()
    projection = solve(*problem.moments, rank=5, angle=angle)
    check_certificate(projection, A, B, lambda a, b: math.cos(angle) * (1 - a) + math.sin(angle) * b)
    assert projection.certificate.loss == pytest.approx(math.cos(angle) - support(A, B, 5, angle), abs=1e-12)
    assert projection.certificate.eigen_solves == 1
    assert projection.certificate.angle == angle


@pytest.mark.parametrize(("options", "angle"), [({"angle": 0.1}, 0.1), ({"angle": 0.8}, 0.8), ({}, 0.3)])
@pytest.mark.parametrize("kind", GENERIC)
def test_angle_without_rank_keeps_the_positive_part(kind, options, angle):
    problem = make_problem(kind, 24)
    A, B = problem.matrices()
    projection = solve(*problem.moments, **options)
    check_certificate(projection, A, B, lambda a, b: math.cos(angle) * (1 - a) + math.sin(angle) * b)
    M, P = math.cos(angle) * A - math.sin(angle) * B, projection.matrix().numpy()
    inside, outside = np.linalg.eigvalsh(P @ M @ P), np.linalg.eigvalsh((np.eye(24) - P) @ M @ (np.eye(24) - P))
    assert inside.min() > -1e-13
    assert outside.max() < 1e-13
    assert (inside > 1e-13).sum() == projection.rank  # directions without variance in either set do not count
    assert projection.certificate.angle == angle


def test_rank_one_is_left_where_nothing_is_positive():
    projection = solve(*make_problem("power law", 12).moments, angle=math.pi / 2)
    assert projection.rank == 1


def test_certificate_says_what_was_done_and_what_it_cost():
    problem = make_problem("power law", 24)
    certificate = solve(*problem.moments, rank=5).certificate
    assert certificate.goal == "(1 - a)^2 + b^2"
    assert 1 <= certificate.eigen_solves <= 12
    assert certificate.seconds > 0
    assert certificate.predicted == {}
    text = str(certificate)
    for part in (certificate.goal, certificate.why, f"{certificate.loss:.8g}", f"{certificate.lower_bound:.8g}"):
        assert part in text
    assert f"{100 * certificate.retain_kept:.3f} %" in text
    assert f"{certificate.eigen_solves} eigen-solves" in text


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"rank": 3}, "rank asked for"),
        ({"angle": 0.5}, "angle asked for"),
        ({"forget_weight": 2.0}, "over all ranks"),
        ({"max_loss": 1.0}, "smallest rank"),
        ({}, "fixed default"),
    ],
)
def test_certificate_gives_the_reason(options, why):
    assert why in solve(*make_problem("power law", 12).moments, **options).certificate.why


# ---- refusals ----


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moments(x):
    return Moments(x.shape[-1]).update(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retain": Moments(6)}, r"retain: .*empty.*at least one row"),
        ({"forget": Moments(6)}, r"forget: .*empty.*at least one row"),
        ({"forget": GroupedMoments(6)}, r"forget: .*empty.*at least one row"),
        ({"retain": rows(9, 6)}, r"retain: got Tensor, expected Moments"),
        ({"forget": None}, r"forget: got NoneType, expected Moments"),
        ({"forget": moments(rows(9, 5))}, r"forget: got dim 5, expected 6"),
        ({"retain": moments(rows(9, 1)), "forget": moments(rows(9, 1))}, r"retain: got dim 1, expected at least 2"),
        ({"retain": moments(torch.full((9, 6), 1e6 / 3))}, r"retain: 9 rows of zero variance"),
        ({"retain": moments(rows(1, 6))}, r"retain: 1 rows of zero variance"),
        ({"forget": moments(rows(1, 6)), "about": "own"}, r"forget: 1 rows of zero variance"),
        ({"rank": 0}, r"rank: got 0, expected an integer in \[1, 5\]"),
        ({"rank": -1}, r"rank: got -1, expected"),
        ({"rank": 6}, r"rank: got 6, expected"),
        ({"rank": 2.0}, r"rank: got 2.0, expected an integer"),
        ({"rank": "2"}, r"rank: got '2', expected an integer"),
        ({"rank": True}, r"rank: got True, expected an integer"),
        ({"rank": torch.tensor(2)}, r"rank: got tensor\(2\), expected an integer"),
        ({"about": "both"}, r"about: got 'both', expected 'retain' or 'own'"),
        ({"about": None}, r"about: got None, expected"),
        ({"tolerance": 0.0}, r"tolerance: got 0.0, expected a number in \[1e-12, 1\]"),
        ({"tolerance": math.nan}, r"tolerance: got nan, expected"),
        ({"angle": math.nan}, r"angle: got nan, expected a number in \[0, 1.5"),
        ({"angle": -0.1}, r"angle: got -0.1, expected"),
        ({"angle": 90}, r"angle: got 90, expected"),
        ({"forget_weight": math.nan}, r"forget_weight: got nan, expected"),
        ({"forget_weight": math.inf}, r"forget_weight: got inf, expected"),
        ({"forget_weight": 0.0}, r"forget_weight: got 0.0, expected"),
        ({"forget_weight": True}, r"forget_weight: got True, expected"),
        ({"min_retain_kept": 1.1}, r"min_retain_kept: got 1.1, expected a number in \[0, 1\]"),
        ({"min_retain_kept": math.nan}, r"min_retain_kept: got nan, expected"),
        ({"min_retain_kept": 0.999}, r"min_retain_kept: got 0.999, but rank 5 keeps at most 0.9"),
        ({"min_retain_kept": 0.9, "rank": 1}, r"min_retain_kept: got 0.9, but rank 1 keeps at most 0."),
        ({"max_loss": math.nan}, r"max_loss: got nan, expected a number in \[0, 2\]"),
        ({"max_loss": -0.5}, r"max_loss: got -0.5, expected"),
        ({"max_loss": "small"}, r"max_loss: got 'small', expected"),
        ({"max_loss": 1e-6}, r"max_loss: got 1e-06, but no projector of any rank has a loss below 0."),
        ({"max_loss": 0.5, "rank": 2}, r"max_loss: got it together with rank"),
        ({"angle": 0.1, "forget_weight": 2.0}, r"forget_weight: got it together with angle, expected at most one"),
        ({"min_retain_kept": 0.5, "max_loss": 1.0}, r"max_loss: got it together with min_retain_kept"),
    ],
)
def test_refusals_name_the_argument_and_change_nothing(arguments, message):
    call = {"retain": moments(rows(40, 6)), "forget": moments(rows(30, 6) + 1)} | arguments
    before = {name: bits(call[name]) for name in ("retain", "forget")}
    with pytest.raises(InputError, match=message):
        solve(**call)
    assert {name: bits(call[name]) for name in ("retain", "forget")} == before


def bits(x):
    """Everything an argument holds, bit for bit."""
    if isinstance(x, GroupedMoments):
        return [(key, bits(x[key])) for key in x]
    if isinstance(x, Moments):
        return x.count, x.site, x.mean.view(torch.int64).tolist(), x.scatter.view(torch.int64).tolist()
    return x.tolist() if isinstance(x, torch.Tensor) else x


def test_solving_changes_neither_argument():
    problem = make_problem("power law", 12)
    retain, forget = problem.moments
    before = bits(retain), bits(forget)
    solve(retain, forget, rank=3)
    assert (bits(retain), bits(forget)) == before
