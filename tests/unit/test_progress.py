"""Progress survives JSON."""

from __future__ import annotations

import json

from tuning.progress import Progress


def test_json_round_trip() -> None:
    progress = Progress(1, 20, 300, 4, 5000, 2, 0.875, 3, "abc123")
    assert Progress.from_json(json.loads(json.dumps(progress.to_json()))) == progress
    assert Progress.from_json(json.loads(json.dumps(Progress().to_json()))) == Progress()


def test_other_versions_can_be_read() -> None:
    assert Progress.from_json({"step": 7, "of_a_newer_version": 1}) == Progress(step=7)
