"""Can this model learn one small batch? A minute that saves hours: most bugs show here.

    accelerate launch recipes/overfit.py --data photos --model convnext_tiny       # flags of the run to come
    accelerate launch recipes/overfit.py --config runs/X/config.yaml --replay runs/X/faults/step-00000123.json

Exit status 0 = PASS, 1 = FAIL. Read from top to bottom.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def overfit(command: Command) -> None:
    """Can this model learn one small batch? PASS (exit status 0), or FAIL (1) and what looks wrong.

    Takes the flags of recipes/finetune.py. Everything that makes a batch harder to learn is off, however its flags
    stand.
    """
    from tuning.tracking.weights_and_biases import import_tracker

    import_tracker(command.flags.run)
    from tuning import session
    from tuning.clipping import clipping
    from tuning.engine import train_steps
    from tuning.entering import enter_stage
    from tuning.errors import UserError
    from tuning.feeds import plain_feed, stage_feeds
    from tuning.losses import cross_entropy
    from tuning.overfit import suspects
    from tuning.overfit.gradients import GradientWatch
    from tuning.overfit.overfitting import (
        OFF,
        Learning,
        choose_stage,
        layer_names,
        look,
        silence,
        small_data,
        small_plan,
        verdict,
        verdict_lines,
    )
    from tuning.preparing import data_and_model
    from tuning.progress import Progress
    from tuning.safety import interrupts
    from tuning.safety.echoes import first_error
    from tuning.safety.heartbeat import beat
    from tuning.safety.interrupts import StopRequested
    from tuning.safety.numerical_faults import NumericalFaults
    from tuning.safety.replay import read_replay
    from tuning.safety.stopping import Boundary
    from tuning.safety.unreadable import UnreadablePictures
    from tuning.tracking import run_folder
    from tuning.tracking.console import Speaker, shown_path
    from tuning.tracking.summary import failure_noted, versions
    from tuning.tracking.track import Curves, check_tracker, described, open_tracker

    flags, run, asked, started = command.flags, command.flags.run, command.flags.overfit, time.time()
    if run.resume != "never":
        raise UserError(f"--resume {run.resume}: an overfit check has nothing to go on with. Leave --resume out.")

    # 1. Session, data and model. Every line below runs on every process.
    accelerator = session.start(run.precision, run.threads, run.timeout)
    speaker, processes = Speaker(accelerator.is_main_process), accelerator.num_processes
    data, model, info = data_and_model(accelerator, flags, command.stages)

    # 2. One small batch, and nothing that makes it harder to learn.
    replay = read_replay(Path(asked.replay), data.train) if asked.replay else None
    data = small_data(data, flags, replay)
    silence(model)
    stage = choose_stage(command.stages, asked.overfit_stage, replay)
    most_steps = min(asked.overfit_steps, run.max_steps or asked.overfit_steps)
    planned = small_plan(stage, model, info, len(data.train), flags.batch.micro_batch, processes, most_steps)
    learning = Learning(asked.overfit_target, most_steps, run.max_skipped)

    # 3. The run folder and the curves.
    check_tracker(run.tracker)
    folder = run_folder.choose(run.output, "never", info.name, f"{data.name}-overfit", session.same_everywhere(started))
    run_folder.refuse_other_run(folder, "never", command.config)
    speaker.say(f"{len(data.train)} pictures of {data.name}, {info.name}: {info.weights}. Off: {OFF}.")
    for note in data.notes:
        speaker.say(f"note: {note}")
    speaker.show_stages([planned])
    if run.dry_run:
        speaker.say("Dry run: nothing was trained.")
        return
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run_folder.lock(folder)
        folder.create(command.config)
    progress, main = Progress(), accelerator.is_main_process
    tracker = open_tracker(accelerator, run, folder, described(command, accelerator), progress)
    faults = NumericalFaults(sys.maxsize, folder.path / "faults", data.train, main)  # counts; `learning` gives up
    curves = Curves(accelerator, folder, tracker, run.log_every, faults, 0)
    boundary = Boundary(accelerator, folder.path, started, run.stop_after)
    unreadable = UnreadablePictures(accelerator, folder.path, data, 1.0, resumed=False)

    accelerator.wait_for_everyone()
    interrupts.hold()
    with speaker, failure_noted(folder, main), first_error():
        # 4. What can be seen before training.
        entered = enter_stage(accelerator, model, planned)
        workers = session.loader_workers(accelerator, flags.batch.workers)
        pictures = plain_feed(accelerator, data.train, planned, info, workers, unreadable.train)
        seen = look(accelerator, entered, pictures, data.train)
        unreadable.check()
        found = suspects.of_head(model)
        found += suspects.of_pictures(
            seen.pictures, unreadable.news(), seen.outputs, learning.target, chosen=replay is not None
        )
        found += suspects.of_outputs(seen.trainable)

        # 5. The one engine, on this batch, until it is learned or given up.
        if not any(suspect.decisive for suspect in found):
            loss = cross_entropy()
            clip = clipping(flags.optimisation.clip_norm, flags.optimisation.clip_value, flags.optimisation.clip_agc)
            watch = GradientWatch(clip)
            feeds = stage_feeds(accelerator, entered, planned, data, info, unreadable, run.seed, "none", workers)
            curves.begin_stage(planned.stage.name, progress)
            for step in train_steps(accelerator, entered, feeds.train, loss, watch, progress, run.seed):
                beat(step.step)
                curves.add(step, progress)
                learning.add(step)
                speaker.show_progress("overfit", step.step, most_steps, curves.latest)
                if reason := boundary.agree().stop:
                    raise StopRequested(f"{reason}, after step {step.step}")
                if learning.over:
                    break
                if processes > 1 and step.step == 1 and None in watch.largest(model).values():
                    break  # DDP would refuse the next forward pass
            curves.flush(progress)
            found += suspects.of_gradients(watch.largest(model), layer_names(entered), learning.steps)
            found += suspects.of_first_loss(learning.first, seen.outputs)
            if not learning.learned:
                found += suspects.of_losses(learning.losses, learning.target, stage.lr, learning.stuck)

    # 6. The verdict.
    seconds = round(time.time() - started, 1)
    facts = {
        "seconds": seconds,
        "train_images": len(data.train),
        "stage": stage.name,
        "world_size": processes,
        "precision": session.precision_name(accelerator),
        "unreadable": unreadable.counts,
        "versions": versions(),
        "git_commit": run_folder.git_commit(),
    }
    result = verdict(learning, found, facts)
    if main:
        curves.close()
        folder.write_summary(result)
        curves.finish(result, folder.plots)
    for line in (*verdict_lines(result), f"  curves   {shown_path(folder.metrics)}"):
        speaker.say(line)
    accelerator.end_training()
    if result["verdict"] == "FAIL":
        raise SystemExit(1)


if __name__ == "__main__":
    run_recipe(overfit, "recipes/overfit.py", presets=Path(__file__).parent / "presets")
