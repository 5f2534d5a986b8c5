"""Run a function on several real processes joined by gloo.

The processes are forked from one that has imported torch already, so a test costs a second, not a launch.
"""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing as mp

from tests.ports import free_port
from tests.recipe_runs import forget_parent

TIMEOUT_SECONDS = 240


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(*args)`` on *world_size* processes; their results by rank. The first error of any rank is raised.

    Every rank checks that the group has the size asked for.
    """
    port, context = free_port(), mp.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, sender, function, args))
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    results = [_receive(receiver, rank) for rank, (receiver, _) in enumerate(pipes)]
    for process in processes:
        process.join(TIMEOUT_SECONDS if all(ok for ok, _ in results) else 5)
        process.kill()
    errors = [value for ok, value in results if not ok]
    assert not errors, "\n".join(errors)
    return [value for _, value in results]


def _receive(receiver: Connection, rank: int) -> tuple[bool, Any]:
    if not receiver.poll(TIMEOUT_SECONDS):
        return False, f"rank {rank} gave no answer within {TIMEOUT_SECONDS} s"
    try:
        return pickle.loads(receiver.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        return False, f"rank {rank} ended without an answer"


def _rank(
    rank: int, world_size: int, port: int, sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if world_size > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    try:
        torch.set_num_threads(1)
        from accelerate.state import PartialState

        forget_parent()
        found = PartialState(cpu=True).num_processes
        assert found == world_size, f"asked for {world_size} processes, got {found}"
        sender.send_bytes(pickle.dumps((True, function(*args))))
    except BaseException:
        sender.send_bytes(pickle.dumps((False, f"rank {rank}:\n{traceback.format_exc()}")))
    finally:
        sender.close()
        if world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os._exit(0)
