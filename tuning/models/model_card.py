"""The model card of a run, a ``README.md`` in the format of the Hugging Face hub, filled from what the run left behind.

Mitchell et al. 2019, *Model Cards for Model Reporting*. What isn't known is called unknown.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tuning.cli.coerce import read_yaml
from tuning.cli.command_line import parse_command
from tuning.errors import UserError
from tuning.models import card_metrics, licences
from tuning.models.build import ModelInfo
from tuning.stages import Stage
from tuning.tracking.records import number, read_records
from tuning.tracking.run_folder import CONFIG, RunFolder

CARD, CURVES = "README.md", "curves.png"
SHOWN_CLASSES = 20
_TEMPLATE = "---\n{{ card_data }}\n---\n\n{{ body }}\n"


@dataclass(frozen=True)
class Described:
    """What a card is about.

    Attributes:
        info, classes: of the model.
        run: folder of the run; None for a model without one.
        config: flags of that run; empty without one.
        evaluation: metrics of the model as `card_metrics` takes them; empty where none are known.
        licence: of the published model, an id of the hub; None = unknown.
        usage: how to load what lies beside the card, as Markdown.
        sections: further ones, each a title and Markdown.
    """

    info: ModelInfo
    classes: Sequence[str]
    run: Path | None
    config: Mapping[str, Any]
    usage: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    sections: Sequence[tuple[str, str]] = field(default=())


def timm_usage(folder: str) -> str:
    """How to load a timm folder."""
    return f'```python\nimport timm\n\nmodel = timm.create_model("local-dir:{folder}", pretrained=True).eval()\n```'


def write_card(described: Described, folder: Path) -> None:
    """Write ``README.md``, and the picture of the curves that it shows, into *folder*."""
    curves = described.run / "plots" / CURVES if described.run else None
    if curves is not None and curves.is_file():
        shutil.copyfile(curves, folder / CURVES)
    (folder / CARD).write_text(card(described, curves=(folder / CURVES).is_file()), encoding="utf-8")


def card_of_run(info: ModelInfo, classes: Sequence[str], folder: RunFolder) -> None:
    """Write the card into ``model/`` of a run that has come to its end. A card that fails costs a warning only."""
    try:
        config = read_yaml(folder.path / CONFIG, CONFIG)
        kept = card_metrics.read_json(folder.model / "config.json")["pretrained_cfg"][
            "input_size"
        ]  # of the stage that was best
        info = replace(info, input_size=kept[-1])
        best = best_of_run(folder.path)
        write_card(Described(info, classes, folder.path, config, timm_usage("FOLDER"), best), folder.model)
    except Exception as error:  # whatever it is, the weights are there and a run shall not fail for a text
        print(f"warning: no model card was written to {folder.model} ({error}).", file=sys.stderr, flush=True)


def best_of_run(run: Path | None) -> dict[str, Any]:
    """The metrics of the run's ``model/``, with intervals if its last look came to an end; empty without any."""
    summary = _summary(run)
    best, judged = (summary.get(key) for key in ("best", "judged"))
    return {**(best if isinstance(best, dict) else {}), **(judged if isinstance(judged, dict) else {})}


def card(described: Described, curves: bool) -> str:
    """The text of the card; *curves* = there is a picture of them beside it."""
    summary = _summary(described.run)
    best_by = summary.get("best_by") if described.evaluation else None
    sections = [
        ("Use", described.usage),
        ("Evaluation", card_metrics.metrics_text(described.evaluation, best_by)),
        ("Data", _data_text(described, summary)),
        ("Training", _training_text(described, summary) + ("\n\n![curves](curves.png)" if curves else "")),
        *described.sections,
        ("Licences", _licence_text(described)),
    ]
    name = _title(described)
    body = "\n\n".join([f"# {name}", _introduction(described), *(f"## {title}\n\n{text}" for title, text in sections)])
    return f"{ModelCard.from_template(_header(described, name), template_str=_TEMPLATE, body=body)}\n"


def _header(described: Described, name: str) -> ModelCardData:
    data, on_hub = described.config.get("data"), _on_hub(described.config.get("data"))
    evaluation = described.evaluation if described.evaluation.get("own_data", True) else {}
    results = card_metrics.results(evaluation, _data_name(described.config), data if data and on_hub else "imagefolder")
    return ModelCardData(
        license=described.licence or licences.UNKNOWN,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "fine-tuning"],
        base_model=licences.base_model(described.config),
        datasets=[data] if data and on_hub else None,
        metrics=[result.metric_type for result in results] or None,
        model_name=name,
        eval_results=results or None,
    )


