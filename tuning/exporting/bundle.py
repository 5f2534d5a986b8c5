"""The folder of an export: complete under its name, or not there at all."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuning.cli.outputs import refuse_used_folder
from tuning.errors import UserError
from tuning.exporting import preprocessing
from tuning.exporting.formats import Format
from tuning.judging.finished import CALIBRATION, TIMM_CONFIG
from tuning.models.build import ModelInfo

SETTINGS, COMPARISON, LATENCY, EXAMPLE, CARD = (
    *("preprocessing.json", "comparison.json", "latency.json", "example.py", "README.md"),
)
PREPROCESSING = "preprocessing.py"

# The ten lines that a user starts from; "{needs}" and so on differ between the formats.
_EXAMPLE = '''"""Say what pictures show: python example.py PICTURE ...   (needs: pip install {needs})"""

import sys
from pathlib import Path

{imports}
from preprocessing import answer, prepare, read_settings

settings = read_settings()
{load}
for picture in sys.argv[1:]:
    {run}
    print(picture, *answer(logits, settings), sep="\\t")
'''
_LINES: dict[Format, dict[str, str]] = {
    "onnx": {
        "needs": "onnxruntime numpy pillow",
        "imports": "import onnxruntime",
        "load": 'model = Path(__file__).with_name("model.onnx")\n'
        'network = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])',
        "run": '(logits,) = network.run(None, {"images": prepare(picture, settings)})',
    },
    "exported-program": {
        "needs": "torch numpy pillow",
        "imports": "import torch",
        "load": 'network = torch.export.load(Path(__file__).with_name("model.pt2")).module()',
        "run": "logits = network(torch.from_numpy(prepare(picture, settings))).detach()",
    },
    "timm": {
        "needs": "timm numpy pillow",
        "imports": "import timm\nimport torch",
        "load": 'network = timm.create_model(f"local-dir:{Path(__file__).parent}", pretrained=True).eval()',
        "run": "logits = network(torch.from_numpy(prepare(picture, settings))).detach()",
    },
}


def settings_for(
    info: ModelInfo, classes: tuple[str, ...], temperature: float, uint8: bool, fitted_on: str = ""
) -> dict[str, Any]:
    """The content of ``preprocessing.json``: what `preprocessing` works by.

    Args:
        temperature: that calibrates the probabilities, and what it was fitted on.
        uint8: the export normalises by itself; else its caller does.
    """
    size = info.input_size
    known = info.interpolation in preprocessing.FILTERS
    return {
        "input": {
            "name": "images",
            "shape": ["batch", 3, size, size],
            "dtype": "uint8" if uint8 else "float32",
            "colours": "RGB",
        },
        "resize_shorter_side": math.floor(size / info.crop_pct),
        "interpolation": info.interpolation if known else "bicubic",  # as `transforms.Crop` falls back
        "crop": size,
        "mean": list(info.mean),
        "std": list(info.std),
        "normalise": "inside the network" if uint8 else "before the network: (pixels / 255 - mean) / std",
        "output": {"name": "logits", "shape": ["batch", len(classes)]},
        "temperature": temperature,
        "temperature_fitted_on": fitted_on or None,
        "classes": list(classes),
    }


def write_companions(kind: Format, settings: Mapping[str, Any], folder: Path) -> None:
    """Lay preprocessing and example beside the network; a timm folder is told the temperature, too."""
    write_json(folder / SETTINGS, settings)
    if kind == "timm" and settings["temperature"] != 1.0:
        config = json.loads((folder / TIMM_CONFIG).read_text(encoding="utf-8"))
        fitted = {"temperature": settings["temperature"], "fitted_on": settings["temperature_fitted_on"] or ""}
        write_json(folder / TIMM_CONFIG, config | {CALIBRATION: fitted})
    shutil.copyfile(Path(preprocessing.__file__), folder / PREPROCESSING)
    (folder / EXAMPLE).write_text(_EXAMPLE.format(**_LINES[kind]), encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    """One JSON file, readable by people."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def appearing(output: Path, keep: bool = True) -> Iterator[Path]:
    """A folder to fill, which becomes *output* when the body ends well and *keep*; else nothing is left of it.

    Raises:
        UserError: there is something in *output* already, also if it came there meanwhile, or it can't be made.
    """
    refuse_used_folder(output)
    made = [parent for parent in output.absolute().parents if not parent.exists()]
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        if keep:
            refuse_used_folder(output)
            if output.is_dir():
                output.rmdir()
            partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:  # as it was before, if nothing came of it
            with contextlib.suppress(OSError):
                parent.rmdir()


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file below *folder*: its name there, and its size in bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in files]


def usage(kind: Format) -> str:
    """How to load an export, for its model card."""
    example = _EXAMPLE.format(**_LINES[kind])
    return f"`{EXAMPLE}`, which lies beside this file:\n\n```python\n{example}```"


def is_best(opened: Path, run: Path | None) -> bool:
    """Whether *opened*, as typed, is the model that the run keeps as its best: the run itself, or its ``model/``."""
    return run is not None and opened.expanduser().resolve() in (run.resolve(), (run / "model").resolve())


def output_folder(asked: str | None, opened: Path, run: Path | None, kind: Format) -> Path:
    """Where the export goes: as asked, or into ``export/`` of the run; a checkpoint's is named by the checkpoint, too.

    Raises:
        UserError: nothing was asked and there is no run.
    """
    if asked is not None:
        return Path(asked).expanduser()
    if run is None:
        raise UserError(f"--run {opened} belongs to no run that the export could lie in; give --output.")
    return run / "export" / (kind if is_best(opened, run) else f"{opened.resolve().name}-{kind}")
