"""Fine-tune a timm backbone in stages, on one process or many.

    accelerate launch recipes/finetune.py                                          # the demo
    accelerate launch recipes/finetune.py --data photos --model convnext_tiny      # the main job

Read from top to bottom: this file is the trainer.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def finetune(command: Command) -> None:
    """Fine-tune any timm backbone in stages. Without flags: the demo, on photos of solar cells."""
    # The flags are known to be right by now; only here torch is imported.
    from functools import partial

    from tuning.tracking.weights_and_biases import import_tracker

    import_tracker(command.flags.run)
    from tuning import session
    from tuning.analysis.charts import charts
    from tuning.analysis.finishing import write_report
    from tuning.analysis.last_look import look_back
    from tuning.averaging.averages import Averages
    from tuning.averaging.norm_statistics import NormStatistics
    from tuning.averaging.snapshots import Snapshots, tell
    from tuning.budget import within_minutes
    from tuning.caching import with_cache
    from tuning.engine import train_steps
    from tuning.entering import Entered, enter_stage
    from tuning.feeds import StageFeeds, some_evaluation, stage_feeds
    from tuning.frozen_choice import settle_forward
    from tuning.judging.evaluation import evaluate, judges
    from tuning.lr_search.auto import as_found, must_search
    from tuning.lr_search.finder import find, search_for
    from tuning.lr_search.report import draw
    from tuning.lr_search.trials import Trials, judge_trial
    from tuning.models.build import keep_best
    from tuning.models.head_fit import fit_head
    from tuning.models.model_card import card_of_run
    from tuning.patience import count, curves_of, next_stage
    from tuning.plan import StagePlan, last_step
    from tuning.preparing import objective, prepare
    from tuning.rollback import rolled_back
    from tuning.safety import checkpoint, interrupts, resuming
    from tuning.safety.agreement import refuse_drift
    from tuning.safety.echoes import first_error
    from tuning.safety.heartbeat import beat
    from tuning.safety.numerical_faults import NumericalFaults
    from tuning.safety.saving import Saver, tensors_of
    from tuning.safety.stopping import Boundary, end_run
    from tuning.safety.unreadable import UnreadablePictures
    from tuning.sharding import shard
    from tuning.tracking import plots
    from tuning.tracking.augmentation import draw_batch
    from tuning.tracking.console import Speaker
    from tuning.tracking.hardware import hardware
    from tuning.tracking.summary import (
        add_judged,
        best_value,
        better,
        contenders,
        failure_noted,
        make_summary,
        nothing_left,
    )
    from tuning.tracking.track import Curves, check_tracker, described, open_tracker, tracker_id

    flags, run, started = command.flags, command.flags.run, time.time()

    # 1. Session: device, processes, precision. Every line below runs on every process.
    accelerator = session.start(run.precision, run.threads, run.timeout, shards=True)
    speaker = Speaker(accelerator.is_main_process)

    # 2. Data, model and plan, with what follows from the data, and from --max-minutes.
    command, data, model, info, plan = within_minutes(accelerator, prepare(accelerator, command))
    flags = command.flags

    # 3. What will happen, before anything is spent.
    data = with_cache(accelerator, flags, data, plan, info, dry=run.dry_run)
    check_tracker(run.tracker)
    start = resuming.locate(run, command.config, info.name, data.name, started)
    folder = start.folder
    snapshots = Snapshots(accelerator, folder.path, plan, flags.averages.snapshots)
    speaker.show_plan(plan, data, info, accelerator, folder, best_by=run.best_by)
    if run.dry_run:
        if accelerator.is_main_process:
            plots.draw_schedule(plan, folder.plots / "schedule.png")
        speaker.say(f"Dry run: nothing was trained. See {folder.plots}/schedule.png for the learning rates.")
        return

    # 4. Where we are: at the start, or where an earlier run stopped.
    progress, found = start.progress, start.found
    planned_steps = sum(planned.steps for planned in plan)
    earlier_seconds, ends_at = progress.seconds, last_step(plan, progress, run.max_steps)
    if nothing_left(folder, progress.step, ends_at):
        speaker.say(f"Nothing left to do: the run in {folder.path} has made its {progress.step:,} steps.")
        return
    resuming.take_up(accelerator, start, command.config, data)

    with speaker, failure_noted(folder, accelerator.is_main_process):
        unreadable = UnreadablePictures(accelerator, folder.path, data, run.max_unreadable, resumed=found is not None)
        speaker.say_resumed(start, accelerator.num_processes)
        if accelerator.is_main_process:
            plots.draw_schedule([as_found(planned, progress) for planned in plan], folder.plots / "schedule.png")

        # 5. Tracking: metrics.jsonl always, W&B or TensorBoard beside it.
        shown = described(command, accelerator)
        tracker = open_tracker(accelerator, run, folder, shown, progress)
        progress.tracker_id = tracker_id(accelerator, tracker)
        faults = NumericalFaults(run.max_skipped, folder.path / "faults", data.train, accelerator.is_main_process)
        curves = Curves(accelerator, folder, tracker, run.log_every, faults, progress.step)

        # 6. Training: one `for` over stages, one over optimizer steps.
        classes, regularisation = len(data.classes), flags.regularisation
        loss, clip, class_weights = objective(accelerator, flags, data)
        workers = session.loader_workers(accelerator, flags.batch.workers)
        averages = Averages(model, plan, regularisation.ema_decay)
        shard(accelerator, model, *averages.all.values())
        best_of = contenders(run.best_of, regularisation.ema_decay, flags.averages.swa_epochs)
        anew = NormStatistics(accelerator, data, info, workers, run.seed, flags.staging.batch_norm_images)
        saver = Saver(accelerator, folder.path, run.keep, start.facts, stop_on_error=run.save_errors == "stop")
        boundary = Boundary(accelerator, folder.path, started, run.stop_after, run.save_every, saver.must_stop)

        def judge(entered: Entered, feeds: StageFeeds, planned: StagePlan, stage: str) -> None:
            """Evaluate, and keep the weights if they are the best so far."""
            curves.flush(progress)
            judged, size, main = {}, planned.eval_size, accelerator.is_main_process
            for whose, weighed, part in judges(accelerator, entered, feeds.judged, averages.at(progress), anew, size):
                pictures = boundary.watch(feeds.evaluation)
                judged[whose] = evaluate(accelerator, part, pictures, len(data.eval), classes)
                unreadable.check()
                reached = judged[whose][run.best_by]
                if whose in best_of and better(reached, progress.best, run.best_by):
                    at_size, weights = replace(info, input_size=size), tensors_of(weighed, keep=main)
                    kept = not main or keep_best(weighed, at_size, data.classes, folder.model, weights)
                    if session.same_everywhere(kept):  # a full disk on rank 0 leaves the best of all ranks as it was
                        progress.best, progress.best_step = reached, progress.step
            ends_epoch, progress.due = progress.due, False
            epoch = progress.epoch + progress.stage_step % planned.steps_per_epoch / planned.steps_per_epoch
            if ends_epoch:
                reached = session.same_everywhere(best_value(judged, best_of, run.best_by))
                count(progress, planned.stage, reached, run.best_by, planned.steps_per_epoch)
            curves.write_evaluation(judged, epoch, progress, curves_of(progress, planned.stage))
            speaker.say_evaluation(stage, epoch, judged, curves.latest)

        def find_lr(entered: Entered, feeds: StageFeeds, planned: StagePlan) -> None:
            """Search for the learning rate of a stage; only `progress` and the curves keep a trace."""
            search = search_for(planned, flags.finder, planned_steps)
            watched = partial(boundary.watch, during="the search for a learning rate")
            some = some_evaluation(accelerator, feeds, planned, data, info, run.seed, workers)
            how = class_weights, classes, run.best_by, watched
            judged = partial(judge_trial, accelerator, entered, feeds.judged, some, *how)
            trials = Trials(accelerator, entered, feeds.train, loss, clip, run.seed, judged, watched, at=progress)
            answer = find(trials, search, curves.writer_at(progress))
            progress.searched, progress.lr = progress.stage, answer.lr
            speaker.say_found(planned, answer, planned_steps)
            if accelerator.is_main_process:
                draw(answer, folder.plots / "lr_finder.png")
                plots.draw_schedule([as_found(p, progress) for p in plan], folder.plots / "schedule.png")

        def save(entered: Entered) -> None:
            """Begin to write a checkpoint from which the run can go on; a thread finishes it."""
            curves.flush(progress)
            progress.seconds = earlier_seconds + time.time() - started
            saver.save(entered, progress, averages.at(progress), first=curves.sync)
            boundary.saved()

        judge_first = found is not None and (progress.due or progress.step == ends_at)
        entered = None
        accelerator.wait_for_everyone()
        interrupts.hold()  # from here on there is something to lose: a signal waits for the next boundary
        with saver, first_error():
            while progress.stage < len(plan) and (progress.step < ends_at or judge_first):
                settle_forward(accelerator, model, plan[progress.stage], data, info, flags, progress, speaker.say)
                planned = as_found(plan[progress.stage], progress)
                entered = enter_stage(accelerator, model, planned, before=entered)
                if found:
                    checkpoint.load(accelerator, found, entered, averages.at(progress))
                    found = None
                feeds = stage_feeds(
                    accelerator, entered, planned, data, info, unreadable, run.seed, regularisation.flip, workers
                )
                if accelerator.is_main_process:
                    draw_batch(feeds.train, progress, data.classes, folder.plots)
                if progress.step == 0 and flags.model.head_init == "fitted":
                    fit_head(accelerator, model, *feeds.plain, class_weights, classes, run.seed)
                    averages.begin(model)
                    judge(entered, feeds, planned, "fitted head")
                if judge_first:
                    judge(entered, feeds, planned, planned.stage.name)
                    judge_first = False
                if must_search(plan, progress, flags.finder.finder_at):
                    find_lr(entered, feeds, plan[progress.stage])
                    planned = as_found(plan[progress.stage], progress)
                    entered = enter_stage(accelerator, model, planned, before=entered)
                curves.begin_stage(planned.stage.name, progress)

                left = progress.step < ends_at  # else an evaluation alone was: the run ended within a stage
                steps = train_steps(accelerator, entered, feeds.train, loss, clip, progress, run.seed)
                for step in steps if left else ():
                    beat(step.step)
                    averages.update(model, progress)
                    curves.add(step, progress)
                    if step.step % run.log_every == 0:
                        unreadable.check()
                    speaker.show_progress(planned.stage.name, step.step, ends_at, curves.latest)
                    asked, ends_run = boundary.agree(step.step), step.step == ends_at
                    snapshots.take(entered, progress, planned.eval_size, info, data.classes, anew)
                    progress.due = step.ends_stage or (step.ends_epoch and not planned.stage.judged_once)
                    if progress.due or ends_run or asked.stop or asked.save:
                        save(entered)  # before the evaluation, so that nothing is lost while that runs
                    if asked.stop:
                        end_run(accelerator, saver, asked.stop, step.step)
                    if progress.due or ends_run:
                        judge(entered, feeds, planned, planned.stage.name)
                    if ends_run:
                        break

                refuse_drift(accelerator, model)
                speaker.say_unreadable(unreadable.news())
                speaker.say_stage_over(planned, progress, run.best_by)
                if flags.staging.rollback and progress.stage + 1 < len(plan):
                    entered = rolled_back(accelerator, entered, averages, folder.model, progress, speaker.say)
                next_stage(progress)
                ends_at = last_step(plan, progress, run.max_steps)

        # 7. Finish: snapshots, summary, pictures, a last look at the mistakes, what to look at next.
        together = snapshots.judge(model, info, data, progress, workers, anew, boundary.watch)
        if accelerator.is_main_process:
            if together:
                speaker.say(tell(together, curves, progress, folder.plots, run.best_by))
            curves.close()
            seen = {
                "seconds": round(earlier_seconds + time.time() - started, 1),
                "images_per_second": curves.images_per_second,
                "world_size": accelerator.num_processes,
                "hardware": hardware(accelerator.device),
                "precision": session.precision_name(accelerator),
                "frozen_forward": progress.frozen_forward,
                "train_images": len(data.train),
                "eval_images": len(data.eval),
                "ended_early_at": progress.step if progress.step < min(planned_steps, run.max_steps or 2**63) else None,
                "skipped_steps": progress.skipped,
                "unreadable": unreadable.counts,
                **({"snapshots": together} if together else {}),
            }
            summary = make_summary(folder, best_of, run.best_by, seen)
            folder.write_summary(summary)
            plots.draw_curves(folder.metrics, folder.plots / "curves.png")
        look = look_back(accelerator, model, info, folder, data, workers, boundary.watch)
        if accelerator.is_main_process:
            summary = add_judged(folder, summary, look.judged)
            card_of_run(info, data.classes, folder)
            trained = [as_found(planned, progress) for planned in plan]
            write_report(accelerator, command, folder, data, trained, info, summary, look)
            curves.finish(summary, folder.plots, charts(look.overview))
            speaker.say_finished(summary, folder, run.tracker)
        accelerator.end_training()
        boundary.close()


if __name__ == "__main__":
    run_recipe(finetune, "recipes/finetune.py", presets=Path(__file__).parent / "presets")
