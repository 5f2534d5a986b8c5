"""Make what was trained usable elsewhere: ONNX, torch.export's format or a timm folder, checked against the original.

    python recipes/export.py --run runs/first                                  # ONNX, into runs/first/export/onnx
    python recipes/export.py --run runs/first --format timm --push me/cells --dry-run

An export that differs from the original on real pictures is refused: exit status 1, nothing is left. Read from top to
bottom.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from tuning.cli.command_line import Command, run_recipe


def export(command: Command) -> None:
    """Write a trained model as ONNX, as torch.export's .pt2 or as a timm folder, and prove it equal to the original.

    Beside it: preprocessing, a ten-line example, the comparison, latencies on this machine, a model card. Uploads on
    request.
    """
    # The flags are known to be right by now; only here torch is imported.
    import sys

    import torch

    from tuning.cli.outputs import refuse_used_folder
    from tuning.errors import UserError
    from tuning.exporting import bundle, comparison, formats, latency, publishing, report
    from tuning.judging.finished import open_finished
    from tuning.judging.judged_data import labels_for, open_judged
    from tuning.models import model_card
    from tuning.models.card_metrics import judged_metrics
    from tuning.session import cpu_cores, keep_freed_memory
    from tuning.tracking import weights_and_biases
    from tuning.tracking.console import Speaker
    from tuning.tracking.hardware import hardware

    flags, run, asked, kind = command.flags, command.flags.run, command.flags.export, command.flags.export.format
    if int(os.environ.get("RANK", "0")):
        return  # an export is the work of one process: the first

    # 1. What is exported, and whether it can be: everything that needs no computation is refused here.
    if flags.opened.run is None:
        raise UserError("--run is missing: the folder of a finished run, of a checkpoint, or a timm folder.")
    uint8 = formats.input_type(kind, asked.export_input) == "uint8"
    formats.check_packages(kind)
    found = open_finished(flags.opened.run)
    best = bundle.is_best(Path(flags.opened.run), found.run)
    output = bundle.output_folder(run.output, Path(flags.opened.run), found.run, kind)
    refuse_used_folder(output)
    name = publishing.artifact_name(f"{(found.run or Path(flags.opened.run)).resolve().name}-{kind}")
    evaluation = judged_metrics(asked.metrics, found.run if best else None, found.classes)
    evaluation = evaluation or (model_card.best_of_run(found.run) if best else {})
    if asked.push:
        publishing.check_repository(asked.push)
    if asked.push and not run.dry_run:
        publishing.check_login()
    tracker_run = publishing.tracker_run(found.run) if asked.push_wandb else None
    if tracker_run and not run.dry_run:
        weights_and_biases.check_artifact()
    limit = min(asked.check_images, flags.data.limit_eval or asked.check_images)
    data, _ = open_judged(replace(flags.data, limit_eval=limit), run.seed, flags.opened.run)
    labels = labels_for(data.eval, data, found.classes)
    threads = cpu_cores() if run.threads == "auto" else run.threads
    torch.set_num_threads(threads)
    keep_freed_memory()
    speaker, machine = Speaker(True), hardware(torch.device("cpu"))
    speaker.say(f"{found.info.architecture}, {found.info.weights}: to {kind}, {'uint8' if uint8 else 'float'} input.")

    # 2. The export appears under its name when all of it is there and right.
    with bundle.appearing(output, keep=not run.dry_run) as folder:
        formats.write(kind, found.model, found.info, found.classes, folder, uint8)
        settings = bundle.settings_for(found.info, found.classes, found.temperature, uint8, found.fitted_on)
        bundle.write_companions(kind, settings, folder)
        network = formats.load(kind, folder, threads)

        # 3. The same pictures through both, from the files just written.
        compared = comparison.compare(found.model, network, data.eval, labels, found.info, uint8, settings)
        speaker.say(report.comparison_line(compared, asked.tolerance))
        if not compared.within(asked.tolerance):
            print(
                f"refused: the export differs from the original by {compared.largest_logit_difference:g} in a logit, "
                f"--tolerance is {asked.tolerance:g}. Nothing was written to {output}.",
                file=sys.stderr,
            )
            raise SystemExit(1)
        speaker.say(report.pillow_line(compared))
        facts = report.comparison_facts(kind, compared, asked.tolerance, data.name, found.info.weights, machine)
        bundle.write_json(folder / bundle.COMPARISON, facts)

        # 4. How fast it is here.
        timings = None
        if asked.latency_repeats:
            images = torch.randint(0, 256, (latency.BATCHES[-1], 3, *[found.info.input_size] * 2), dtype=torch.uint8)
            inputs = formats.inputs_for(images, found.info, uint8)
            original = formats.original(found.model, found.info, uint8)
            # The original as a run evaluates it: channels-last, and memory kept between batches.
            networks = {"torch": lambda x: original(x.contiguous(memory_format=torch.channels_last)), kind: network}
            rows = latency.latencies(networks, inputs, asked.latency_repeats)
            timings = report.latency_facts(rows, threads, machine, kind)
            bundle.write_json(folder / bundle.LATENCY, timings)
            speaker.console.print(report.latency_table(rows, threads, machine))

        # 5. The model card.
        about = report.card_section(kind, facts, timings, found.temperature)
        model_card.write_card(
            model_card.Described(
                found.info,
                found.classes,
                found.run,
                found.config,
                bundle.usage(kind),
                evaluation,
                licence=asked.license,
                sections=(("Export", about),),
            ),
            folder,
        )
        files = bundle.listing(folder)

    # 6. Uploads, or what they would hold.
    lines = publishing.upload_lines(str(output), files)
    if asked.push:
        lines += publishing.upload_lines(f"Hugging Face hub, {asked.push} (private if new)", files)
    if tracker_run:
        project = str(found.config.get("project"))
        lines += publishing.upload_lines(f"W&B artifact {name} of run {tracker_run}, project {project}", files)
    for line in (
        ("Dry run: nothing was kept or uploaded. It would be:", *lines) if run.dry_run else lines[: len(files) + 1]
    ):
        speaker.say(line)
    if run.dry_run:
        return
    if asked.push:
        speaker.say(f"Uploaded to {publishing.push(asked.push, output)}")
    if tracker_run:
        weights_and_biases.push_artifact(output, name, tracker_run, project, facts)
        speaker.say(f"Uploaded as artifact {name} of W&B run {tracker_run}.")
    speaker.say(f"Try it: python {output}/{bundle.EXAMPLE} PICTURE")


if __name__ == "__main__":
    run_recipe(export, "recipes/export.py", presets=Path(__file__).parent / "presets")
