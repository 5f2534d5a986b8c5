"""What a check leaves behind: a list for programs, a page that stands alone, a verdict."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from pictures import noise

from tuning.data.sources import Data
from tuning.data.tables import picture_dataset
from tuning.errors import UserError
from tuning.preflight import report
from tuning.preflight.findings import KINDS, Finding, in_order


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """One picture that can be read and one that can't."""
    good, bad = tmp_path / "<b>&.png", tmp_path / "bad.png"
    noise().save(good)
    bad.write_bytes(b"broken")
    table = picture_dataset([str(good), str(bad)], [0, 1], ("<i>", "x"))
    return Data("photos", table, table, ("<i>", "x"), ())


def written(data: Data, folder: Path, findings: list[Finding]) -> str:
    report.prepare(folder)
    report.write(folder, findings, {"loss": math.nan, "stages": [{"rate": math.inf}]}, data)
    return (folder / "check.html").read_text(encoding="utf-8")


def found(data: Data) -> list[Finding]:
    paths = [row["image"]["path"] for row in data.train]
    return [
        Finding("unreadable", "error", "not a picture", paths[1], "train", 1, "x"),
        Finding("leak", "error", "the same bytes", paths[0], "eval", 0, "<i>", ("train: other",)),
        Finding("data", "note", "a sentence with <tags>"),
    ]


def test_the_list_for_programs(data: Data, tmp_path: Path) -> None:
    written(data, tmp_path / "out", found(data))
    listed = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert [(f["path"], f["kind"], f["severity"]) for f in listed] == [
        (str(tmp_path / "bad.png"), "unreadable", "error"),
        (str(tmp_path / "<b>&.png"), "leak", "error"),
        ("", "data", "note"),
    ]
    assert listed[1]["others"] == ["train: other"]

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is not JSON")

    facts = json.loads((tmp_path / "out" / "check.json").read_text(), parse_constant=refuse)
    assert facts == {"loss": "nan", "stages": [{"rate": "inf"}]}


def test_the_page_stands_alone_and_takes_no_name_for_markup(data: Data, tmp_path: Path) -> None:
    page = written(data, tmp_path / "out", found(data))
    assert all(load.startswith(("#", "data:")) for load in re.findall(r"(?:src|href)=[\"']?([^\"'> ]*)", page))
    assert page.count('src="data:image/jpeg;base64,') == 1, "the one picture that can be read"
    assert page.count('class="none"') == 1
    assert "&lt;b&gt;&amp;.png" in page
    assert "&lt;tags&gt;" in page
    assert not {"<b>&", "<i>", "<tags>"} & set(re.findall(r"<b>&|<i>|<tags>", page))


def test_the_page_is_bounded(data: Data, tmp_path: Path) -> None:
    page = written(data, tmp_path / "out", found(data)[1:2] * 500)
    assert page.count("<figure>") == report.PICTURED
    assert f"and {500 - report.PICTURED} more" in page


def test_examples_and_verdict(data: Data) -> None:
    findings = found(data)[:1] * 5 + found(data)[2:]
    lines = list(report.examples(findings))
    assert lines[3] == "error: unreadable: and 2 more"
    assert lines[-1] == "note: data: a sentence with <tags>"
    assert len(lines) == 5
    assert report.verdict(findings) == "FAIL: 5 errors, 0 warnings, 1 notes. Repair the errors first."
    assert report.verdict(findings[-1:]) == "PASS: 0 errors, 0 warnings, 1 notes."
    assert report.table(findings).row_count == 2


def test_findings_are_in_order_of_severity() -> None:
    found = [Finding("data", "note", ""), Finding("tiny", "warning", ""), Finding("leak", "error", "", row=3)]
    found += [Finding("leak", "error", "", split="train", row=2), Finding("unreadable", "error", "")]
    order = [(f.kind, f.row) for f in in_order(found)]
    assert order == [("unreadable", None), ("leak", 2), ("leak", 3), ("tiny", None), ("data", None)]
    assert all(KINDS.values())


def test_an_earlier_check_does_not_pass_for_this_one(data: Data, tmp_path: Path) -> None:
    written(data, tmp_path, found(data))
    (tmp_path / "config.yaml").write_text("of a run")
    report.prepare(tmp_path)
    assert not list(tmp_path.glob("check.*")) + list(tmp_path.glob("findings.*"))
    assert (tmp_path / "config.yaml").exists()


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        report.prepare(tmp_path / "out")


def test_the_manual_names_every_kind() -> None:
    manual = (Path(__file__).parents[2] / "docs" / "check.md").read_text(encoding="utf-8")
    assert [kind for kind in KINDS if f"`{kind}`" not in manual] == []
