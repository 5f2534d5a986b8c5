"""Is it worth going from 8 to 64 GPUs? Predictions for any timm model, in Markdown; nothing here is measured.

    python -m tests.benchmarks.scale                                        # the tables of docs/scale.md
    python -m tests.benchmarks.scale --models resnet50 --gpus 8 16 32 --batch-size 1024
    python -m tests.benchmarks.scale --network 1.5e9                        # bytes/s of a GPU between machines
    python -m tests.benchmarks.scale --check                                # against published figures of one GPU

No GPU is needed: FLOP and bytes are counted on shapes (`scale_work`), times follow from data-sheet numbers and the
shares of them in `scale_model.Cluster`, and stragglers are played by `scale_simulation`.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import timm

from tests.benchmarks import scale_model as paper
from tests.benchmarks import scale_work
from tests.benchmarks.scale_model import Cluster, Step, Work
from tests.benchmarks.scale_simulation import Disturbance, simulate

WORKERS = 8  # for each GPU, what `--workers auto` ends at
JUDGED = 50_000  # images of an evaluation
PLAYED = 4  # optimizer steps of a simulation, seed 0
NETWORKS = {"400 Gb/s a GPU": 50e9, "100 Gb/s a GPU": 12.5e9, "100 Gb/s a machine": 12.5e9 / 8}
DISTURBED = {
    "passes vary by 2 %": Disturbance(jitter=0.02),
    "by 5 %": Disturbance(jitter=0.05),
    "one GPU 20 % slower": Disturbance(slow_rank=1.2),
}
# RTX 3090: 71 TFLOP/s (bf16, accumulated in float32, dense) and 936 GB/s, NVIDIA's white paper on GA102.
RTX3090 = replace(paper.H100, peak=71e12, memory=936e9)
# Batch and training images/s of timm's results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv, 224 pixels.
PUBLISHED = {
    "tf_efficientnet_lite0": (512, 2134.89),
    "convnext_base": (128, 338.68),
    "vit_large_patch16_224": (64, 117.2),
    "resnet50": (512, 1218.01),
    "regnety_016": (512, 650.07),
}


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        gpus: numbers of GPUs.
        micro_batch: images of a GPU in a forward pass, and in an optimizer step when the batch grows with the GPUs.
        batch_size: of an optimizer step over all GPUs, when it doesn't grow.
    """

    models: Sequence[str] = ("tf_efficientnet_lite0", "convnext_base", "vit_large_patch16_224")
    gpus: Sequence[int] = (8, 64, 512)
    micro_batch: int = 64
    batch_size: int = 4096
    image_size: int = 224
    cluster: Cluster = paper.H100

    def work(self, name: str, opened: str = "all", images: int | None = None) -> Work:
        """Of one micro-batch."""
        return work_of(name, images or self.micro_batch, self.image_size, opened)

    def grown(self, name: str, gpus: int, opened: str = "all") -> Step:
        """The optimizer step when the batch grows with the GPUs."""
        return paper.step(self.work(name, opened), gpus, self.cluster)

    def shared(self, name: str, gpus: int) -> Step:
        """The optimizer step when a batch of one size is shared out, in micro-batches of the usual size or less."""
        share = self.batch_size // gpus
        micro = min(share, self.micro_batch)
        return paper.step(self.work(name, images=micro), gpus, self.cluster, share // micro)


@functools.cache
def work_of(name: str, images: int, image_size: int, opened: str) -> Work:
    """Counted once: it takes seconds."""
    return scale_work.count(name, images, image_size, opened=opened)


def efficiency_rows(asked: Question) -> Iterable[list[str]]:
    """A batch that grows with the GPUs, and one that stays."""
    growing = ["a step", "of it exchange", "vote", "images/s", "efficiency", "head alone: efficiency"]
    fixed = [f"batch {asked.batch_size:,}: images a GPU", "efficiency"]
    yield ["model", "GPUs", *growing, *fixed]
    for name in asked.models:
        for gpus in asked.gpus:
            step, alone = asked.grown(name, gpus), asked.grown(name, 1)
            head = asked.grown(name, 1, "head").seconds / asked.grown(name, gpus, "head").seconds
            shared = asked.shared(name, 1).seconds / asked.shared(name, gpus).seconds / gpus
            yield [
                *(name, str(gpus), milliseconds(step.seconds), milliseconds(step.exposed), milliseconds(step.vote)),
                f"{gpus * asked.micro_batch / step.seconds:,.0f}",
                *(f"{alone.seconds / step.seconds:.2f}", f"{head:.2f}"),
                *(str(asked.batch_size // gpus), f"{shared:.2f}"),
            ]


def traffic_rows(asked: Question) -> Iterable[list[str]]:
    """What a GPU sends at the largest number of them, and what one machine eats."""
    sending = ["DDP sends a step", "FSDP2", "head alone: DDP", "head alone: FSDP2"]
    machine = ["a machine eats", "its loaders decode", "a checkpoint holds up training"]
    yield ["model", "parameters", *sending, *machine, f"judging {JUDGED:,} images"]
    most = max(asked.gpus)
    for name in asked.models:
        parts = [asked.work(name, opened) for opened in ("all", "head")]
        sent = [send(part, most) for part in parts for send in (paper.sent_by_ddp, paper.sent_by_fsdp2)]
        forward = asked.grown(name, 1, "head").compute  # and next to nothing backward
        eaten = asked.cluster.gpus * asked.micro_batch / asked.grown(name, 1).seconds
        yield [
            *(name, f"{parts[0].parameters / 1e6:.1f} M", *(f"{size / 1e6:,.0f} MB" for size in sent)),
            *(f"{eaten:,.0f}/s", f"{paper.decoded_per_second(asked.cluster, WORKERS):,.0f}/s"),
            milliseconds(paper.staging_seconds(parts[0], asked.cluster)),
            milliseconds(paper.evaluation_seconds(JUDGED, most, asked.micro_batch / forward)),
        ]


def network_rows(asked: Question) -> Iterable[list[str]]:
    """Efficiency by the bandwidth between machines."""
    gpus = middle(asked)
    yield [f"{gpus} GPUs", *NETWORKS, *(f"head alone, {name}" for name in NETWORKS)]
    for name in asked.models:
        cells = []
        for opened in ("all", "head"):
            for network in NETWORKS.values():
                on = replace(asked, cluster=replace(asked.cluster, network=network))
                cells.append(on.grown(name, 1, opened).seconds / on.grown(name, gpus, opened).seconds)
        yield [name, *(f"{cell:.2f}" for cell in cells)]


def disturbance_rows(asked: Question) -> Iterable[list[str]]:
    """Efficiency by simulation, and on paper."""
    yield ["model", "GPUs", "on paper", *(f"simulated: {name}" for name in DISTURBED)]
    for name in asked.models:
        alone = asked.grown(name, 1).seconds
        for gpus in asked.gpus:
            step = asked.grown(name, gpus)
            played = [simulate(step, gpus, PLAYED, disturbed) for disturbed in DISTURBED.values()]
            yield [name, str(gpus), f"{alone / step.seconds:.2f}", *(f"{alone / seconds:.2f}" for seconds in played)]


def check_rows() -> Iterable[list[str]]:
    """One GPU on paper against figures that others have measured and published."""
    yield ["RTX 3090, 224 px, AMP", "batch", "published, images/s", "on paper", "ratio"]
    for name, (images, published) in PUBLISHED.items():
        predicted = images / paper.step(work_of(name, images, 224, "all"), 1, RTX3090).seconds
        yield [name, str(images), f"{published:,.0f}", f"{predicted:,.0f}", f"{predicted / published:.2f}"]


def middle(asked: Question) -> int:
    """The number of GPUs for tables that have room for one."""
    return sorted(asked.gpus)[len(asked.gpus) // 2]


def milliseconds(seconds: float) -> str:
    """With one decimal."""
    return f"{1e3 * seconds:.1f} ms"


def markdown(rows: Iterable[list[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def tables(asked: Question) -> list[str]:
    """All that is printed without `--check`."""
    return [markdown(rows(asked)) for rows in (efficiency_rows, traffic_rows, network_rows, disturbance_rows)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = Question()
    parser.add_argument("--models", nargs="+", default=usual.models)
    parser.add_argument("--gpus", type=int, nargs="+", default=usual.gpus)
    parser.add_argument("--micro-batch", type=int, default=usual.micro_batch, help="images of a GPU in a forward pass")
    parser.add_argument("--batch-size", type=int, default=usual.batch_size, help="where it doesn't grow with the GPUs")
    parser.add_argument("--image-size", type=int, default=usual.image_size)
    parser.add_argument("--network", type=float, default=50e9, help="bytes/s of a GPU between machines")
    parser.add_argument("--host-hop", type=float, default=30e-6, help="seconds of a message between processes over TCP")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    for gpus in (1, *given.gpus):
        share, rest = divmod(given.batch_size, gpus)
        if share == 0 or rest or share % min(share, given.micro_batch):
            parser.error(f"--batch-size {given.batch_size} doesn't divide into micro-batches on {gpus} GPUs")
    if unknown := [name for name in given.models if not timm.is_model(name)]:
        parser.error(f"timm doesn't know {', '.join(unknown)}")
    cluster = replace(paper.H100, network=given.network, host_hop=given.host_hop)
    asked = Question(given.models, given.gpus, given.micro_batch, given.batch_size, given.image_size, cluster)
    print("\n\n".join([markdown(check_rows())] if given.check else tables(asked)))


if __name__ == "__main__":
    main()
