"""How long an optimizer step takes on W GPUs: a closed form on paper, without torch.

Four things are put together, each a function of its own: kernels against the peaks of a GPU (roofline), the all-reduce
of DDP's buckets (ring or tree, whichever is shorter), how much of it hides behind the backward pass, and what the host
does at every step. `tests.benchmarks.scale_simulation` plays the same step event by event; `tests.benchmarks.scale`
prints tables.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes at which DDP closes a bucket; gradients are float32, under bf16 too
UPDATE_BYTES = 32  # an element: its gradient for the norm (4), then AdamW reads p, g, m, v and writes p, m, v (28)
SAVED_BYTES = 12  # an element in a checkpoint: parameter and AdamW's two moments
MESSAGES = 2  # small all-reduces of every step on the GPUs: the loss, and who wants to stop or save
EVAL_BATCH = 64  # pictures per forward pass per process (`tuning.feeds`)


@dataclass(frozen=True)
class Cluster:
    """Machines of equal GPUs. All of it is assumed, nothing measured.

    Attributes:
        gpus: a machine.
        peak: bf16 FLOP/s of a GPU, dense.
        memory: bytes/s of its memory.
        compute_share: of `peak` that kernels bound by arithmetic reach.
        memory_share: of `memory` that kernels bound by it reach.
        link: bytes/s to and, at once, from a GPU within a machine.
        network: the same between machines, per GPU.
        link_share: of both that an all-reduce reaches.
        hop: seconds of a message within a machine.
        network_hop: seconds of a message between machines.
        host_hop: seconds of a message between processes over TCP (gloo).
        launch: seconds of the host for one kernel.
        cores: CPU cores a machine.
        decode: seconds of one core for one picture.
        copy: bytes/s from a GPU to the host.
    """

    gpus: int = 8
    peak: float = 989e12
    memory: float = 3.35e12
    compute_share: float = 0.7
    memory_share: float = 0.6
    link: float = 450e9
    network: float = 50e9
    link_share: float = 0.8
    hop: float = 3e-6
    network_hop: float = 5e-6
    host_hop: float = 30e-6
    launch: float = 20e-6
    cores: int = 112
    decode: float = 1.43e-3
    copy: float = 50e9


H100 = Cluster()


@dataclass(frozen=True)
class Work:
    """What one process does in one micro-batch.

    Attributes:
        images: of the micro-batch.
        kernels: FLOP and bytes of each, in order, forward then backward.
        gradients: bytes of each open parameter's, as they appear, and how many kernels are done by then.
        parameters: elements of the whole model, closed ones included.
        gathered: bytes of one of them on its way under FSDP2: bf16, float32 for models with BatchNorm.
    """

    images: int
    kernels: tuple[tuple[float, float], ...]
    gradients: tuple[tuple[int, int], ...]
    parameters: int
    gathered: int = 2

    @property
    def gradient_bytes(self) -> int:
        """What DDP reduces at every optimizer step."""
        return sum(size for size, _ in self.gradients)

    @property
    def open_parameters(self) -> int:
        """Elements that are trained."""
        return self.gradient_bytes // 4


@dataclass(frozen=True)
class Step:
    """The parts of an optimizer step, in seconds; they depend on the number of processes only in `reduces` and `vote`.

    Attributes:
        compute: all forward and backward passes.
        ready: when each bucket is, from the start of the step.
        reduces: all-reduce of each bucket.
        host: until the host has launched everything; it votes then whether memory ran out anywhere.
        vote: the exchange of that vote.
        messages: small all-reduces on the GPUs after the buckets.
        update: gradient norm and optimizer.
    """

    compute: float
    ready: tuple[float, ...]
    reduces: tuple[float, ...]
    host: float = 0.0
    vote: float = 0.0
    messages: float = 0.0
    update: float = 0.0

    @property
    def exchanged(self) -> float:
        """When the last bucket is reduced. They go one after another, none before it is ready.

        ``max_j (ready_j + sum_{i >= j} reduce_i)``: bucket j is the last that had to be waited for.
        """
        left = list(itertools.accumulate(reversed(self.reduces)))[::-1]
        return max((ready + rest for ready, rest in zip(self.ready, left, strict=True)), default=0.0)

    @property
    def exposed(self) -> float:
        """Seconds of the exchange that don't hide behind the backward pass."""
        return max(0.0, self.exchanged - self.compute)

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        on_gpu = max(self.compute, self.exchanged) + self.messages
        return max(on_gpu, self.host + self.vote) + self.update


