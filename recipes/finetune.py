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
    from tuning import checkpoint, plots, run_folder, session
    from tuning.agreement import refuse_drift
    from tuning.clipping import clipping
    from tuning.console import Speaker
    from tuning.data.sources import open_data
    from tuning.data.tables import label_array
    from tuning.engine import train_steps
    from tuning.entering import enter_stage
    from tuning.evaluation import evaluate
    from tuning.feeds import StageFeeds, plain_feed, stage_feeds
    from tuning.head_fit import fit_head, linear_classifier
    from tuning.losses import balanced_weights, cross_entropy
    from tuning.models import build, check_image_size, save_timm_folder
    from tuning.plan import StagePlan, make_plan
    from tuning.progress import Progress
    from tuning.summary import better, failure_noted, make_summary
    from tuning.track import Curves, check_tracker, described, open_tracker, tracker_id

    flags, run, started = command.flags, command.flags.run, time.time()

    # 1. Session: device, processes, precision. Every line below runs on every process.
    accelerator = session.start(run.precision, run.threads)
    speaker = Speaker(accelerator.is_main_process)

    # 2. Data and model.
    with accelerator.local_main_process_first():  # the others find its cache
        data = open_data(**vars(flags.data), seed=run.seed)
    model, info = build(
        flags.model.model,
        classes=data.classes,
        weights=flags.model.weights,
        head_init="default" if flags.model.head_init == "fitted" else flags.model.head_init,
        init=flags.model.init,
        drop_rate=flags.model.drop_rate,
        drop_path_rate=flags.model.drop_path_rate,
        image_size=flags.model.image_size,
        crop_pct=flags.model.crop_pct,
        seed=run.seed,
    )
    model.to(accelerator.device)

    # 3. The plan, before anything is spent.
    plan = make_plan(
        command.stages,
        model,
        train_images=len(data.train),
        world_size=accelerator.num_processes,
        micro_batch=flags.batch.micro_batch,
        image_size=info.input_size,
    )
    for planned in plan:
        check_image_size(model, info.name, planned.image_size)
    if flags.model.head_init == "fitted":
        linear_classifier(model)
    check_tracker(run.tracker)
    folder = run_folder.choose(run.output, run.resume, info.name, data.name, session.same_everywhere(started))
    run_folder.refuse_other_run(folder, run.resume, command.config)
    found = checkpoint.find(folder.path, run.resume)
    speaker.show_plan(plan, data, info, accelerator, folder, best_by=run.best_by)
    if run.dry_run:
        if accelerator.is_main_process:
            plots.draw_schedule(plan, folder.plots / "schedule.png")
        speaker.say(f"Dry run: nothing was trained. See {folder.plots}/schedule.png for the learning rates.")
        return

    # 4. Where we are: at the start, or where an earlier run stopped.
    progress = found.progress if found else Progress()
    earlier_seconds, last_step = progress.seconds, min(sum(p.steps for p in plan), run.max_steps or 2**63)
    if progress.step >= last_step and folder.summary.exists():
        speaker.say(f"Nothing left to do: the run in {folder.path} has made its {progress.step:,} steps.")
        return
    accelerator.wait_for_everyone()  # all have looked at the folder before rank 0 writes into it
    if accelerator.is_main_process:
        folder.create(command.config)
        run_folder.forget_lines_after(folder.metrics, progress.step)
        checkpoint.forget_after(folder.path, progress.step)
        plots.draw_schedule(plan, folder.plots / "schedule.png")
    if found:
        speaker.say_resumed(found, accelerator.num_processes)

    # 5. Tracking: metrics.jsonl always, W&B or TensorBoard beside it.
    shown = described(command, accelerator)
    tracker = open_tracker(accelerator, run.tracker, folder, run.project, run.run_name, shown, progress.tracker_id)
    progress.tracker_id = tracker_id(accelerator, tracker)
    curves = Curves(accelerator, folder, tracker, run.log_every)

    # 6. Training: one `for` over stages, one over optimizer steps.
    classes, regularisation = len(data.classes), flags.regularisation
    balanced = regularisation.class_weights == "balanced"
    class_weights = balanced_weights(label_array(data.train), classes).to(accelerator.device) if balanced else None
    loss = cross_entropy(regularisation.label_smoothing, class_weights)
    clip = clipping(flags.optimisation.clip_norm, flags.optimisation.clip_value, flags.optimisation.clip_agc)
    workers = session.loader_workers(accelerator, flags.batch.workers)

    def judge(feeds: StageFeeds, planned: StagePlan, stage: str, epoch: float) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        curves.flush(progress)
        metrics = evaluate(accelerator, feeds.judged, feeds.evaluation, len(data.eval), classes)
        curves.write_evaluation(metrics, epoch, progress)
        speaker.say_evaluation(stage, epoch, metrics, curves.latest)
        if better(metrics[run.best_by], progress.best, run.best_by):
            progress.best = metrics[run.best_by]
            if accelerator.is_main_process:
                save_timm_folder(model, replace(info, input_size=planned.image_size), data.classes, folder.model)

    def save() -> None:
        """Write a checkpoint from which the run can go on."""
        curves.flush(progress)
        progress.seconds = earlier_seconds + time.time() - started
        checkpoint.save(accelerator, folder.path, entered, progress, run.keep)

    entered = None
    with speaker, failure_noted(folder, accelerator.is_main_process):
        while progress.step < last_step:
            planned = plan[progress.stage]
            entered = enter_stage(accelerator, model, planned, before=entered)
            if found:
                checkpoint.load(accelerator, found, entered)
                found = None
            feeds = stage_feeds(
                accelerator, entered, planned, data, info, seed=run.seed, flip=regularisation.flip, workers=workers
            )
            if progress.step == 0 and flags.model.head_init == "fitted":
                pictures = plain_feed(accelerator, data.train, planned, info, workers)
                fit_head(accelerator, model, pictures, class_weights, classes, run.seed)
                judge(feeds, planned, "fitted head", epoch=0)
            curves.begin_stage(planned.stage.name, progress)

            for step in train_steps(accelerator, entered, feeds.train, loss, clip, progress, run.seed):
                curves.add(step, progress)
                speaker.show_progress(planned.stage.name, step.step, last_step, curves.latest)
                ends_run = step.step == last_step
                if step.ends_stage or ends_run or (step.ends_epoch and not planned.stage.cache_features):
                    judge(feeds, planned, planned.stage.name, step.epoch)
                    save()
                elif run.save_every and step.step % run.save_every == 0:
                    save()
                if ends_run:
                    break

            refuse_drift(accelerator, model)
            speaker.say_unreadable(feeds.unreadable())
            progress.stage, progress.stage_step = progress.stage + 1, 0

    # 7. Finish: summary, pictures, what to look at next.
    if accelerator.is_main_process:
        plots.draw_curves(folder.metrics, folder.plots / "curves.png")
        facts = {
            "seconds": round(earlier_seconds + time.time() - started, 1),
            "images_per_second": curves.images_per_second,
            "world_size": accelerator.num_processes,
            "precision": session.precision_name(accelerator),
            "train_images": len(data.train),
            "eval_images": len(data.eval),
            "skipped_steps": progress.skipped,
        }
        summary = make_summary(folder, run.best_by, facts)
        folder.write_summary(summary)
        curves.finish(summary, folder.plots)
        speaker.say_finished(summary, folder, run.tracker)
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(finetune, "recipes/finetune.py", presets=Path(__file__).parent / "presets")
