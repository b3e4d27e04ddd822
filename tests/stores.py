"""What the store's test files share."""

import torch
from conftest import normal

from loft_fast import GroupedMoments, UnlearningStore

DIM = 12


def rows(n=480, groups=6, seed=3):
    """Rows (n, DIM), and the group of each, as a tensor."""
    keys = torch.arange(n) % groups
    return normal(n, DIM, seed=seed) + 3 * torch.eye(groups, DIM, dtype=torch.float64)[keys], keys


def moments(names=None, **options):
    x, keys = rows(**options)
    return GroupedMoments(DIM, exact=16.0).update(x, keys if names is None else [names[key] for key in keys.tolist()])


def new_store(folder, names=None, **options):
    return UnlearningStore.create(folder / "store", moments(names), **options)


def content(folder):
    """Every file of a store, by path relative to it, but for the ledger's lock table."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-shm")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