def _title(described: Described) -> str:
    start = described.info.architecture
    return f"{start}, fine-tuned on {_data_name(described.config)}" if described.config else start


def _introduction(described: Described) -> str:
    info, names = described.info, [_plain(name) for name in described.classes]
    listed = ", ".join(names[:SHOWN_CLASSES]) + (", ..." if len(names) > SHOWN_CLASSES else "")
    return (
        f"An image classifier: [timm](https://github.com/huggingface/pytorch-image-models)'s `{info.architecture}` for "
        f"{len(names):,} classes ({listed}), {info.input_size} x {info.input_size} pixels."
    )


def _data_text(described: Described, summary: Mapping[str, Any]) -> str:
    lines = [f"- source: {_data_name(described.config)}"]
    for key, what in (("train_images", "training images"), ("eval_images", "evaluation images")):
        images = number(summary.get(key))
        lines.append(f"- {what}: {'unknown' if images is None else f'{images:,.0f}'}")
    lines.append(f"- classes: {len(described.classes):,}")
    lines.append(f"- licence: {licences.data_licence(described.config.get('data'))}")
    return "\n".join(lines)


def _training_text(described: Described, summary: Mapping[str, Any]) -> str:
    config, info = described.config, described.info
    facts = {
        "starting point": _start(config),
        "seed": config.get("seed"),
        "hardware": summary.get("hardware"),
        "processes": summary.get("world_size"),
        "precision": summary.get("precision"),
        "training time, seconds": summary.get("seconds"),
        "mean, deviation": f"{_numbers(info.mean)}, {_numbers(info.std)}",
        "versions": ", ".join(f"{k} {v}" for k, v in (summary.get("versions") or {}).items()) or None,
        "code": summary.get("git_commit"),
    }
    known = [f"- {name}: {'unknown' if value is None else _plain(value)}" for name, value in facts.items()]
    return "\n\n".join(part for part in ("\n".join(known), _stages_text(described.run)) if part)


def _start(config: Mapping[str, Any]) -> str | None:
    if not config:
        return None
    model, weights = Path(str(config.get("model"))).name, str(config.get("weights"))
    return f"{model}, weights: {weights if weights in ('none', 'pretrained') else Path(weights).name}"


def _stages_text(run: Path | None) -> str:
    """A table of the stages; empty where the flags of the run can't be read any more."""
    if run is None:
        return ""
    try:
        stages = parse_command(("--config", str(run / CONFIG)), "recipes/finetune.py", "", run).stages
    except UserError:
        return ""
    found = _found_rates(run, stages)
    rows = [
        (
            *(_plain(stage.name), _plain(stage.open), stage.epochs, stage.optimizer),
            f"{found.get(n, stage.lr):g}{' (found)' if n in found else ''}",
            *(stage.schedule, stage.batch_size),
        )
        for n, stage in enumerate(stages)
    ]
    return card_metrics.table(("stage", "open", "epochs", "optimizer", "peak LR", "schedule", "batch"), rows)


def _found_rates(run: Path, stages: Sequence[Stage]) -> dict[int, float]:
    """Peak learning rates that an LR finder chose, by stage; one that was found holds until the next is."""
    records = read_records(RunFolder(run).metrics)
    chosen = {r["stage"]: rate for r in records if (rate := number(r.get("lr_finder/chosen"))) is not None}
    rates, latest = dict[int, float](), None
    for n, stage in enumerate(stages):
        latest = chosen.get(n, latest)
        if stage.find_lr and latest is not None:
            rates[n] = latest
    return rates


def _licence_text(described: Described) -> str:
    return "\n".join(
        (
            f"- this model: {described.licence or licences.UNKNOWN}",
            f"- weights it started from: {licences.weights_licence(described.config)}",
            f"- data: {licences.data_licence(described.config.get('data'))}",
        )
    )


def _summary(run: Path | None) -> dict[str, Any]:
    return card_metrics.read_json(RunFolder(run).summary) if run else {}


def _data_name(config: Mapping[str, Any]) -> str:
    """Name of the data without the folders above it, which are nobody else's business."""
    data = config.get("data")
    if not isinstance(data, str):
        return "unknown data"
    return "ELPV (solar cells)" if data == "demo" else _plain(data if _on_hub(data) else Path(data).name or data)


def _on_hub(data: Any) -> bool:
    """Whether ``--data`` named a dataset of the hub: OWNER/NAME and no folder here."""
    if not isinstance(data, str):
        return False
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", data)) and data[0] != "." and not Path(data).exists()


def _plain(value: object) -> str:
    """*value* on one line, without what Markdown would take for its own."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
