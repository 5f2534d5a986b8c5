"""The commands that documents show, as lists of words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *(p for f in ("docs", "launch", "accelerate_configs") for p in (ROOT / f).rglob("*.md"))}
)
RECIPE = re.compile(r"(?<!-- )\b((?:accelerate launch|python)(?: --[^`\n]*?)? recipes/\w+\.py\b[^`\n]*)")
LAUNCH = re.compile(r"\b(python -m launch (?:local|slurm|kubernetes|sky)\b[^`\n]*)")
MODULE = re.compile(r"\b((?:python|torchrun\b[^`\n]*?) -m tests(?:\.\w+)+[^`\n]*?)(?=-->|[`\n])")
PYTEST = re.compile(r"(?:^|[`&] ?)(pytest\b[^`\n]*)", re.M)
PLACEHOLDERS = {
    " ...": "",
    "$seed": "1",
    "--seed S": "--seed 1",
    "--seed N": "--seed 1",
    "--machine-rank R": "--machine-rank 0",
    "benchmarks NAME": "benchmarks loader",
}


def joined(document: Path) -> str:
    """Its text without the breaks of long commands."""
    return re.sub(r"\s*\\\n\s*", " ", document.read_text(encoding="utf-8"))


def commands(pattern: re.Pattern[str]) -> list[tuple[str, ...]]:
    """Words of every command of a kind in all documents, each once."""
    return sorted({*_commands(pattern)})


def _commands(pattern: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    for document in DOCUMENTS:
        for match in pattern.finditer(joined(document)):
            text = match.group(1)
            for placeholder, value in PLACEHOLDERS.items():
                text = text.replace(placeholder, value)
            text = re.split(r" #|; done| \| | > ", text)[0]
            yield tuple(shlex.split(text))


def name_of(words: tuple[str, ...]) -> str:
    """Of a test of this command."""
    return " ".join(words)
