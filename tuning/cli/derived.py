"""What follows from the data where no flag says it. Imports no torch."""

from __future__ import annotations

from tuning.cli.command_line import Command, with_flags

FEWEST_STEPS = 4  # optimizer steps an epoch of few images


def with_fitting_batch(command: Command, images: int, processes: int) -> tuple[Command, str]:
    """*command* with a batch that *images* training images fill, and a sentence if that is another one.

    The largest power of two per process that leaves `FEWEST_STEPS` optimizer steps an epoch. A ``--batch-size`` that
    was typed, and those of a list of stages, stay for the plan to refuse.
    """
    asked = command.flags.batch.batch_size
    if images >= asked or "batch_size" in command.typed:
        return command, ""
    share = max(1, images // (FEWEST_STEPS * processes))
    fitting = processes * 2 ** (share.bit_length() - 1)
    reason = f"--batch-size {fitting}: {images} training images don't fill a batch of {asked}."
    return with_flags(command, {"batch_size": fitting}, command.listed, "the data"), reason
