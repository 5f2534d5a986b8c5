"""The last act of `recipes/finetune.py`: predictions, pictures, tables and a report, and what happens when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import offline_wandb
import pytest
from pictures import write_classes
from ranks import run_ranks
from recipe_runs import Finished, Run, finetune_here, run_forked

from tuning.analysis import report
from tuning.comparison.runs import groups, judged_alike, read_runs
from tuning.judging import kept_predictions, predicting

SMALL = ("--model", "test_vit", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--workers", "0")
SHORT = ("--freeze-epochs", "0", "--epochs", "1", "--log-every", "3")
NAMES = ("<b>bold & 'quoted'", "$x_1$", "plain")


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes whose names mean something to HTML, matplotlib and shells."""
    root = tmp_path_factory.mktemp("nasty")
    for split, count in (("train", 10), ("val", 6)):
        write_classes(root / split, dict.fromkeys(NAMES, count))
    return root


@pytest.fixture(scope="module")
def finished(nasty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    done = run_forked(home, "--data", str(nasty), *SMALL, *SHORT, "--output", "run")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    assert "run/report.html" in done.stdout
    return home / "run"


def test_what_the_run_leaves_behind(finished: Path) -> None:
    kept = kept_predictions.read(finished / "predictions.parquet")
    assert len(kept.ids) == 18
    assert all(name.startswith("val/") for name in kept.ids)
    assert np.allclose(kept.probabilities.sum(axis=1), 1, atol=1e-6)
    assert {p.stem for p in (finished / "plots").glob("*.png")} >= {"augmented_batch", "curves", "schedule"}
    summary = json.loads((finished / "summary.json").read_text())
    best, judged = summary["best"], summary["judged"]
    assert (kept.predicted == kept.labels).mean() == pytest.approx(best["top1"])
    own = kept.probabilities[np.arange(18), kept.labels]
    assert -np.log(own).mean() == pytest.approx(best["loss"], abs=1e-5), "the weights in model/, not the last ones"
    assert judged["top1"] == pytest.approx(best["top1"])
    low, high = judged["intervals"]["top1"]
    assert low <= judged["top1"] <= high
    assert f"{low:.4f} to {high:.4f}" in (finished / "model/README.md").read_text(), "the model card"
    for name in ("confusion", "mistakes", "precision_recall", "schedule", "curves"):
        assert (finished / f"plots/{name}.png").stat().st_size > 5000, name
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 5
    for part in ("&lt;b&gt;bold", "batch_size: 8", "test_vit on nasty", "adamw", "Learning rates", "git commit"):
        assert part in page, part


def test_wandb_holds_the_analysis(finished: Path) -> None:
    entries = offline_wandb.entries(finished / "wandb" / "latest-run")
    history = "".join(json.dumps(entry) for entry in entries if entry["type"] == "history")
    for name in ("mistakes", "confused_pairs", "confusion", "precision_recall"):
        assert f"analysis/{name}" in history, name
    tables = [entry["artifact"]["manifest"]["contents"] for entry in entries if entry["type"] == "artifact"]
    (parts,) = [part for part in tables if any(file["path"] == "analysis/mistakes.table.json" for file in part)]
    (table,) = [json.loads(Path(file["local_path"]).read_text()) for file in parts if "table" in file["path"]]
    kept = kept_predictions.read(finished / "predictions.parquet")
    wrong = int((kept.predicted != kept.labels).sum())
    assert len(table["data"]) == wrong
    pictures = {file["path"]: Path(file["local_path"]) for file in parts if file["path"].endswith(".jpg")}
    for row in table["data"]:
        assert pictures[row[0]["path"]].is_relative_to(finished), "the offline run must be whole in its folder"
        assert row[2] in NAMES
        assert row[1].startswith(f"val/{row[2]}/")


@pytest.fixture
def page(finished: Path) -> Iterator[Any]:
    """The report in a headless browser, with what went wrong in it."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1280, "height": 900}, offline=True)
        yield opened
        browser.close()


def test_the_report_in_a_browser(finished: Path, page: Any, tmp_path: Path) -> None:
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{finished}/report.html")
    widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
    assert len(widths) > 10
    assert min(widths) > 0
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert wrong == []
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    links = page.evaluate("[...document.links].map(link => document.querySelector(link.hash) !== null)")
    assert len(links) >= 6
    assert all(links)
    assert "<b>bold & 'quoted'" in page.inner_text("#data")
    assert page.locator("#data b").count() == 0


def test_two_processes_leave_the_same_analysis(finished: Path, nasty: Path, tmp_path: Path) -> None:
    flags = ("--data", str(nasty), *SMALL, *SHORT, "--tracker", "none", "--output")
    assert run_ranks(2, finetune_here, *flags, str(tmp_path / "two")) == [0, 0]
    assert json.loads((tmp_path / "two/summary.json").read_text())["world_size"] == 2
    one, two = (kept_predictions.read(folder / "predictions.parquet") for folder in (finished, tmp_path / "two"))
    assert one.ids == two.ids
    assert len(set(one.ids)) == 18
    assert np.allclose(one.probabilities, two.probabilities, atol=1e-4)
    page = (tmp_path / "two/report.html").read_text(encoding="utf-8")
    assert "--multi_gpu --num_processes 2" in page
    assert "Worst mistakes" in page
    (group,) = groups(read_runs([str(finished), str(tmp_path / "two")]))
    assert judged_alike(group)
    assert group.runs[1].metrics["top1"] == pytest.approx(group.runs[0].metrics["top1"])


def fail_on(rank: int, *flags: str) -> int:
    """The recipe, whose last evaluation raises on one rank."""

    def broken(*args: Any, **named: Any) -> Any:
        raise ValueError("planted")

    if int(os.environ.get("RANK", "0")) == rank:
        predicting._piece = broken
    return finetune_here(*flags)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_failure_on_one_process_fails_no_run(nasty: Path, tmp_path: Path, rank: int) -> None:
    flags = ("--data", str(nasty), *SMALL, *SHORT, "--tracker", "none", "--output", str(tmp_path / "run"))
    assert run_ranks(2, fail_on, rank, *flags) == [0, 0]
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"
    assert (tmp_path / "run/model/model.safetensors").exists()
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "analysis of the model&#39;s mistakes failed" in page
    assert "Worst mistakes" not in page


def ended(done: Finished, run: Path, has_report: bool) -> str:
    """What a run said that is done whatever became of its report."""
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
    assert (run / "report.html").exists() == has_report
    return done.stdout + done.stderr


def ending_by(number: signal.Signals) -> Callable[..., Any]:
    """The first exchange of an evaluation, at which this process gets a signal."""
    whole = predicting._piece

    def signalled(*args: Any) -> Any:
        os.kill(os.getpid(), number)
        return whole(*args)

    return signalled


@pytest.mark.parametrize("limit", [(), ("--max-steps", "2")], ids=["whole", "max-steps"])
def test_a_run_without_its_report_gets_it_later(
    nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetune: Run, limit: tuple[str, ...]
) -> None:
    """Killed in its analysis; then a page that can't be made; then complete: the run is done all the while."""
    run = tmp_path / "run"
    flags = ("--data", str(nasty), *SMALL, *SHORT, *limit, "--output", "run", "--tracker", "none")
    with monkeypatch.context() as patched:
        patched.setattr(predicting, "_piece", ending_by(signal.SIGKILL))
        assert finetune(*flags).returncode == -signal.SIGKILL
    assert json.loads((run / "summary.json").read_text())["status"] == "done"
    assert not (run / "report.html").exists()
    before = (run / "metrics.jsonl").read_text()
    with monkeypatch.context() as patched:
        patched.setattr(report, "page", lambda *args: 1 / 0)
        told = ended(finetune(*flags, "--resume", "auto"), run, has_report=False)
    assert "report.html could not be made: ZeroDivisionError" in told
    ended(finetune(*flags, "--resume", "auto"), run, has_report=True)
    assert (run / "metrics.jsonl").read_text() == before
    assert "Nothing left to do" in ended(finetune(*flags, "--resume", "auto"), run, has_report=True)


@pytest.mark.slow
def test_a_wish_to_stop_ends_the_analysis_not_the_run(
    nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetune: Run
) -> None:
    flags, run = ("--data", str(nasty), *SMALL, *SHORT, "--output", "run", "--tracker", "none"), tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(predicting, "_piece", ending_by(signal.SIGTERM))
        told = ended(finetune(*flags), run, has_report=False)
    assert "SIGTERM, in the analysis of its mistakes: report.html is left out" in told
    ended(finetune(*flags, "--resume", "auto"), run, has_report=True)


@pytest.mark.slow
def test_an_earlier_report_does_not_pass_for_that_of_a_longer_run(
    nasty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finetune: Run
) -> None:
    flags, run = ("--data", str(nasty), *SMALL, *SHORT, "--output", "run", "--tracker", "none"), tmp_path / "run"
    ended(finetune(*flags, "--max-steps", "2"), run, has_report=True)
    monkeypatch.setattr(report, "page", lambda *args: 1 / 0)
    ended(finetune(*flags, "--resume", "auto"), run, has_report=False)
