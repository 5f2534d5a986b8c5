"""Pictures of a search, by optuna: its history, slices through the space, importances of the flags."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState
from optuna.visualization import matplotlib as drawing

from tuning.tracking.figures import save

FEWEST = 4  # finished trials below which importances mean nothing


def draw(study: optuna.Study, metric: str, folder: Path) -> list[str]:
    """Write ``history.png``, ``slices.png`` and, from some finished trials on, ``importances.png``.

    Importances are those of PED-ANOVA (Watanabe et al. 2023).

    Returns:
        Names of the pictures that were drawn.
    """
    pictures: dict[str, Callable[[], Any]] = {
        "history": lambda: drawing.plot_optimization_history(study, target_name=metric),
        "slices": lambda: drawing.plot_slice(study, target_name=metric),
    }
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) >= FEWEST:
        evaluator = PedAnovaImportanceEvaluator()
        pictures["importances"] = lambda: drawing.plot_param_importances(study, evaluator=evaluator, target_name=metric)
    return [name for name, picture in pictures.items() if _drawn(picture, folder / f"{name}.png")]


def _drawn(picture: Callable[[], Any], path: Path) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental, too few values to differ, ...
        try:
            axes = picture()
            save((axes.flat[0] if hasattr(axes, "flat") else axes).figure, path, tight=True)
        except Exception as error:  # by optuna and matplotlib, of any kind: no search of days shall end for a picture
            print(f"note: {path.name} was not drawn: {type(error).__name__}: {error}")
            return False
    return True
