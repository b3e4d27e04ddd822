"""What the processes of a torch.distributed group say to each other."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from loft_fast.errors import DistributedError, InputError
from loft_fast.ops.arguments import check_positive

TIMEOUT = 300.0  # seconds


class Peers:
    """The processes that call the same function together.

    Args:
        group: of torch.distributed; None: all processes.
        timeout: seconds to wait for the slowest of them, in every exchange.

    Raises:
        InputError: torch.distributed is not initialised, this process is not in the group, or a bad timeout.
    """

    def __init__(self, group: Any = None, timeout: float = TIMEOUT) -> None:
        check_positive("timeout", timeout)
        if not dist.is_available() or not dist.is_initialized():
            raise InputError("group: torch.distributed is not initialised (torch.distributed.init_process_group)")
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise InputError("group: this process is not a member of it")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise InputError(f"group: got {type(group).__name__}, expected a torch.distributed.ProcessGroup or None")
        self.group, self.timeout = group, timeout
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._backend = dist.get_backend(group)
        self.device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else "cpu"

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors that all processes give, which have the same shape and dtype."""
        there = tensor.to(self.device, copy=True)
        self._wait(lambda: dist.all_reduce(there, group=self.group, async_op=True))
        return there.to(tensor.device)

    def gather(self, tensor: Tensor) -> Tensor:
        """(size, ...): the tensors that all processes give, which have the same shape and dtype, by rank."""
        there = tensor.to(self.device).contiguous()
        found = [torch.empty_like(there) for _ in range(self.size)]
        self._wait(lambda: dist.all_gather(found, there, group=self.group, async_op=True))
        return torch.stack(found).to(tensor.device)

    def exchange(self, message: Any) -> list[Any]:
        """What all processes say, by rank; each says something that JSON can write."""
        if self._backend == "gloo":  # which can tell who is missing
            limit = timedelta(seconds=self.timeout)
            self._wait(lambda: dist.monitored_barrier(self.group, limit, wait_all_ranks=True))
        text = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([len(text)])).flatten().tolist()
        padded = text.new_zeros(max(lengths))
        padded[: len(text)] = text
        rows = self.gather(padded).cpu().numpy()
        return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def broadcast(self, thing: Any, rank: int) -> Any:
        """What process `rank` of the group has, in all of them; anything that can be pickled."""
        things = [thing if self.rank == rank else None]
        self._wait(lambda: dist.broadcast_object_list(things, group=self.group, group_src=rank))
        return things[0]

    def _wait(self, begin: Callable[[], Any]) -> None:
        start = time.monotonic()
        try:
            work = begin()
            if work is not None:
                work.wait(timedelta(seconds=self.timeout))
        except RuntimeError as error:
            raise DistributedError(
                f"group: process {self.rank} of {self.size} waited {time.monotonic() - start:.1f} s for the others "
                f"(timeout={self.timeout:g}), one of which has failed or is late: {str(error).splitlines()[0]}"
            ) from error
