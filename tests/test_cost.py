"""The cost model against counts made by hand, and against what torch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loft_fast import InputError, cost
from loft_fast.cost import Ceilings, Cost


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_dense_products_cost_twice_what_is_needed():
    n, d = 100, 40
    x = torch.randn(n, d)
    assert cost.moments_update(n, d).operations == counted(lambda: x.T @ x) * (d + 1) / (2 * d)
    square = torch.randn(d, d)
    assert cost.symmetric_matmul(d).operations == counted(lambda: square @ square) * (d + 1) / (2 * d)


def test_thin_products():
    n, d, s = 100, 40, 7
    x, u = torch.randn(n, d), torch.randn(d, s)
    assert cost.project(n, d, s).operations == counted(lambda: x @ u @ u.T)
    assert cost.moments_update_project(n, d, s, scatter=False).operations == counted(lambda: x.T @ (x @ u))
    both = cost.moments_update_project(n, d, s)
    assert both.operations == cost.moments_update(n, d).operations + counted(lambda: x.T @ (x @ u))


def test_bytes():
    assert cost.moments_update(10, 3, 2, torch.bfloat16).moved == 10 * 3 * 2 + 2 * 2 * 8 * (9 + 3 + 1)
    assert cost.project(10, 3, 2, torch.float64).moved == 8 * (10 * 3 * 2 + 3 * 2 + 3)
    assert cost.symmetric_matmul(5, 4).moved == 4 * 2 * 25 * 4


def test_projector_is_its_products_and_integers_are_four_bytes():
    assert cost.topk_projector(8, 3, products=10).operations == 10 * cost.symmetric_matmul(8, 3).operations
    assert cost.quantized_update(5, 4).operations == 4 * cost.moments_update(5, 4).operations


def test_roofline():
    ceilings = Ceilings(bandwidth=100.0, rate=1000.0)
    assert Cost(5000, 100).seconds(ceilings) == 5.0
    assert Cost(5000, 100).bound(ceilings) == "arithmetic"
    assert Cost(10, 300).seconds(ceilings) == 3.0
    assert Cost(10, 300).bound(ceilings) == "memory"
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)


def test_bad_sizes_are_named():
    with pytest.raises(InputError, match="d: got -1"):
        cost.symmetric_matmul(-1)
    with pytest.raises(InputError, match=r"rank: got 1\.5"):
        cost.project(1, 2, 1.5)
