"""The pictures of the next micro-batches, read in advance by the process that trains, each block once.

Workers get them with the micro-batch: if they read for themselves, each would read every block.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tuning.data.local_order import LocalOrder
from tuning.data.sampling import EvalOrder, Item, TrainOrder
from tuning.data.streamed import Pictures, StreamedRows

MICRO_BATCHES = 8  # that are read in advance
THREADS = 4
LINGER = 2.0  # times what is shuffled: lanes enter new windows while others are still in old ones


def to_train(rows: Any, order: TrainOrder, epoch: int, first_step: int) -> Iterator[list[Item]]:
    """The micro-batches of an epoch from a step on; with the content of their rows if that is streamed."""
    planned = order.micro_batches(epoch, first_step)
    if not isinstance(rows, StreamedRows):
        return planned
    share = order.share if isinstance(order, LocalOrder) else 1.0
    return read_ahead(rows, planned, LINGER * share * rows.shuffle_bytes)


def to_evaluate(rows: Any, order: EvalOrder) -> Iterator[list[Item]]:
    """The same for every image once."""
    planned = order.micro_batches()
    return read_ahead(rows, planned, keep_bytes=0) if isinstance(rows, StreamedRows) else planned


def read_ahead(rows: StreamedRows, planned: Iterable[list[Item]], keep_bytes: float) -> Iterator[list[Item]]:
    """The same micro-batches with the content of every row.

    Args:
        keep_bytes: of blocks that stay in memory after their last use so far; the latest always does.

    Raises:
        UserError: a shard can't be read any more.
    """
    threads = ThreadPoolExecutor(THREADS)
    shelf, waiting = _Shelf(rows, keep_bytes, threads), deque[list[tuple[Item, Future[Pictures], int]]]()
    try:
        for items in planned:
            waiting.append([(item, *shelf.find(item.row)) for item in items])
            if len(waiting) > MICRO_BATCHES:
                yield _filled(rows, waiting.popleft())
        while waiting:
            yield _filled(rows, waiting.popleft())
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _filled(rows: StreamedRows, found: list[tuple[Item, Future[Pictures], int]]) -> list[Item]:
    return [item._replace(content=rows.content(item.row, read.result(), place)) for item, read, place in found]


class _Shelf:
    """Blocks that are read or being read; the one that was used longest ago goes first.

    A block that is gone lives on for the micro-batches that wait for it.
    """

    def __init__(self, rows: StreamedRows, keep_bytes: float, threads: ThreadPoolExecutor) -> None:
        self._rows, self._limit, self._threads = rows, keep_bytes, threads
        self._read: OrderedDict[int, Future[Pictures]] = OrderedDict()
        self._bytes = 0

    def find(self, row: int) -> tuple[Future[Pictures], int]:
        """The block of a row, perhaps still to come, and the row's place in it."""
        block, place = self._rows.locate(row)
        if block not in self._read:
            self._read[block] = self._threads.submit(self._rows.shards.read, block)
            self._bytes += int(self._rows.shards.sizes[block])
        self._read.move_to_end(block)
        while self._bytes > self._limit and len(self._read) > 1:
            gone, _ = self._read.popitem(last=False)
            self._bytes -= int(self._rows.shards.sizes[gone])
        return self._read[block], place
