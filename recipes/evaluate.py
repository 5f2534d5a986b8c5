"""Judge what was trained: exact metrics with intervals, on any number of processes, every image once.

    accelerate launch recipes/evaluate.py --run runs/photos                       # on the run's own evaluation images
    accelerate launch recipes/evaluate.py --run runs/photos --data other_photos   # on other images of the same classes
    accelerate launch recipes/evaluate.py --model convnext_tiny --data imagenet   # any timm model

Writes metrics.json and predictions.parquet into --output. Read from top to bottom.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def evaluate(command: Command) -> None:
    """Judge a run, one of its checkpoints or any timm model on its own or on other data, every image once."""
    # The flags are known to be right by now; only here torch is imported.
    from tuning import session
    from tuning.analysis.drawing import draw_all
    from tuning.analysis.overview import look_at, named_pairs
    from tuning.cli.outputs import refuse_used_folder
    from tuning.data.tables import names_of
    from tuning.judging.calibration import calibrated, place_for, store
    from tuning.judging.ensembles import MEAN, averaged_weights, refuse_other_classes, side_by_side
    from tuning.judging.final_metrics import probabilities
    from tuning.judging.finished import open_finished, open_named
    from tuning.judging.judged_data import changed_since, labels_for, open_judged
    from tuning.judging.judgement import class_table, details, judge, metrics_table, write
    from tuning.judging.predicting import Predictions, judging_batch, predict_all
    from tuning.judging.views import averaged
    from tuning.safety.unreadable import shown
    from tuning.tracking import run_folder
    from tuning.tracking.console import Speaker, shown_path
    from tuning.tracking.summary import versions

    flags, run, asked, started = command.flags, command.flags.run, command.flags.evaluate, time.time()
    name, size, crop = flags.opened.run, flags.model.image_size, flags.model.crop_pct

    # 1. Session, data, models. Every line runs on every process.
    accelerator = session.start(run.precision, run.threads, run.timeout)
    speaker = Speaker(accelerator.is_main_process)
    with accelerator.local_main_process_first():  # the others find its cache
        data, own = open_judged(flags.data, run.seed, name)
    if name is None:
        opened = [open_named(flags.model.model, flags.model.weights, data.classes, size, crop)]
    else:
        opened = [open_finished(one, size, crop) for one in (name, *asked.ensemble)]
    names = [shown_path(Path(path)) for path in (name, *asked.ensemble) if path] or [flags.model.model]
    first, headline = opened[0], MEAN if len(opened) > 1 else names[0]
    refuse_other_classes(names, opened)
    place = place_for(Path(name), flags.data) if name and asked.calibrate else None
    labels = labels_for(data.eval, data, first.classes)
    title, now = f"evaluate-{Path(names[0]).name}", session.same_everywhere(started)
    folder = run_folder.choose(run.output, "never", title, data.name, now).path
    refuse_used_folder(folder)

    # 2. What will be judged, before anything is spent.
    speaker.say(f"images   {data.name}: {len(data.eval):,}" + (", the run's own evaluation images" if own else ""))
    for one in opened:
        speaker.say(f"model    {one.info.architecture}, {one.info.input_size} pixels; {one.info.weights}")
    for note in (*data.notes, *changed_since(first.run if own else None, data)):
        speaker.say(f"note: {note}")

    # 3. Logits of every image, once for every model, and for averaged weights where there can be any.
    mixed = averaged_weights(opened) if len(opened) > 1 else None
    models = [(one.model, one.info) for one in opened] + ([(mixed, first.info)] if mixed is not None else [])
    found: list[Predictions] = []
    predicting = time.time()
    with speaker:
        for model, info in models:
            model.to(accelerator.device)
            predictions = predict_all(
                accelerator,
                model,
                info,
                data.eval,
                workers=session.loader_workers(accelerator, flags.batch.workers),
                folder=data.folder,
                batch_size=judging_batch(flags.batch.micro_batch, accelerator.device),
                forward=averaged(model, asked.tta),
                progress=lambda done: speaker.show_progress("images", done, len(data.eval), {}),
            )
            model.to("cpu")
            found.append(predictions)
    rate = len(models) * len(data.eval) / (time.time() - predicting)

    # 4. The verdict, on one process: all have the same logits.
    if accelerator.is_main_process:
        rows, unreadable = found[0].rows, found[0].unreadable
        truth, logits = labels[rows], side_by_side(names, opened, [one.logits for one in found])
        calibration = calibrated(logits[headline], truth, data.name) if asked.calibrate else None
        temperatures = {n: one.temperature for n, one in zip(names, opened, strict=True)}
        if calibration is not None:
            temperatures[headline] = calibration["temperature"]
        judged = {n: judge(one, truth, temperatures.get(n, 1.0), asked.bootstrap) for n, one in logits.items()}
        facts = {
            **judged[headline],
            **details(logits[headline], truth, first.classes),
            "members": {n: one for n, one in judged.items() if n != headline},
            "models": {n: vars(one.info) for n, one in zip(names, opened, strict=True)},
            "temperature_fitted_on": calibration["fitted_on"] if calibration else first.fitted_on or None,
            "data": flags.data.data,
            "own_data": own,
            "tta": asked.tta,
            "unreadable": [{"id": broken.name, "reason": broken.reason} for broken in unreadable],
            "images_per_second": round(rate, 1),
            "world_size": accelerator.num_processes,
            "precision": session.precision_name(accelerator),
            "versions": versions(),
            "git_commit": run_folder.git_commit(),
        }
        ids, temperature = names_of(data.eval, rows.tolist()), facts["temperature"]
        p = probabilities(logits[headline], temperature).float().numpy()
        overview = look_at(p, truth.numpy(), rows.numpy(), ids, replace(data, classes=first.classes))
        facts["confused_pairs"] = named_pairs(overview)
        write(folder, facts, ids, logits[headline], truth, rows, first.classes, temperature)
        draw_all(overview, folder / "plots")
        speaker.console.print(metrics_table(judged))
        speaker.console.print(class_table(facts["per_class"]))
        if calibration is not None and place is not None:
            store(place, calibration)
            speaker.say(
                f"Temperature {calibration['temperature']:.3f}, stored in {shown_path(place)}/config.json: fitted on "
                f"{calibration['fitted_on']}, the same on which ece_after_temperature is measured here."
            )
        if unreadable:
            speaker.say(f"warning: could not be read: {len(unreadable):,}{shown(map(str, unreadable))}")
        speaker.say(f"{rate:.0f} images/s. See {shown_path(folder)}: metrics.json, predictions.parquet, plots.")
    accelerator.end_training()


if __name__ == "__main__":
    run_recipe(evaluate, "recipes/evaluate.py", presets=Path(__file__).parent / "presets")
