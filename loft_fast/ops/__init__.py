"""The few heavy operations, each behind one name: a float64 torch reference and the faster backends that match it."""

from loft_fast.ops.eigh import eigh
from loft_fast.ops.gram import gram
from loft_fast.ops.inverse_form import inverse_form
from loft_fast.ops.moments_update import moments_update
from loft_fast.ops.moments_update_project import moments_update_project
from loft_fast.ops.project import project
from loft_fast.ops.quantized_update import quantized_update
from loft_fast.ops.symmetric_matmul import symmetric_matmul
from loft_fast.ops.symmetric_sum import symmetric_sum
from loft_fast.ops.topk_projector import topk_projector

__all__ = [
    "eigh",
    "gram",
    "inverse_form",
    "moments_update",
    "moments_update_project",
    "project",
    "quantized_update",
    "symmetric_matmul",
    "symmetric_sum",
    "topk_projector",
]
