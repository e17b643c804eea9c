"""A function run by several gloo processes on this machine, for tests of DDP and FSDP2."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["in_processes"]


def in_processes(function: Callable[..., Any], world: int = 2, *arguments: Any) -> Any:
    """The result of `function(rank, world, *arguments)` in the first of `world` processes that form a process group.

    The function must be importable by name in a fresh interpreter, and its result must pickle: numpy arrays, not tensors.
    An exception in any of them is raised here.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing: Any = torch.multiprocessing
    running = multiprocessing.spawn(_work, (world, port, queue, function, arguments), nprocs=world, join=False)
    found: list[Any] = []
    while not running.join(timeout=0.2):
        if not found and not queue.empty():  # a large result blocks its process until it is read
            found.append(queue.get())
    return found[0] if found else queue.get()


def _work(rank: int, world: int, port: int, queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # by which accelerate knows of the others
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    result = function(rank, world, *arguments)
    if rank == 0:
        queue.put(result)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort an interpreter at shutdown
