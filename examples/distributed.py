"""Several processes share out one pass over the data, and each has the moments of all of it.

    torchrun --nproc-per-node 4 examples/distributed.py

On GPUs, take the backend "nccl" and move the model to the process's own device.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import loft_fast as loft

dist.init_process_group("gloo")
torch.manual_seed(0)  # the same model and data everywhere
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
data = TensorDataset(torch.randn(10_000, 64), torch.randint(0, 10, (10_000,)))

moments = loft.fetch_moments(model, DataLoader(data, batch_size=256), group="label", exact=20.0, shard=True)
projection = loft.solve(moments.without([3]), moments.select([3]), rank=16)
loft.fold(model, projection)
if dist.get_rank() == 0:
    print(f"{dist.get_world_size()} processes, {moments.count} rows, digest {moments.digest()[:16]}")
dist.destroy_process_group()
