"""One process's view of the run: the accelerator, its precision, threads and who speaks."""

from __future__ import annotations

import ctypes
import os
import platform
import time
import warnings
from datetime import timedelta
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)

from tuning import sharding
from tuning.errors import UserError
from tuning.precision import ACCELERATE_NAMES, Level, level_of, remember
from tuning.safety.agreement import join_hosts
from tuning.safety.heartbeat import start_heartbeat

# Accelerate has no word yet for what torch 2.15 calls it; every process would say so at every stage.
warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
# In a depthwise layer both strides are the same memory.
DEPTHWISE = r"Grad strides do not match bucket view strides[\s\S]*grad\.sizes\(\) = \[\d+, 1, "
warnings.filterwarnings("ignore", message=DEPTHWISE, category=UserWarning)

T = TypeVar("T")
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def start(
    precision: Level | None, threads: int | Literal["auto"], timeout: float = 10.0, shards: bool = False
) -> Accelerator:
    """The accelerator that every recipe works with, on one process or many.

    Gradient accumulation is the engine's own (`tuning.engine`), so the accelerator's stays at 1.

    Args:
        precision: overrides the launcher's ``--mixed_precision``.
        threads: CPU threads per process, when training on a CPU.
        timeout: minutes that processes wait for one another in an exchange.
        shards: whether the recipe can train a model that is split over the processes (`tuning.sharding`).

    Raises:
        UserError: a precision that this hardware would silently run as another, a launcher that asks for
            sharding in vain, or whose processes don't find each other.
    """
    checked = _checked_precision(precision)
    with sharding.unseen_by_accelerate():
        accelerator = Accelerator(
            mixed_precision=ACCELERATE_NAMES[checked],
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # whatever the environment says
            kwargs_handlers=[
                # find_unused_parameters would hide a parameter that never gets a gradient; buffers are averaged before
                # they are used or saved (`safety.agreement`), not overwritten with rank 0's at every forward pass.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False),
                InitProcessGroupKwargs(backend=sharding.backend(), timeout=_waiting_time(timeout)),
            ],
        )
    if accelerator.distributed_type not in SUPPORTED:
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported: stages would not be opened and closed correctly "
            "under it. Use plain data parallelism (accelerate launch --multi_gpu) or FSDP2."
        )
    remember(accelerator, checked)
    _refuse_strangers(accelerator)
    sharding.check_asked(shards, checked, accelerator.num_processes, accelerator.device)
    join_hosts(accelerator, _waiting_time(timeout))
    start_heartbeat(timeout, start=str(same_everywhere(time.time_ns())))
    if accelerator.device.type == "cpu":
        keep_freed_memory()
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        # `accelerate launch` sets one thread where nobody asked for it.
        torch.set_num_threads(max(1, cpu_cores() // local_processes) if threads == "auto" else threads)
    return accelerator


def _refuse_strangers(accelerator: Accelerator) -> None:
    """Refuse processes that were launched together but don't know each other: each would train a run of its own."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise UserError(
            f"the launcher started {launched} processes, but each of them would train alone, because there is no GPU. "
            "For several processes on a CPU set ACCELERATE_USE_CPU=true."
        )


def _waiting_time(minutes: float) -> timedelta:
    """*minutes*, and a microsecond: the accelerator passes on only what differs from its own default, ten minutes."""
    return timedelta(minutes=minutes, microseconds=1)


def _checked_precision(precision: Level | None) -> Level:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = precision or {"no": "fp32"}.get(launched, launched)
    on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if wanted not in ACCELERATE_NAMES:
        raise UserError(f"precision {wanted!r} is not supported; choose fp32, bf16 or fp16.")
    if wanted == "fp16" and on_cpu and not torch.backends.mps.is_available():
        raise UserError(
            "precision fp16 needs a GPU: on a CPU the run would silently train in fp32. Use --precision bf16 or fp32."
        )
    if wanted.startswith("bf16") and not on_cpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"precision {wanted} is not supported by {torch.cuda.get_device_name()}; use --precision fp16 or fp32."
        )
    return wanted  # type: ignore[return-value]


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers(accelerator: Accelerator, workers: int | Literal["auto"]) -> int:
    """Loader processes of this training process: as asked, or the cores beside the one that trains, 1 to 8.

    None where training itself keeps two CPU cores or fewer busy: a third process would only take turns with it.
    """
    if workers != "auto":
        return workers
    cores = cpu_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type == "cpu" and cores <= 2:
        return 0
    return min(8, max(1, cores - 1))


def keep_freed_memory() -> None:
    """Tell glibc to keep freed activations instead of handing them back to the kernel after every step.

    Elsewhere than on glibc (macOS, Windows, musl) this does nothing.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, 2**31 - 1)
    libc.mallopt(m_top_pad, 256 * 2**20)


def same_everywhere(value: T) -> T:
    """Rank 0's value, on every process."""
    return broadcast_object_list([value])[0]  # type: ignore[no-any-return]


def precision_name(accelerator: Accelerator) -> Level:
    """The precision of training in the words of the flags."""
    return level_of(accelerator)