def finish_times(kernels: Sequence[tuple[float, float]], cluster: Cluster) -> list[float]:
    """When each kernel ends: after all before it, and not before the host has launched it.

    A kernel takes the longer of its arithmetic and its memory traffic (roofline; Williams et al. 2009). The host runs
    ahead of the GPU, so what it waits for kernels that are short doesn't add up.
    """
    flops, bandwidth = cluster.peak * cluster.compute_share, cluster.memory * cluster.memory_share
    done = itertools.accumulate(max(work / flops, size / bandwidth) for work, size in kernels)
    return [max(seconds, number * cluster.launch) for number, seconds in enumerate(done, start=1)]


def in_buckets(gradients: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Gradients (bytes, ready) in DDP's buckets: one is closed once it reaches its limit, the first earlier."""
    buckets: list[tuple[int, float]] = []
    size, ready, limit = 0, 0.0, FIRST_BUCKET
    for more, when in gradients:
        size, ready = size + more, when
        if size >= limit:
            buckets.append((size, ready))
            size, limit = 0, BUCKET
    return [*buckets, (size, ready)] if size else buckets


def ring(size: float, world: int, bandwidth: float, hop: float) -> float:
    """Seconds of a ring all-reduce: every process sends 2 (W - 1) / W of it in 2 (W - 1) messages.

    Patarasuk and Yuan (2009).
    """
    return 2 * (world - 1) * (size / world / bandwidth + hop)


def tree(size: float, world: int, bandwidth: float, hop: float) -> float:
    """Seconds of a double binary tree: all of it up and down, 2 log2(W) messages deep (Sanders et al. 2009)."""
    return 2 * size / bandwidth + 2 * math.ceil(math.log2(world)) * hop


def all_reduce(size: float, world: int, cluster: Cluster) -> float:
    """Seconds to sum *size* bytes over *world* GPUs.

    Between machines all GPUs send at once, each through an adapter of its own, so that a machine has `gpus` times the
    bandwidth of one; within it the links bound every GPU.
    """
    if world == 1:
        return 0.0
    if world <= cluster.gpus:
        bandwidth, hop = cluster.link, cluster.hop
    else:
        bandwidth, hop = min(cluster.link, cluster.gpus * cluster.network), cluster.network_hop
    return min(algorithm(size, world, bandwidth * cluster.link_share, hop) for algorithm in (ring, tree))


def vote_seconds(world: int, cluster: Cluster) -> float:
    """A few bytes through gloo, whose all-reduce is a ring whatever the size: 2 (W - 1) messages in a row."""
    return 2 * (world - 1) * cluster.host_hop


def step(work: Work, world: int, cluster: Cluster, micro_steps: int = 1) -> Step:
    """An optimizer step of *micro_steps* times *work* on each of *world* GPUs; the last one exchanges gradients."""
    ends = finish_times(work.kernels, cluster)
    before = (micro_steps - 1) * ends[-1]
    buckets = in_buckets([(size, before + ends[kernels - 1]) for size, kernels in work.gradients])
    together = world > 1
    return Step(
        compute=before + ends[-1],
        ready=tuple(ready for _, ready in buckets) if together else (),
        reduces=tuple(all_reduce(size, world, cluster) for size, _ in buckets) if together else (),
        host=micro_steps * len(work.kernels) * cluster.launch,
        vote=vote_seconds(world, cluster),
        messages=MESSAGES * all_reduce(4, world, cluster),
        update=UPDATE_BYTES * work.open_parameters / (cluster.memory * cluster.memory_share),
    )


def sent_by_ddp(work: Work, world: int) -> float:
    """Bytes that a GPU sends in a step: gradients of the open parameters, float32, all-reduced."""
    return 2 * (world - 1) / world * work.gradient_bytes


def sent_by_fsdp2(work: Work, world: int) -> float:
    """Bytes that a GPU sends in a step of FSDP2, with one micro-batch.

    Parameters are gathered for the forward pass, closed ones too, and where there is a backward pass for that;
    gradients of open ones are reduced in float32 and scattered. Closed ones are taken to lie below the open ones, where
    no backward pass comes; what FSDP2 gathers for it in vain, layers outside of blocks and one block, is left out. All
    open, in one precision, these are 3 units to the 2 of an all-reduce.
    """
    gathered = work.gathered * (work.parameters + work.open_parameters)
    return (world - 1) / world * (gathered + work.gradient_bytes)


def decoded_per_second(cluster: Cluster, workers: int) -> float:
    """Images/s that the loaders of one machine can decode with *workers* processes for each GPU."""
    return min(cluster.gpus * workers, cluster.cores) / cluster.decode


def evaluation_seconds(images: int, world: int, images_per_second: float) -> float:
    """Of *images* on *world* GPUs, each at *images_per_second*; all wait for the one with the most batches."""
    return math.ceil(images / (EVAL_BATCH * world)) * EVAL_BATCH / images_per_second


def staging_seconds(work: Work, cluster: Cluster) -> float:
    """For which training waits when a checkpoint is taken; a thread writes it beside training."""
    return SAVED_BYTES * work.parameters / cluster.copy
