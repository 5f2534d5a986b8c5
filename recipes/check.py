"""Look at data, flags, model and memory before GPU hours are spent.

    python recipes/check.py --data photos --model convnext_tiny               # headers, hashes and a few steps
    python recipes/check.py --data photos --model convnext_tiny --decode      # and every picture in full

Takes the flags of the run to come. Exit status: 0 = PASS, 1 = errors found, 2 = the run would refuse to start. Writes
findings.json, check.json and check.html into --output. Read from top to bottom.
"""

from __future__ import annotations

import time
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def check(command: Command) -> None:
    """Look at data, flags, model and memory before GPU hours are spent: PASS (exit status 0), or FAIL (1) and why.

    Takes the flags of recipes/finetune.py.
    """
    # The flags are known to be right by now; only here torch is imported.
    import torch

    from tuning import session
    from tuning.caching import with_cache
    from tuning.entering import enter_stage
    from tuning.errors import UserError
    from tuning.feeds import stage_feeds
    from tuning.lr_search.auto import searching_stages
    from tuning.lr_search.finder import search_for
    from tuning.preflight import report, suspects, verdict
    from tuning.preflight.findings import Finding, count, in_order
    from tuning.preflight.memory import fitting_micro_batch
    from tuning.preflight.reading import picture_facts, read_pictures
    from tuning.preflight.timing import expected_seconds, judging_seconds
    from tuning.preflight.trial import (
        StageTrial,
        channel_statistics,
        heaviest,
        some_pictures,
        trial_plan,
        try_stage,
        uniform_loss,
    )
    from tuning.preparing import objective, prepare
    from tuning.safety.unreadable import UnreadablePictures
    from tuning.tracking import run_folder
    from tuning.tracking.console import Speaker, shown_path

    flags, run, asked, started = command.flags, command.flags.run, command.flags.check, time.time()

    # 1. Session, data, model and plan: what the run would refuse is refused here. Every line runs on every process.
    accelerator = session.start(run.precision, run.threads, run.timeout)
    speaker = Speaker(accelerator.is_main_process)
    command, data, model, info, plan = prepare(accelerator, command)
    flags = command.flags
    data = with_cache(accelerator, flags, data, plan, info, dry=True)
    folder = run_folder.choose(run.output, "never", "check", data.name, session.same_everywhere(started))
    if accelerator.is_main_process:
        report.prepare(folder.path)
    speaker.show_plan(plan, data, info, accelerator, folder, best_by=run.best_by)

    # 2. Every picture: header and hash, or in full.
    reading = time.time()
    with speaker:
        pictures = read_pictures(
            accelerator,
            data,
            image_size=max(planned.largest_size for planned in plan),
            in_full=asked.decode,
            workers=flags.batch.workers,
            progress=lambda done, total: speaker.show_progress("pictures", done, total, {}),
        )
    measured = {"data": data.name, "model": info.name, **picture_facts(pictures), "classes": suspects.class_facts(data)}
    measured["decoded"], measured["reading_seconds"] = asked.decode, round(time.time() - reading, 2)
    limits = suspects.Limits(asked.min_side, asked.max_aspect, asked.max_megapixels, asked.near_bits)
    findings = [
        *suspects.picture_findings(data, pictures, limits),
        *suspects.class_findings(data, suspects.is_balanced(flags.regularisation.class_weights, command.stages)),
        *suspects.size_findings(pictures, info.input_size),
        *verdict.schedule_findings(plan),
        *(Finding("data", "note", note) for note in data.notes),
    ]

    # 3. A few optimizer steps of every stage, by the engine that trains, and one of the largest micro-batch.
    classes, regularisation, seed = len(data.classes), flags.regularisation, run.seed
    loss, clip, _ = objective(accelerator, flags, data)
    workers = session.loader_workers(accelerator, flags.batch.workers)
    trials: list[StageTrial] = []
    entered = None
    try:
        for planned in plan if asked.check_steps else ():
            short = trial_plan(planned, len(data.train), accelerator.device.type == "cpu")
            entered = enter_stage(accelerator, model, short, before=entered)
            unreadable = UnreadablePictures(accelerator, None, data, 1.0, resumed=False)
            feed = stage_feeds(accelerator, entered, short, data, info, unreadable, seed, regularisation.flip, workers)
            equal = uniform_loss(data, loss)
            trials.append(
                try_stage(accelerator, entered, short, feed.train, loss, clip, equal, seed, asked.check_steps)
            )
            if planned is plan[0]:
                statistics = channel_statistics(accelerator, some_pictures(accelerator, data, short, info, workers))
                findings += verdict.statistics_findings(*statistics)
                measured["input"] = dict(zip(("mean", "std"), statistics, strict=True))
            if planned is heaviest(plan):
                memory = fitting_micro_batch(accelerator, entered, planned, classes, loss, clip)
                findings += verdict.memory_findings(memory, planned)
                measured["memory"] = vars(memory)
        if trials:
            judging = judging_seconds(accelerator, model, data, plan[-1], info, workers)
            fitted = flags.model.head_init == "fitted"
            steps, finder = sum(planned.steps for planned in plan), flags.finder
            searching = searching_stages(plan, finder.finder_at)
            searches = {number: search_for(plan[number], finder, steps) for number in searching}
            measured |= expected_seconds(plan, trials, data, judging, fitted, run.max_steps, searches)
            findings += verdict.trial_findings(trials, accelerator.num_processes, fitted)
    except (UserError, torch.OutOfMemoryError) as error:
        if accelerator.num_processes > 1:  # the others may be waiting for this one
            raise
        findings.append(Finding("trial_failed", "error", str(error)))

    # 4. The verdict: a table, a page with the suspects, and the exit status.
    findings = in_order(findings)
    if accelerator.is_main_process:
        report.write(folder.path, findings, measured, data)
    speaker.console.print(report.table(findings))
    for line in report.examples(findings):
        speaker.say(line)
    for line in report.closing(findings, measured, shown_path(folder.path)):
        speaker.say(line)
    accelerator.end_training()
    if count(findings, "error"):
        raise SystemExit(1)


if __name__ == "__main__":
    run_recipe(check, "recipes/check.py", presets=Path(__file__).parent / "presets")
