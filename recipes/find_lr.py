"""Find a learning rate before the hours are spent: the range test of Smith (2017) on the engine of the real run.

    accelerate launch recipes/find_lr.py --data photos --model convnext_tiny

Takes the flags of finetune.py. Nothing is trained: every sweep puts the model back as it was.
"""

from __future__ import annotations

import time
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def find_lr(command: Command) -> None:
    """Sweep the learning rate over a few hundred optimizer steps and say which one to train with, if one is clear."""
    # The flags are known to be right by now; only here torch is imported.
    from collections.abc import Iterable, Iterator, Mapping
    from functools import partial

    from tuning.tracking.weights_and_biases import import_tracker

    import_tracker(command.flags.run)
    from tuning import session
    from tuning.caching import with_cache
    from tuning.engine import Step
    from tuning.entering import enter_stage
    from tuning.errors import UserError
    from tuning.feeds import some_evaluation, stage_feeds
    from tuning.lr_search.finder import chosen_stage, find, search_for
    from tuning.lr_search.report import draw, facts, race_table, table
    from tuning.lr_search.trials import Trials, judge_trial
    from tuning.models.head_fit import fit_head
    from tuning.preparing import objective, prepare
    from tuning.progress import Progress
    from tuning.safety import resuming
    from tuning.safety.numerical_faults import NumericalFaults
    from tuning.safety.unreadable import UnreadablePictures
    from tuning.sharding import shard
    from tuning.tracking.console import Speaker
    from tuning.tracking.run_folder import git_commit
    from tuning.tracking.summary import failure_noted, versions
    from tuning.tracking.track import Curves, check_tracker, described, open_tracker

    flags, run, finder, started = command.flags, command.flags.run, command.flags.finder, time.time()
    if run.resume != "never":
        raise UserError(f"--resume {run.resume}: an LR finder has nothing to go on with. Leave --resume out.")

    # 1. Session, data, model, and the plan of the run that the learning rate is for.
    accelerator = session.start(run.precision, run.threads, run.timeout, shards=True)
    speaker = Speaker(accelerator.is_main_process)
    command, data, model, info, plan = prepare(accelerator, command, fits_head=False)  # a search would see little
    flags = command.flags
    data = with_cache(accelerator, flags, data, plan, info, dry=run.dry_run)
    number = chosen_stage(plan, finder.stage)
    planned = plan[number]
    search = search_for(planned, finder)
    check_tracker(run.tracker)
    start = resuming.locate(run, command.config, f"find_lr-{info.name}", data.name, started)
    folder = start.folder
    speaker.show_plan(plan, data, info, accelerator, folder, best_by=run.best_by)
    race = f", then a race over {search.race} steps" if search.race else ""
    speaker.say(
        f"Sweeping stage {number + 1} ({planned.stage.name}): {search.sweeps} x {search.steps} steps, head LR "
        f"from {search.start:g} to {search.end:g}{race}. The stages before it are not trained first."
    )
    if run.dry_run:
        speaker.say("Dry run: nothing was swept.")
        return
    resuming.take_up(accelerator, start, command.config, data)

    # 2. Tracking.
    shown = described(command, accelerator)
    tracker = open_tracker(accelerator, run, folder, shown, start.progress)
    faults = NumericalFaults(run.max_skipped, folder.path / "faults", data.train, accelerator.is_main_process)
    curves = Curves(accelerator, folder, tracker, run.log_every, faults, 0)

    # 3. The stage, exactly as the run would enter it.
    loss, clip, class_weights = objective(accelerator, flags, data)
    workers = session.loader_workers(accelerator, flags.batch.workers)
    unreadable = UnreadablePictures(accelerator, None, data, run.max_unreadable, resumed=False)

    def write(values: Mapping[str, float], step: int) -> None:
        curves.write(values, step, 0.0, number)

    def shown_steps(steps: Iterable[Step]) -> Iterator[Step]:
        for step in steps:
            speaker.show_progress("trial", step.step, search.steps, {})
            yield step

    with speaker, failure_noted(folder, accelerator.is_main_process):
        shard(accelerator, model)
        entered = enter_stage(accelerator, model, planned)
        feeds = stage_feeds(
            accelerator, entered, planned, data, info, unreadable, run.seed, flags.regularisation.flip, workers
        )
        if flags.model.head_init == "fitted":
            fit_head(accelerator, model, *feeds.plain, class_weights, len(data.classes), run.seed)

        # 4. The sweeps and the race, and what they say.
        some = some_evaluation(accelerator, feeds, planned, data, info, run.seed, workers)
        how = class_weights, len(data.classes), run.best_by, iter
        judged = partial(judge_trial, accelerator, entered, feeds.judged, some, *how)
        earlier = plan[:number]
        at = Progress(epoch=sum(p.stage.epochs for p in earlier), step=sum(p.steps for p in earlier))
        trials = Trials(accelerator, entered, feeds.train, loss, clip, run.seed, judged, shown_steps, at)
        found = find(trials, search, write)
    speaker.console.print(table(found))
    if found.race:
        speaker.console.print(race_table(found))
    speaker.say(f"--lr: {found.described()}")
    if found.lr is None:
        speaker.say(f"The learning rate stays what it was: {planned.stage.lr:g}.")
    if accelerator.is_main_process:
        curves.close()
        draw(found, folder.plots / "lr_finder.png")
        about = {"stage": number, "seconds": round(time.time() - started, 1), "world_size": accelerator.num_processes}
        summary = {"status": "done", **facts(found), **about, "versions": versions(), "git_commit": git_commit()}
        folder.write_summary(summary)
        curves.finish(summary, folder.plots)
        speaker.say(f"  curves   {folder.path}/plots/lr_finder.png, {folder.path}/metrics.jsonl")
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(find_lr, "recipes/find_lr.py", presets=Path(__file__).parent / "presets")
