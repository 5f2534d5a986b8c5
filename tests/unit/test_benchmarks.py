"""The parts of the speed benchmarks that compute something; no test asserts a time."""

from __future__ import annotations

from tests.benchmarks.paired import Row, hardware_line, paired, ratio, table


def test_jobs_take_turns_and_the_order_turns_around() -> None:
    ran: list[str] = []

    def job(name: str, seconds: float | None) -> float | None:
        ran.append(name)
        return seconds

    found = paired({"a": lambda: job("a", 2.0), "b": lambda: job("b", None)}, pairs=3)

    assert ran == ["a", "b", "b", "a", "a", "b"]
    assert found["a"] == [2.0, 2.0, 2.0]  # as returned
    assert len(found["b"]) == 3
    assert all(0 <= seconds < 1 for seconds in found["b"])  # wall time


def test_ratios_are_of_runs_of_the_same_round() -> None:
    times = {"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}  # the machine slowed down for both

    assert ratio(times, "a", "b") == (2.0, 1.0, 3.0)


def test_the_table_has_hardware_ratio_range_and_bar() -> None:
    shown = table("Steps", [Row("a against b", (2.0, 1.0, 3.0), ">= 1.9", "5 ms")])

    assert shown.startswith(f"Steps\n\n{hardware_line()}\n\n| measured |")
    assert "torch" in hardware_line()
    assert shown.endswith("| a against b | 2 | 1 to 3 | >= 1.9 | 5 ms |")
