"""Progress survives JSON."""

from __future__ import annotations

import json

import pytest

from tuning.progress import Progress


def test_json_round_trip() -> None:
    progress = Progress(1, 20, 300, 4, 5000, True, 2, 1, 0.875, 280, 3.5, 1, 3e-4, "abc123", 16)
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json(json.loads(json.dumps(Progress().to_json()))) == Progress()


@pytest.mark.parametrize(
    ("key", "value"),
    [("step", "7"), ("step", 7.5), ("due", 2), ("best", "high"), ("stage", None), ("micro_batch", 8.5)],
)
def test_values_of_another_type_are_refused(key: str, value: object) -> None:
    with pytest.raises(TypeError, match=key):
        Progress.from_json({key: value})


def test_other_versions_can_be_read() -> None:
    assert Progress.from_json({"step": 7, "of_a_newer_version": 1}) == Progress(step=7)
