"""Fine-tune a timm backbone in stages, on one process or many.

    accelerate launch recipes/finetune.py                                          # the demo
    accelerate launch recipes/finetune.py --data photos --model convnext_tiny      # the main job

Read from top to bottom: this file is the trainer.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tuning.command_line import Command, run_recipe


def finetune(command: Command) -> None:
    """Fine-tune any timm backbone in stages. Without flags: the demo, on photos of solar cells."""
    # The flags are known to be right by now; only here torch is imported.
    from functools import partial

    from timm.utils import ModelEmaV3

    from tuning import checkpoint, interrupts, plots, resuming, session
    from tuning.agreement import refuse_drift
    from tuning.analysis.charts import charts
    from tuning.analysis.finishing import write_report
    from tuning.analysis.last_look import look_back
    from tuning.console import Speaker
    from tuning.echoes import first_error
    from tuning.engine import train_steps
    from tuning.entering import enter_stage
    from tuning.evaluation import evaluate, judges
    from tuning.feeds import StageFeeds, plain_feed, some_evaluation, stage_feeds
    from tuning.hardware import hardware
    from tuning.head_fit import fit_head
    from tuning.heartbeat import beat
    from tuning.lr_auto import as_found, must_search
    from tuning.lr_finder import find, search_for
    from tuning.lr_report import draw
    from tuning.lr_trials import Trials, judge_trial
    from tuning.model_card import card_of_run
    from tuning.models import keep_best
    from tuning.numerical_faults import NumericalFaults
    from tuning.patience import count, curves_of, next_stage
    from tuning.plan import StagePlan, last_step
    from tuning.preparing import data_and_model, objective, plan_stages
    from tuning.saving import Saver, tensors_of
    from tuning.sharding import asked, shard
    from tuning.stopping import Boundary, end_run
    from tuning.summary import add_judged, better, failure_noted, make_summary, nothing_left
    from tuning.track import Curves, check_tracker, described, open_tracker, tracker_id
    from tuning.unreadable import UnreadablePictures

    flags, run, started = command.flags, command.flags.run, time.time()

    # 1. Session: device, processes, precision. Every line below runs on every process.
    accelerator = session.start(run.precision, run.threads, run.timeout, shards=True)
    speaker = Speaker(accelerator.is_main_process)

    # 2. Data and model.
    data, model, info = data_and_model(accelerator, flags)

    # 3. The plan, before anything is spent.
    plan = plan_stages(accelerator, command, data, model, info)
    check_tracker(run.tracker)
    start = resuming.locate(accelerator, run, command.config, info.name, data.name, started)
    folder = start.folder
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
        decay = regularisation.ema_decay
        ema = ModelEmaV3(model, decay, use_warmup=True, foreach=not asked()) if decay else None
        averaged = ema.module if ema else None
        shard(accelerator, model, averaged)
        best_of, best_model = ("eval_ema", averaged) if averaged and run.best_of != "raw" else ("eval", model)
        saver = Saver(accelerator, folder.path, run.keep, start.facts, stop_on_error=run.save_errors == "stop")
        boundary = Boundary(accelerator, folder.path, started, run.stop_after, run.save_every, saver.must_stop)

        def judge(feeds: StageFeeds, planned: StagePlan, stage: str) -> None:
            """Evaluate, and keep the weights if they are the best so far."""
            curves.flush(progress)
            judged = {}
            for whose, judge_this, statistics in judges(entered, feeds.judged, averaged):
                pictures = boundary.watch(feeds.evaluation)
                judged[whose] = evaluate(accelerator, judge_this, pictures, len(data.eval), classes, statistics)
            ends_epoch, progress.due = progress.due, False
            epoch = progress.epoch + progress.stage_step % planned.steps_per_epoch / planned.steps_per_epoch
            reached = session.same_everywhere(judged[best_of][run.best_by])
            if ends_epoch:
                count(progress, planned.stage, reached, run.best_by, planned.steps_per_epoch)
            curves.write_evaluation(judged, epoch, progress, curves_of(progress, planned.stage))
            speaker.say_evaluation(stage, epoch, judged, curves.latest)
            unreadable.check()
            if better(reached, progress.best, run.best_by):
                at_size, main = replace(info, input_size=planned.image_size), accelerator.is_main_process
                weights = tensors_of(best_model, keep=main)
                if not main or keep_best(best_model, at_size, data.classes, folder.model, weights):
                    progress.best, progress.best_step = reached, progress.step

        def find_lr(feeds: StageFeeds, planned: StagePlan) -> None:
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

        def save() -> None:
            """Begin to write a checkpoint from which the run can go on; a thread finishes it."""
            curves.flush(progress)
            progress.seconds = earlier_seconds + time.time() - started
            saver.save(entered, progress, averaged, first=curves.sync)
            boundary.saved()

        judge_first = found is not None and (progress.due or progress.step == ends_at)
        entered = None
        accelerator.wait_for_everyone()
        interrupts.hold()  # from here on there is something to lose: a signal waits for the next boundary
        with saver, first_error():
            while progress.stage < len(plan) and (progress.step < ends_at or judge_first):
                planned = as_found(plan[progress.stage], progress)
                entered = enter_stage(accelerator, model, planned, before=entered)
                if found:
                    checkpoint.load(accelerator, found, entered, averaged)
                    found = None
                feeds = stage_feeds(
                    accelerator, entered, planned, data, info, unreadable, run.seed, regularisation.flip, workers
                )
                if progress.step == 0 and flags.model.head_init == "fitted":
                    pictures = plain_feed(accelerator, data.train, planned, info, workers, unreadable.train)
                    fit_head(accelerator, model, pictures, class_weights, classes, run.seed)
                    if ema:
                        ema.set(model)
                    judge(feeds, planned, "fitted head")
                if judge_first:
                    judge(feeds, planned, planned.stage.name)
                    judge_first = False
                if must_search(plan, progress, flags.finder.finder_at):
                    find_lr(feeds, plan[progress.stage])
                    planned = as_found(plan[progress.stage], progress)
                    entered = enter_stage(accelerator, model, planned, before=entered)
                curves.begin_stage(planned.stage.name, progress)

                for step in train_steps(accelerator, entered, feeds.train, loss, clip, progress, run.seed):
                    beat(step.step)
                    if ema:
                        ema.update(model, step.step)
                    curves.add(step, progress)
                    if step.step % run.log_every == 0:
                        unreadable.check()
                    speaker.show_progress(planned.stage.name, step.step, ends_at, curves.latest)
                    asked, ends_run = boundary.agree(step.step), step.step == ends_at
                    progress.due = step.ends_stage or (step.ends_epoch and not planned.stage.cache_features)
                    if progress.due or ends_run or asked.stop or asked.save:
                        save()  # before the evaluation, so that nothing is lost while that runs
                    if asked.stop:
                        end_run(accelerator, saver, asked.stop, step.step)
                    if progress.due or ends_run:
                        judge(feeds, planned, planned.stage.name)
                    if ends_run:
                        break

                refuse_drift(accelerator, model)
                speaker.say_unreadable(unreadable.news())
                speaker.say_stage_over(planned, progress, run.best_by)
                next_stage(progress)
                ends_at = last_step(plan, progress, run.max_steps)

        # 7. Finish: summary, pictures, a last look at the mistakes, what to look at next.
        if accelerator.is_main_process:
            curves.close()
            seen = {
                "seconds": round(earlier_seconds + time.time() - started, 1),
                "images_per_second": curves.images_per_second,
                "world_size": accelerator.num_processes,
                "hardware": hardware(accelerator.device),
                "precision": session.precision_name(accelerator),
                "train_images": len(data.train),
                "eval_images": len(data.eval),
                "ended_early_at": progress.step if progress.step < min(planned_steps, run.max_steps or 2**63) else None,
                "skipped_steps": progress.skipped,
                "unreadable": unreadable.counts,
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
