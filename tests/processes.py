"""Work that several processes of torch.distributed do together, for test_distributed.py; no test in itself."""

import contextlib
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, WeightedRandomSampler

import loft_fast as loft

WORLD = 4
ROWS, DIM, GROUPS = 1001, 33, 5


def rows(mean=1e3):
    """(ROWS, DIM) float64 with a large mean, and labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64) + mean
    return x, torch.randint(0, GROUPS, (ROWS,), generator=generator)


def share(rank):
    """Rows of a process: uneven, and none for number 2."""
    bounds = [0, 7, 500, 500, ROWS]
    return slice(bounds[rank], bounds[rank + 1])


def images(n=103):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 20, generator=generator), torch.randint(0, 5, (n,), generator=generator))


def start(work, rank, folder, *more):
    """What a process does: `work`, whose result it leaves in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(work(rank, *more), f"{folder}/{rank}.pt")
    with contextlib.suppress(RuntimeError):  # a process may be gone
        dist.monitored_barrier(timeout=timedelta(seconds=10))  # the first to leave must not cut off the last
        dist.destroy_process_group()


def message(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except loft.LoftError as error:
        return f"{type(error).__name__}: {error}"
    return None


def algebra(rank):
    x, labels = rows()
    mine = share(rank)
    found = {}
    for name, exact in (("float", None), ("exact", 2000.0)):
        one = loft.Moments(DIM, exact=exact)
        many = loft.GroupedMoments(DIM, exact=exact)
        if rank != 2:
            one.update(x[mine])
            many.update(x[mine], labels[mine])
        one.site = "fc:input" if rank == 1 else None
        assert one.all_reduce() is one
        assert many.all_reduce() is many
        found[name] = {
            "count": one.count,
            "site": one.site,
            "mean": one.mean,
            "scatter": one.scatter,
            "digest": one.digest(),
            "groups": {key: (many[key].count, many[key].mean, many[key].scatter) for key in many},
            "grouped digest": many.digest(),
        }
    late = loft.Moments(DIM, exact=True)
    if rank == 1:
        late.update(x)
    found["calibrated by one"] = late.all_reduce().digest(), loft.Moments(DIM, exact=True).update(x).digest()
    found["nothing"] = loft.Moments(DIM).all_reduce().count, len(loft.GroupedMoments(DIM).all_reduce())
    two = dist.new_group([0, 1])
    if rank < 2:
        found["subgroup"] = loft.Moments(DIM, exact=2000.0).update(x[share(rank)]).all_reduce(two).count
    else:
        found["subgroup"] = message(loft.Moments(DIM).all_reduce, two)
    return found


def refusals(rank):
    x = rows()[0]
    mine = loft.Moments(DIM).update(x[share(rank)])
    before = mine.digest()
    other = {
        "dim": loft.Moments(DIM + (rank == 3)),
        "exact": loft.Moments(DIM, exact=2000.0 if rank == 1 else None),
        "scale": loft.Moments(DIM, exact=2000.0 if rank == 1 else 20.0),
        "kind": loft.Moments(DIM) if rank else loft.GroupedMoments(DIM),
        "site": loft.Moments(DIM),
        "rows": loft.Moments(DIM, exact=20.0),
    }
    other["site"].site = ["a:input", None, "b:input", None][rank]
    other["rows"]._state.count = 2**31  # as many as all of them together cannot have
    found = {name: message(moments.all_reduce) for name, moments in other.items()}
    found["group"] = message(mine.all_reduce, "gloo")
    found["timeout"] = message(mine.all_reduce, timeout=0)
    found["unchanged"] = mine.digest() == before
    found["and on it goes"] = mine.all_reduce().count
    return found


def killed(rank):
    """Process 3 dies; the others hear of it."""
    x = rows()[0]
    mine = loft.Moments(DIM).update(x[share(rank)])
    before = mine.digest()
    if rank == 3:
        os._exit(9)
    begin = time.monotonic()
    said = message(mine.all_reduce, timeout=5)
    return said, time.monotonic() - begin, mine.digest() == before


def late(rank):
    """Process 3 is there, but does not come."""
    x = rows()[0]
    mine = loft.Moments(DIM).update(x[share(rank)])
    if rank == 3:
        time.sleep(8)
        return None
    begin = time.monotonic()
    said = message(mine.all_reduce, timeout=2)
    return said, time.monotonic() - begin


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))


def wrapped(kind):
    """The network as it is, or in a wrapper."""
    net = small_net()
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(net)
    if kind == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in (*(part for part in net if isinstance(part, nn.Linear)), net):
            fully_shard(layer, mesh=mesh)
    if kind == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        cpu = torch.device("cpu")
        for i, layer in enumerate(net):
            if isinstance(layer, nn.Linear):
                net[i] = FullyShardedDataParallel(layer, device_id=cpu)
        return FullyShardedDataParallel(net, device_id=cpu)
    return net


KINDS = ("plain", "DDP", "FSDP1", "FSDP2")


def fetching(rank):
    return {kind: _fetching(kind) for kind in KINDS}


def _fetching(kind):
    found = {}
    for n in (103, 3):  # of three rows, one process has none
        data = images(n)
        loaders = {
            "shuffled": DataLoader(data, batch_size=8, shuffle=True),
            "list": list(DataLoader(data, batch_size=8)),
        }
        for name, loader in loaders.items():
            model = wrapped(kind)
            moments = loft.fetch_moments(model, loader, group="label", exact=20.0, progress=False, shard=True)
            found[name, n] = moments.digest(), moments.site
    whole = loft.fetch_moments(small_net(), DataLoader(data, batch_size=8), group="label", exact=20.0, progress=False)
    projection = loft.solve(whole.without([whole.keys()[0]]), whole.select([whole.keys()[0]]), rank=4)
    x = images()[:8][0]
    with loft.attach(model, projection):
        found["attached"] = model(x).detach()
    found["fold"] = message(loft.fold, model, projection)
    return found


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def loaders(rank):
    data, net = images(), small_net()

    def fetch(loader, **options):
        return loft.fetch_moments(net, loader, group="label", progress=False, shard=True, **options)

    def breaking():
        for batch in DataLoader(data, batch_size=8):
            if rank == 1:
                raise OSError("the disk is gone")
            yield batch

    one = fetch(DataLoader(Stream(data), batch_size=8), exact=20.0)
    return {
        "stream": one.digest(),
        "float": fetch(DataLoader(data, batch_size=8)).total().scatter,
        "one has all": fetch([data[:]], exact=20.0).digest(),
        "DistributedSampler": message(fetch, DataLoader(data, batch_size=8, sampler=DistributedSampler(data))),
        "WeightedRandomSampler": message(fetch, DataLoader(data, sampler=WeightedRandomSampler([1.0] * 103, 103))),
        "exact": message(fetch, DataLoader(data), exact=True),
        "nothing": message(fetch, []),
        "nan": message(fetch, [(x * (float("nan") if rank == 2 else 1), y) for x, y in DataLoader(data, batch_size=8)]),
        "error": failure(fetch, breaking()),
    }


def failure(function, *arguments):
    try:
        function(*arguments)
    except (OSError, loft.LoftError) as error:
        return f"{type(error).__name__}: {error}"
    return None
