"""From any table with pictures and labels to the two columns `image` and `label`, under one class map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Image, Value

from tuning.data.folders import shorten
from tuning.data.splits import Indices
from tuning.data.tables import Opened
from tuning.errors import UserError, did_you_mean

IMAGE_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
LABEL_NAMES = (
    "label", "labels", "class", "classes", "target", "targets", "cls", "category", "fine_label", "class_name",
    "label_name", "y",
)  # fmt: skip


def standardise(train: Dataset, judge: Dataset | None, image_column: str | None, label_column: str | None) -> Opened:
    """Find the image and label columns in *train*, and bring both parts to `image` and `label`.

    Raises:
        UserError: for ambiguous or missing columns, labels that are not classes, or classes that train lacks.
    """
    if len(train) == 0:
        raise UserError("The train split has no images; name another with --train-split.")
    image, label = choose_columns(train, image_column, label_column)
    values, classes = class_map(train.features[label], lambda: _column(train, label))
    encoded = [_encode(part, image, label, values, classes) for part in (train, judge) if part is not None]
    return Opened(encoded[0], encoded[1] if judge is not None else None, classes)


def choose_columns(dataset: Dataset, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """The names of the image and the label column of *dataset*, of which only names and types are looked at.

    Raises:
        UserError: ambiguous, missing or impossible columns.
    """
    image = _choose(dataset, image_column, "--image-column", _image_column, _may_be_image)
    return image, _choose(dataset, label_column, "--label-column", _label_column, _may_be_label)


def _choose(
    dataset: Dataset,
    requested: str | None,
    flag: str,
    find: Callable[[Dataset], list[str]],
    allowed: Callable[[Any], bool],
) -> str:
    known = dataset.column_names
    if requested is not None:
        if requested not in known:
            near = did_you_mean(requested, known)
            raise UserError(f"{flag} {requested!r} is not a column; the columns are {', '.join(known)}.{near}")
        if not allowed(dataset.features[requested]):
            raise UserError(f"{flag} {requested!r} cannot be used: its type is {dataset.features[requested]}.")
        return requested
    found = find(dataset)
    if len(found) == 1:
        return found[0]
    problem = f"several columns fit ({', '.join(found)})" if found else "no column fits"
    raise UserError(f"Cannot choose {flag}: {problem}; name one of the columns {', '.join(known)} with {flag}.")


def _image_column(dataset: Dataset) -> list[str]:
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if not images:
        images = [name for name, feature in dataset.features.items() if _is_encoded(feature)]
    named = [name for name in images if name.lower() in IMAGE_NAMES]
    return named if len(named) == 1 else images


def _label_column(dataset: Dataset) -> list[str]:
    """A known name first, then the type: `fine_label` of CIFAR-100 wins over `coarse_label`."""
    usable = [name for name, feature in dataset.features.items() if _may_be_label(feature)]
    typed = [name for name in usable if isinstance(dataset.features[name], ClassLabel)]
    named = [name for name in usable if name.lower() in LABEL_NAMES]
    return [name for name in named if name in typed] or named or typed


def _may_be_image(feature: Any) -> bool:
    return isinstance(feature, Image) or _is_encoded(feature) or _is_value(feature, "string", "large_string")


def _is_encoded(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"}
    return _is_value(feature, "binary", "large_binary")


def _may_be_label(feature: Any) -> bool:
    if isinstance(feature, ClassLabel):
        return True
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "bool", "string", "large_string"))


def _is_value(feature: Any, *dtypes: str) -> bool:
    return isinstance(feature, Value) and feature.dtype in dtypes


def class_map(feature: Any, labels: Callable[[], pa.Array]) -> tuple[pa.Array, tuple[str, ...]]:
    """The distinct raw labels in order, and the name of each.

    Args:
        feature: type of the label column.
        labels: of the training part, asked for where the type doesn't name the classes.
    """
    if isinstance(feature, ClassLabel):
        names = tuple(feature.names or map(str, range(feature.num_classes or 0)))
        return pa.array(names, pa.string()), names
    values = pc.unique(labels()).drop_null()
    values = values.take(pc.sort_indices(values))
    return values, tuple(str(value) for value in values.to_pylist())


def _encode(dataset: Dataset, image: str, label: str, values: pa.Array, classes: tuple[str, ...]) -> Dataset:
    _require_columns(dataset, image, label)
    codes = _codes(dataset, label, values)
    images = dataset.select_columns([image])
    if image != "image":
        images = images.rename_column(image, "image")
    images = images.cast_column("image", Image(decode=False))
    encoded: Dataset = images.add_column("label", codes, feature=ClassLabel(names=list(classes)))
    return encoded


def _require_columns(dataset: Dataset, image: str, label: str) -> None:
    missing = [name for name in (image, label) if name not in dataset.column_names]
    if missing:
        has = ", ".join(dataset.column_names)
        raise UserError(f"The evaluation split lacks the column {missing[0]!r} of train; it has {has}.")


def _codes(dataset: Dataset, label: str, values: pa.Array) -> Indices:
    raw = named(_column(dataset, label), dataset.features[label])
    refuse_missing(raw.null_count, len(raw), label)
    return codes_of(raw, values, label)


def refuse_missing(missing: int, rows: int, label: str) -> None:
    """Refuse rows without a label."""
    if missing:
        raise UserError(
            f"{missing:,} of {rows:,} rows have no {label!r} (empty or below zero, as in hidden test sets); "
            "remove them, or name other splits with --train-split and --eval-split."
        )


def codes_of(raw: pa.Array, values: pa.Array, label: str) -> Indices:
    """Each label as its place in the class map; names decide, not numbers, where a part has its own ClassLabel.

    Args:
        raw: labels as `named` gives them, none missing.

    Raises:
        UserError: a label that the class map lacks.
    """
    codes = pc.index_in(_as_type(raw, values.type), value_set=values)
    if codes.null_count:
        unknown = pc.unique(raw.filter(pc.is_null(codes))).to_pylist()
        raise UserError(
            f"The evaluation split has classes that train lacks in column {label!r}: {shorten(map(str, unknown))}; "
            "add images of them to train or remove them."
        )
    return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.int64)


def named(column: pa.Array, feature: Any) -> pa.Array:
    """A ClassLabel's integers as its names, below zero as null; other columns as they are."""
    if not isinstance(feature, ClassLabel):
        return column
    names = pa.array(feature.names or [str(i) for i in range(feature.num_classes or 0)], pa.string())
    return names.take(pc.if_else(pc.less(column, 0), pa.scalar(None, column.type), column))


def _as_type(column: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return column.cast(kind)
    except pa.ArrowInvalid as error:
        raise UserError(f"The labels of train ({kind}) and of the evaluation split ({column.type}) differ.") from error


def _column(dataset: Dataset, name: str) -> pa.Array:
    """One column as a single Arrow array, without touching the images."""
    column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
