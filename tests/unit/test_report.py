"""``report.html`` and the pictures beside it: complete, bounded, and no name taken for markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pictures import noise
from sklearn.metrics import average_precision_score, precision_recall_curve, precision_recall_fscore_support

from tuning.analysis import drawing, mistakes, overview, report
from tuning.analysis.card import CLASS_ROWS, class_rows, data_facts, sizes
from tuning.analysis.charts import charts
from tuning.analysis.overview import CASES, CLASSES_DRAWN, CURVE_POINTS, CURVES_DRAWN, PAIRS, Overview, look_at
from tuning.data.sources import Data
from tuning.data.tables import picture_dataset
from tuning.tracking.pages import LARGEST_PICTURE, plot_tag
from tuning.tracking.run_folder import RunFolder
from tuning.tracking.summary import make_summary

NASTY = ("<script>alert(1)</script>", "a & b", 'it\'s "quoted"', "$x_1$ {{ 7*7 }} {% raw %}", "名前" * 60)
TOLD = report.Told(
    model="<i>model</i>",
    plan=[("data", "photos & <b>more</b>")],
    headings=("stage", "open"),
    stages=[("<u>head</u>", "head")],
    source="photos",
    machine=[("processes", "2 processes on cpu, fp32")],
    typed=["finetune.py", "--data", "my <photos>"],
    launch="accelerate launch",
)


def made(tmp_path: Path, classes: tuple[str, ...], images: int = 300, seed: int = 0) -> tuple[Data, Overview]:
    """Data whose pictures are few files named again and again, and what a mediocre model says of it."""
    files = [tmp_path / f"<img src=x>{number}.jpg" for number in range(4)]
    for number, file in enumerate(files):
        noise(60, 40, number).save(file)
    files[3].write_bytes(b"no picture")
    generator = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(len(classes)), generator.integers(0, len(classes), images - len(classes))])
    table = picture_dataset([str(files[i % 4]) for i in range(images)], labels, classes)
    data = Data("photos", table, table, classes, ("a <note>",), str(tmp_path))
    true = np.where(generator.random(images) < 0.1, (labels + 1) % len(classes), labels)
    logits = generator.normal(size=(images, len(classes))) + 2.5 * np.eye(len(classes))[true]
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    names = [f"{file.name} {number}" for number, file in enumerate([files[i % 4] for i in range(images)])]
    return data, look_at(probabilities, labels, np.arange(images), names, data)


def written(tmp_path: Path, data: Data, seen: Overview | None, problem: str = "") -> str:
    folder = RunFolder(tmp_path / "run")
    folder.create("data: photos\nmodel: '<i>'\n")
    evaluation = {"eval/top1": 0.5, "eval/balanced_accuracy": 0.4, "eval/loss": 1.5, "eval/images": 300}
    lines = [{"step": step, "epoch": step / 10, "stage": 0, **evaluation} for step in range(0, 1000, 10)]
    folder.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if seen:
        drawing.draw_all(seen, folder.plots)
    facts = {"seconds": 12.0, "images_per_second": 90.0, "world_size": 1, "unreadable": {"train": 1, "eval": 0}}
    report.write(folder, make_summary(folder, ("eval",), "balanced_accuracy", facts), TOLD, data, seen, problem)
    return folder.report.read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects tags and what they load; complains about what is not closed."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_takes_no_name_for_markup(tmp_path: Path) -> None:
    data, seen = made(tmp_path, NASTY)
    page = written(tmp_path, data, seen)
    checked = Checker(page)
    assert checked.open == []
    assert checked.tags.isdisjoint({"script", "link", "iframe", "i", "u", "object"})
    assert all(load.startswith(("data:image/", "#")) for load in checked.loads)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page, "a name is no template"
    assert not re.search(r"url\(|@import", page)
    assert page.count("data:image/jpeg") + page.count('class="none"') == len(seen.worst) + len(seen.suspects)
    assert page.count("data:image/png") == 2, "confusion matrix and precision over recall"
    assert (tmp_path / "run/plots/mistakes.png").exists()
    assert 'class="none"' in page, "a picture that can't be read"
    assert '<th class="n">F1</th></tr>' in page
    assert f'<td class="n">{100 * seen.counts.f1(0):.1f} %</td></tr>' in page
    for part in (
        "&lt;i&gt;model",
        "a &lt;note&gt;",
        "Worst mistakes",
        "Likely label errors",
        "config.yaml",
        "--config",
    ):
        assert part in page, part
    assert "my &lt;photos&gt;" in page
    assert "1 of train" in page


def test_precision_recall_and_f1_of_every_class(tmp_path: Path) -> None:
    """Against scikit-learn; the same in W&B's table and in the rows of the page."""
    data, seen = made(tmp_path, tuple("abcdef"))
    labels = np.repeat(np.arange(6), seen.counts.images)
    hits = zip(seen.counts.images, seen.counts.hits, strict=True)
    taken = np.concatenate([[k] * hit + [(k + 1) % 6] * (count - hit) for k, (count, hit) in enumerate(hits)])
    counts = mistakes.per_class(labels, taken, 7)
    wanted = precision_recall_fscore_support(labels, taken, labels=range(6))
    found = [(counts.precision(k), counts.recall(k), counts.f1(k), counts.images[k]) for k in range(6)]
    assert np.array(found) == pytest.approx(np.array(wanted).T)
    assert (counts.precision(6), counts.recall(6), counts.f1(6)) == (None, None, None)
    (table,) = [one for one in charts(seen) if one.name == "analysis/classes"]
    assert [row[0] for row in table.rows] == list("abcdef")
    assert table.rows[0][4] == seen.counts.f1(0) == class_rows(data, seen.counts)[0].f1


