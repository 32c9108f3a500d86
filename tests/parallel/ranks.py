"""Runs a function in several processes, as torchrun would, over gloo on the CPU."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _one(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], out: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    dist.init_process_group("gloo")
    try:
        out.put((rank, pickle.dumps(function(*arguments)), None))  # bytes outlive the process
    except Exception:
        out.put((rank, None, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks. Raises RuntimeError with a rank's own error."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    processes = [
        context.Process(target=_one, args=(rank, world, port, function, arguments, out), daemon=True)
        for rank in range(world)
    ]
    for p in processes:
        p.start()
    found: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, value, error = out.get(timeout=240)
            if error is not None:
                raise RuntimeError(f"rank {rank}:\n{error}")
            found[rank] = pickle.loads(value)
        for p in processes:
            p.join(60)
    finally:
        for p in processes:
            p.kill()
    return [found[rank] for rank in range(world)]
