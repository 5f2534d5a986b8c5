"""Search for flags: many runs of recipes/finetune.py, chosen and cut short by optuna, without a server.

    python recipes/sweep.py --space vit --data photos --trials 20                   # a space of recipes/sweeps/
    python recipes/sweep.py --space my.yaml --data photos --launcher "--multi_gpu --num_processes 8"

The same files serve W&B's agents: wandb sweep recipes/sweeps/vit.yaml. Every trial is a process of its own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tuning.cli.command_line import Command, run_recipe

if TYPE_CHECKING:
    from optuna.trial import Trial

RECIPES = Path(__file__).resolve().parent


def sweep(command: Command) -> None:
    """Search for the best flags of recipes/finetune.py in a space of values. Takes all its flags; run it by python."""
    from tuning.searching.commands import Trials, check_edges, launcher_words, whose
    from tuning.searching.space_files import read_space
    from tuning.searching.spaces import typed_names
    from tuning.searching.starting import refuse_other_metric, refuse_to_start
    from tuning.tracking import run_folder

    flags, run, asked, started = command.flags, command.flags.run, command.flags.sweep, time.time()

    # 1. The space, less what is typed, and the command of a trial. Its values are known to work before anything starts.
    refuse_to_start(flags)
    space = read_space(asked.space or "", RECIPES / "sweeps").without(typed_names(sys.argv[1:]))
    refuse_other_metric(space, run.best_by)
    folder = run_folder.choose(run.output, run.resume, "sweep", Path(flags.data.data).name, started)
    trials = Trials(
        space, RECIPES / "finetune.py", folder.path / run_folder.CONFIG, launcher_words(asked.launcher, space)
    )
    check_edges(trials, command.config)
    run_folder.refuse_other_run(folder, run.resume, command.config)

    # Only here optuna is imported.
    from rich.console import Console

    from tuning.errors import UserError
    from tuning.searching import results
    from tuning.searching.launching import Ended, Launched
    from tuning.searching.pictures import draw
    from tuning.searching.studies import Study
    from tuning.tracking.summary import failure_noted, versions

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(results.space_table(space))
    if run.dry_run:
        first = Study(space, run.seed, None).next(1)
        assert first is not None
        console.print(
            f"Dry run: nothing was started. The first trial would be:\n{shlex.join(trials.words(first.params))}"
        )
        return

    # 2. The study: new, or where it stopped.
    folder.path.mkdir(parents=True, exist_ok=True)
    run_folder.lock(folder)
    study = Study(space, run.seed, folder.path)
    folder.create(command.config)
    limit = study.limit(asked.trials)
    console.print(f"{limit} trials in {folder.path}; --resume auto --output {folder.path} goes on after a stop.")
    deadline = started + 60 * (run.stop_after or float("inf"))
    environment = {"WANDB_RUN_GROUP": folder.path.name, **os.environ}

    def tried(trial: Trial, path: Path) -> Ended:
        """Run one trial, unless its flags can't work together; stop it when the pruner says so."""
        try:
            averaged = whose(trials.parsed(trial.params))
        except UserError as error:
            return Ended("failed", None, 0.0, str(error))
        named = ("--run-name", f"{folder.path.name}-{path.name}")
        words = trials.words(trial.params, "--output", str(path), "--resume", "auto", *named)
        with Launched(words, path, environment, 60 * run.timeout) as launched:
            for evaluation, value in enumerate(launched.values(averaged, run.best_by, deadline), start=1):
                trial.report(value, evaluation)
                if trial.should_prune():
                    launched.stop()
                    return launched.ended(run.best_by, pruned=True)
        return launched.ended(run.best_by)

    # 3. One trial after another, each followed from evaluation to evaluation.
    with failure_noted(folder, True):
        while (trial := study.next(asked.trials)) is not None:
            path = results.trial_folder(folder.path, study.number(trial))
            console.print(f"trial {study.number(trial)} of {limit}: {results.told_flags(trial.params)}")
            ended = tried(trial, path)
            study.record(trial, ended)
            if ended.status != "failed":
                shutil.rmtree(path / "checkpoints", ignore_errors=True)  # of no use any more; model/ stays
            outcomes = study.outcomes()
            results.write(folder.path, outcomes, run.best_by)
            console.print(f"  {results.told(ended, outcomes)}")
            results.refuse_hopeless(outcomes, ended)

        # 4. The result, best first.
        outcomes = study.outcomes()
        best = results.best_of(outcomes)
        console.print(results.table(outcomes, run.best_by))
        if best is None:
            raise UserError(f"none of {len(outcomes)} trials has come to its end; the table says why.")
        drawn = draw(study.settled(), run.best_by, folder.plots)
        about = {"best_by": run.best_by, "method": space.method, "seed": run.seed, "space": space.described()}
        seconds = {"seconds": round(time.time() - started, 1)}
        folder.write_summary(
            {"status": "done", **results.facts(folder.path, outcomes), **about, **seconds, "versions": versions()}
        )
    for line in results.closing(folder.path, best, len(outcomes), run.best_by, drawn):
        console.print(line)


if __name__ == "__main__":
    run_recipe(sweep, "recipes/sweep.py", presets=RECIPES / "presets")
