"""The one module that knows torch.distributed; every function is a no-op for a single process.

torch is imported when it is needed, so that a command can parse its flags before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from src.utils.errors import UserError, describe_os_error, first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

#: Seconds that a process waits for the others, whose share of the work may take longer; a crash is noticed at once.
TIMEOUT = 6 * 3600
#: Seconds that the first process of a host has to show an error before the others show theirs.
FIRST_TO_SAY_SECONDS = 10
#: Key of the count of processes that reported their end.
SAID = "said"


def is_launched() -> bool:
    """Whether a launcher (torchrun) started this process, alone or with others."""
    return "RANK" in os.environ


def launched_processes() -> int:
    """How many processes the launcher (torchrun) started; 1 without one. Needs no process group."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """The rank the launcher gave this process; 0 without one. Needs no process group."""
    return int(os.environ.get("RANK", "0"))


def _node_rank() -> int:
    """The rank on this host that the launcher gave this process; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_initialized() -> bool:
    """Whether a process group exists."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes."""
    if not is_initialized():
        return 1
    import torch.distributed as dist

    return dist.get_world_size()


def rank() -> int:
    """Rank of this process among all."""
    if not is_initialized():
        return 0
    import torch.distributed as dist

    return dist.get_rank()


def is_main() -> bool:
    """Whether this is the process that writes files and shows messages."""
    return rank() == 0


def part_of(size: int) -> range:
    """This process's share of `size` items: contiguous, in rank order, sizes differing by one at most."""
    start, end = (size * number // world_size() for number in (rank(), rank() + 1))
    return range(start, end)


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        import torch.distributed as dist

        dist.barrier()


def init_process_group(use_cpu: bool, timeout: int = TIMEOUT) -> torch.device:
    """Join the group that torchrun prepared, if any, and return this process's device (see `prepared`).

    A process waits `timeout` seconds for another before it gives up.
    """
    if not timeout > 0:
        raise UserError(f"--ddp_timeout must be above 0, found {timeout}")
    import torch
    import torch.distributed as dist

    from src.utils.devices import prepared

    use_cuda = torch.cuda.is_available() and not use_cpu
    device = torch.device("cuda", _node_rank()) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    if launched_processes() > 1 and not is_initialized():
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(seconds=timeout))
    return prepared(device)


def destroy_process_group() -> None:
    """Leave the group, if there is one."""
    if is_initialized():
        import torch.distributed as dist

        dist.destroy_process_group()


def is_first_to_say(message: str) -> bool:
    """Whether this process should show an error: one that several processes raise is shown once."""
    if not is_initialized():
        # Before the group exists the processes of a host share most errors: the first shows it, and the launcher ends
        # the others. One that is still alive after a while has another error.
        if _node_rank() > 0:
            time.sleep(FIRST_TO_SAY_SECONDS)
        return True
    import torch.distributed as dist

    try:
        # The rendezvous store works even when the group no longer does.
        store = dist.distributed_c10d._get_default_store()
        store.add(SAID, 1)
        return store.add(f"said/{hashlib.sha256(message.encode(errors='replace')).hexdigest()}", 1) == 1
    except RuntimeError:
        # The process that served it is gone.
        return True


def is_first_to_stop() -> bool:
    """Whether this process should report that it was stopped: one does, none after an error that stopped them all."""
    if not is_initialized():
        return _node_rank() == 0
    import torch.distributed as dist

    try:
        return dist.distributed_c10d._get_default_store().add(SAID, 1) == 1
    except RuntimeError:
        return False


def describe_lost_process(error: BaseException) -> str | None:
    """One line about an error of communication with another process; None for any other error."""
    if "torch" not in sys.modules:
        return None
    import torch.distributed as dist

    if not (isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))):
        return None
    lost = "the connection to another process is lost: it failed with an error, shown before, or was killed"
    late = "another process did not answer within --ddp_timeout: it hangs, or has that much more to do than this one"
    return f"{late if 'timed out' in str(error).lower() else lost} ({first_line(error)})"


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on the main process and return its result on every process.

    When it fails, every process raises a UserError, so that none waits; of several, the main process raises an
    unexpected error as it is.
    """
    if world_size() == 1:
        return function()
    import torch.distributed as dist

    value: Any = None
    message: str | None = None
    unexpected: Exception | None = None
    if is_main():
        try:
            value = function()
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else describe_os_error(error)
            if message is None:
                unexpected = error
                message = f"the main process failed ({type(error).__name__}: {first_line(error)})"
    outcome = [(value, message)]
    dist.broadcast_object_list(outcome, src=0)
    value, message = outcome[0]
    if unexpected is not None:
        raise unexpected
    if message is not None:
        raise UserError(message)
    return value


def all_gather_object(value: T) -> list[T]:
    """Every process's `value`, of any size, in rank order."""
    gathered = [value] * world_size()
    if len(gathered) > 1:
        import torch.distributed as dist

        dist.all_gather_object(gathered, value)
    return gathered


@contextlib.contextmanager
def raising_together() -> Iterator[None]:
    """Raise a UserError of one process on every process, so that none waits; all leave the block together."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    if messages := [text for text in all_gather_object(str(failure) if failure else None) if text is not None]:
        raise UserError(messages[0]) from failure


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """Every process's `size`, in rank order, by one collective on `device`: training asks at every step."""
    if world_size() == 1:
        # Without a tensor, which would wait for the device.
        return [size]
    import torch
    import torch.distributed as dist

    gathered = torch.full((world_size(), 1), size, device=device)
    dist.all_gather(list(gathered.unbind()), gathered[0].clone())
    return [int(number) for number in gathered]


@cache
def _gather_rows() -> Any:
    """Make the function that gathers, whose class needs torch."""
    import torch
    import torch.distributed as dist

    class GatherRows(torch.autograd.Function):
        """All-gather along the first axis; backward sums every process's gradient of a row: each loss uses it."""

        @staticmethod
        def forward(ctx: Any, local: torch.Tensor, sizes: list[int]) -> torch.Tensor:
            ctx.sizes = sizes
            padded = local.new_zeros((max(sizes), *local.shape[1:]))
            padded[: len(local)] = local
            gathered = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(gathered, padded)
            return torch.cat([tensor[:size] for tensor, size in zip(gathered, sizes, strict=True)])

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
            gradient = gradients[0].contiguous().clone()
            dist.all_reduce(gradient, op=dist.ReduceOp.SUM)
            start = sum(ctx.sizes[: rank()])
            return gradient[start : start + ctx.sizes[rank()]], None

    return GatherRows


def gather_with_grad(local: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Rows of all processes, ``(sum(sizes), ...)`` in rank order, with exact gradients.

    Each process holds `local`, ``(sizes[rank], ...)``; the backward is a collective call that every process must reach.
    """
    return local if world_size() == 1 else _gather_rows().apply(local, sizes)
