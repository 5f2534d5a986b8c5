"""What documents say exists: their commands are taken by the programs, their flags, files and links are there."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import re
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from documented import DOCUMENTS, LAUNCH, MODULE, PYTEST, RECIPE, ROOT, commands, joined, name_of

from launch.command_line import TARGETS, _parser, _split
from tuning.cli.command_line import parse_command
from tuning.flags import Flags

SUFFIXES = {"py", "json", "jsonl", "html", "png", "yaml", "parquet", "csv", "txt", "safetensors", "onnx", "pt2"}
NO_RUN_FLAGS = "recipes/compare.py"  # it takes folders alone
OF_OTHERS = {  # flags of other programs
    *("accelerate", "mixed_precision", "multi_gpu", "num_processes", "num_machines", "config_file", "max_restarts"),
    *("same_network", "cpu", "requeue", "rdzv_backend", "signal", "json", "strict"),
}


def parse_recipe(words: tuple[str, ...]) -> None:
    at = next(place for place, word in enumerate(words) if word.startswith("recipes/"))
    recipe, *argv = words[at:]
    if recipe != NO_RUN_FLAGS:
        parse_command(argv, recipe, "", ROOT / "recipes" / "presets")
    else:
        assert argv
    assert (ROOT / recipe).exists()


@pytest.mark.parametrize("words", commands(RECIPE), ids=name_of)
def test_recipes_take_the_commands(words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for flag, name in itertools.pairwise(words):
        if flag in ("--config", "--preset") and "/" in name:  # of a run that the reader has made
            Path(name).parent.mkdir(parents=True)
            Path(name).write_text("seed: 1\n", encoding="utf-8")
    parse_recipe(words)


@pytest.mark.parametrize("words", commands(LAUNCH), ids=name_of)
def test_launch_takes_the_commands(words: tuple[str, ...]) -> None:
    target, *rest = words[3:]  # after python -m launch
    assert target in TARGETS
    own, recipe = _split(rest)
    _parser(target).parse_args(own)
    if recipe:
        parse_recipe(tuple(recipe))


@pytest.mark.parametrize("words", commands(MODULE), ids=name_of)
def test_benchmarks_and_campaigns_take_the_commands(words: tuple[str, ...]) -> None:
    at = words.index("-m") + 1
    module = ROOT.joinpath(*words[at].split("."))
    file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    text = file.read_text(encoding="utf-8")
    unknown = [word for word in words[at:] if word.startswith("--") and f'add_argument("{word}"' not in text]
    assert unknown == []


@pytest.mark.parametrize("words", commands(PYTEST), ids=name_of)
def test_what_pytest_is_asked_for_is_there(words: tuple[str, ...]) -> None:
    taken = {"-m", "slow", "-n", "0"}
    assert [word for word in words[1:] if word not in taken and not (ROOT / word).exists()] == []


def test_the_extras_that_documents_install_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = [
        *DOCUMENTS,
        *(path for folder in ("tuning", "launch", "recipes") for path in (ROOT / folder).rglob("*.py")),
    ]
    named = {extra for path in sources for extra in re.findall(r"(?:-e '?\.|fine-tuning)\[(\w+)\]", joined(path))}
    assert {"demo", "test", "onnx", "sweep"} <= named <= {*extras}


EXAMPLES = [
    (document.name, code)
    for document in DOCUMENTS
    for code in re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.S)
    if "tuning." in code
]


@pytest.mark.parametrize(("document", "code"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_examples_in_python_run(document: str, code: str) -> None:
    exec(compile(code, document, "exec"), {})


INDEX = ROOT / "docs" / "README.md"


def test_every_page_and_every_recipe_is_in_the_index() -> None:
    linked = re.findall(r"\]\(([\w.-]+\.md)\)", INDEX.read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(path.name for path in INDEX.parent.glob("*.md") if path != INDEX)
    named = re.findall(r"`recipes/(\w+)\.py`", INDEX.read_text(encoding="utf-8"))
    assert sorted({*named}) == sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def known_flags() -> set[str]:
    ours = {f.name for group in dataclasses.fields(Flags) for f in dataclasses.fields(getattr(Flags(), group.name))}
    options = {option for target in TARGETS for option in _parser(target)._option_string_actions}
    theirs = {option.removeprefix("--") for option in options} | OF_OTHERS
    return {name.replace("-", "_") for name in ours | theirs}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_flags_and_files_that_are_named_exist(document: Path) -> None:
    text = joined(document)
    if document.name not in ("CHANGELOG.md",):  # it tells of what was
        programs = r"(?:tests\.benchmarks|tests\.faults|pip|pytest|ruff|git|sbatch|apt|srun|torchrun|wandb|-m slow)"
        ours = [line for line in text.split("\n") if not re.search(programs, line)]
        named = {
            flag
            for line in ours
            for code in re.findall(r"`([^`]*)`", line)
            for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", code)
        }
        assert {flag for flag in named if flag.replace("-", "_").removeprefix("no_") not in known_flags()} == set()
    paths = set(re.findall(r"`((?:tests|tuning|recipes|docs|launch|accelerate_configs)/[\w/.-]*\w)`", text))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    links = {link for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) if "://" not in link}
    assert {link for link in links if not (document.parent / link).exists()} == set()


MODULES: dict[str, list[str]] = {}
for path in (ROOT / "tuning").rglob("*.py"):
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    MODULES.setdefault(dotted.rpartition(".")[2], []).append(dotted)


def exists(name: str) -> bool:
    """A dotted name in the library, from `tuning` or from a module on: ``tuning.engine.Step``, ``engine.Step``."""
    first, *rest = name.removeprefix("tuning.").split(".")
    places = [
        module for module in MODULES.get(first, []) if not name.startswith("tuning.") or module == f"tuning.{first}"
    ]
    return any(_holds(importlib.import_module(module), rest) for module in places)


def _holds(found: object, names: list[str]) -> bool:
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            if isinstance(found, ModuleType):
                importlib.import_module(f"{found.__name__}.{name}")
        fields = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
        annotated = getattr(found, "__annotations__", {})
        if not hasattr(found, name):
            return name in fields or name in annotated
        found = getattr(found, name)
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_of_the_library_exist(document: Path) -> None:
    if document.name == "CHANGELOG.md":  # it tells of what was
        return
    codes = re.findall(r"`((?:\w+\.)+\w+)[`(]", document.read_text(encoding="utf-8"))
    ours = {name for name in codes if name.split(".")[0] in {"tuning", *MODULES}}
    files = {name for name in ours if name.rpartition(".")[2] in SUFFIXES}
    assert {name for name in ours - files if not exists(name)} == set()


def test_messages_of_troubleshooting_are_those_of_the_program() -> None:
    """First column, in backticks; a message is looked for in the sources, where it may be broken over two lines."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    said = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if " " in text]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tuning").rglob("*.py"))
    sources = re.sub(r'"\s+f?"', "", sources)
    assert len(said) > 15
    assert [text for text in said if text not in sources] == []
