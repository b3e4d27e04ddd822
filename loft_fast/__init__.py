"""loft_fast: make a trained torch model forget, by projecting its features onto the subspace that the rest needs.

LOFT (arXiv 2601.22456), solved to a certified global optimum instead of by descent.
"""

from loft_fast.batch_solver import solve_batch
from loft_fast.continual import Continual
from loft_fast.errors import (
    DistributedError,
    FederatedError,
    FileFormatError,
    FoldError,
    InputError,
    LoftError,
    MissingExtraError,
    SiteError,
    StoreError,
)
from loft_fast.evaluate import Evaluation, evaluate
from loft_fast.fetch import fetch_moments
from loft_fast.grouped_moments import GroupedMoments
from loft_fast.layers import Erased, erase_layers
from loft_fast.match import match_retrained
from loft_fast.moments import Moments
from loft_fast.nested import solve_within
from loft_fast.outputs import close_outputs
from loft_fast.privacy import release
from loft_fast.projection import Certificate, Projection
from loft_fast.solver import solve
from loft_fast.store import UnlearningStore
from loft_fast.surgery import Attached, attach, fold
from loft_fast.unlearn import Unlearned, unlearn
from loft_fast.unseen import Unseen, unseen

__version__ = "0.1.0"

__all__ = [
    "Attached",
    "Certificate",
    "Continual",
    "DistributedError",
    "Erased",
    "Evaluation",
    "FederatedError",
    "FileFormatError",
    "FoldError",
    "GroupedMoments",
    "InputError",
    "LoftError",
    "MissingExtraError",
    "Moments",
    "Projection",
    "SiteError",
    "StoreError",
    "Unlearned",
    "UnlearningStore",
    "Unseen",
    "attach",
    "close_outputs",
    "erase_layers",
    "evaluate",
    "fetch_moments",
    "fold",
    "match_retrained",
    "release",
    "solve",
    "solve_batch",
    "solve_within",
    "unlearn",
    "unseen",
]
