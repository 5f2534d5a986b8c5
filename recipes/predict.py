"""Predict the classes of pictures: files, folders and globs in, a table out, written as it comes.

    accelerate launch recipes/predict.py --run runs/photos --images new_photos --output new_photos.csv
    accelerate launch recipes/predict.py --run runs/photos --images 'a/**/*.jpg' b.png --top-k 3 --output out.parquet

Read from top to bottom.
"""

from __future__ import annotations

import time
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def predict(command: Command) -> None:
    """Predict the classes of pictures with a run, one of its checkpoints or any timm model; .csv, .jsonl, .parquet."""
    # The flags are known to be right by now; only here torch is imported.
    from contextlib import nullcontext

    from tuning import session
    from tuning.cli.outputs import refuse_used_file
    from tuning.data.broken import Broken, Unreadable
    from tuning.data.tables import picture_dataset
    from tuning.feeds import judging_feed
    from tuning.judging.finished import open_finished, open_named
    from tuning.judging.picture_files import picture_files
    from tuning.judging.predicting import judging_batch, stream
    from tuning.judging.prediction_files import KINDS, PredictionFile, columns
    from tuning.judging.top_classes import records, refuse_too_many, top_classes
    from tuning.safety.unreadable import shown
    from tuning.tracking.console import Speaker

    flags, run, asked = command.flags, command.flags.run, command.flags.predict
    name, size, crop = flags.opened.run, flags.model.image_size, flags.model.crop_pct
    output = Path(run.output or "predictions.csv")

    # 1. Session, pictures and model. Every line runs on every process.
    refuse_used_file(output, KINDS)
    accelerator = session.start(run.precision, run.threads, run.timeout)
    speaker = Speaker(accelerator.is_main_process)
    paths, notes = session.same_everywhere(picture_files(asked.images))
    opened = (
        open_finished(name, size, crop)
        if name
        else open_named(flags.model.model, flags.model.weights, None, size, crop)
    )
    refuse_too_many(asked.top_k, len(opened.classes))
    info, model = opened.info, opened.model.to(accelerator.device)
    speaker.say(
        f"model    {info.architecture}, {info.input_size} pixels, {len(opened.classes)} classes; {info.weights}"
    )
    stored = (
        f"after the stored temperature {opened.temperature:.3f}" if opened.temperature != 1 else "as the model has them"
    )
    speaker.say(f"images   {len(paths):,}; probabilities {stored}")
    for note in notes:
        speaker.say(f"note: {note}")

    # 2. Piece by piece, in the order of the inputs: nothing grows with the number of pictures but the list of names.
    rows = picture_dataset(paths, [0] * len(paths), opened.classes)
    workers = session.loader_workers(accelerator, flags.batch.workers)
    batch = judging_batch(flags.batch.micro_batch, accelerator.device)
    feed = judging_feed(accelerator, rows, info.input_size, info, workers, Unreadable(), batch)
    forward = top_classes(model, asked.top_k, opened.temperature)
    unreadable: list[Broken] = []
    done, started = 0, time.time()
    writes = accelerator.is_main_process
    with speaker, PredictionFile(output, columns(asked.top_k)) if writes else nullcontext() as file:
        for piece in stream(accelerator, forward, feed):
            made = list(records(piece.logits, piece.rows, piece.unreadable, paths, opened.classes))
            if file is not None:
                file.write(made)
            unreadable += piece.unreadable
            done += len(made)
            speaker.show_progress("pictures", done, len(paths), {})

    # 3. What was written, and what could not be read.
    if unreadable:
        speaker.say(f"warning: could not be read: {len(unreadable):,}{shown(map(str, unreadable))}")
    seconds = time.time() - started
    speaker.say(f"{done:,} pictures, {done / seconds:.0f} images/s. See {output}.")
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(predict, "recipes/predict.py", presets=Path(__file__).parent / "presets")