def test_a_thousand_classes_stay_readable(tmp_path: Path) -> None:
    data, seen = made(tmp_path, tuple(f"class {'x' * 200} {n}" for n in range(1000)), images=3000)
    assert len(seen.pairs) == PAIRS
    assert seen.pair_count > PAIRS
    assert 2 <= len(seen.drawn) <= CLASSES_DRAWN
    assert seen.confusion.shape == (len(seen.drawn) + 1,) * 2
    assert (len(seen.worst), len(seen.suspects), len(seen.curves)) == (CASES, CASES, CURVES_DRAWN)
    page = written(tmp_path, data, seen)
    assert len(page) < 1_500_000
    assert page.count("<tr>") < CLASS_ROWS + PAIRS + report.EVALUATION_ROWS + 40
    assert "The 30 classes of the lowest recall, of 1,000" in page
    assert f"The last {report.EVALUATION_ROWS} of 100" in page
    assert page.count("data:image/png") == 2
    assert "x" * 200 not in page, "long names are cut"


def test_a_report_without_an_analysis_says_why(tmp_path: Path) -> None:
    data, _ = made(tmp_path, ("a", "b"))
    page = written(tmp_path, data, None, "The analysis failed: <b>disk</b>.")
    assert "The analysis failed: &lt;b&gt;disk" in page
    assert "Worst mistakes" not in page
    assert "Classes" in page


def test_a_model_without_mistakes(tmp_path: Path) -> None:
    data, _ = made(tmp_path, ("a", "b"))
    labels = np.array(data.eval["label"])
    certain = np.eye(2, dtype=np.float32)[labels]
    seen = look_at(certain, labels, np.arange(300), [str(n) for n in range(300)], data)
    assert (seen.wrong, seen.worst, seen.suspects, seen.pairs) == (0, (), (), ())
    page = written(tmp_path, data, seen)
    assert "There are none" in page
    assert "None was found" in page
    assert not (tmp_path / "run/plots/mistakes.png").exists()
    assert [chart.name for chart in charts(seen)] == [
        *("analysis/confusion", "analysis/precision_recall", "analysis/classes")
    ]


def test_one_class_among_the_evaluated(tmp_path: Path) -> None:
    """--limit-eval can leave a single class: no curve has both kinds of images."""
    data, _ = made(tmp_path, ("a", "b"))
    labels, rows = np.zeros(5, np.int64), np.flatnonzero(np.array(data.eval["label"]) == 0)[:5]
    probabilities = np.array([[0.4, 0.6], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.9, 0.1]], np.float32)
    seen = look_at(probabilities, labels, rows, ["x"] * 5, data)
    assert seen.curves == ()
    assert seen.wrong == 1
    assert "analysis/precision_recall" not in {chart.name for chart in charts(seen)}
    assert "Worst mistakes" in written(tmp_path, data, seen)


@pytest.mark.parametrize("share", [0.5, 0.002])
def test_the_precision_recall_curve_is_scikit_learns(share: float) -> None:
    generator = np.random.default_rng(3)
    belongs = generator.random(5000) < share
    scores = np.clip(generator.normal(0.3, 0.1, 5000) + 0.2 * belongs, 0, 1).astype(np.float32)
    made = overview.curve(scores, belongs, 0)
    assert made.area == pytest.approx(average_precision_score(belongs, scores), abs=1e-5)
    precision, recall, _ = precision_recall_curve(belongs, scores)
    points = {(round(float(r), 5), round(float(p), 5)) for r, p in zip(recall, precision, strict=True)}
    assert {(round(r, 5), round(p, 5)) for r, p in zip(made.recall, made.precision, strict=True)} <= points
    assert len(made.recall) <= CURVE_POINTS
    assert list(made.recall) == sorted(made.recall)
    assert made.recall[-1] == 1


def test_a_picture_that_is_missing_or_too_large_is_left_out(tmp_path: Path) -> None:
    assert plot_tag(tmp_path / "none.png", "") is None
    (tmp_path / "large.png").write_bytes(b"x" * (LARGEST_PICTURE + 1))
    assert plot_tag(tmp_path / "large.png", "") is None


def test_tables_for_the_tracker(tmp_path: Path) -> None:
    data, seen = made(tmp_path, NASTY)
    made_charts = {chart.name: chart for chart in charts(seen)}
    assert set(made_charts) == {
        *("analysis/mistakes", "analysis/label_errors", "analysis/confused_pairs"),
        *("analysis/confusion", "analysis/precision_recall", "analysis/classes"),
    }
    for chart in made_charts.values():
        assert {len(row) for row in chart.rows} == {len(chart.columns)}
        assert set(chart.fields.values()) <= set(chart.columns)
    assert len(made_charts["analysis/mistakes"].rows) == len(seen.worst) <= CASES
    assert sum(row[2] for row in made_charts["analysis/confusion"].rows) == 300
    assert len(data.classes) ** 2 == len(made_charts["analysis/confusion"].rows)
    assert charts(None) == []


def test_the_data_card(tmp_path: Path) -> None:
    data, _ = made(tmp_path, ("a", "b"))
    facts = dict(data_facts(data, "photos"))
    assert facts["split"] == "300 training and 300 evaluation images"
    assert facts["sizes, train"].startswith("width 60, height 40 pixels, median ")
    assert facts["sizes, train"].endswith("(of 200 of 300)")
    assert facts["note"] == "a <note>"
    broken = picture_dataset([str(tmp_path / "gone.jpg")], [0], ("a", "b"))
    assert sizes(broken) == "unknown: no picture could be read"
