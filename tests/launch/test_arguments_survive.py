"""Spaces, quotes, newlines, dollars ...: what the recipe gets is what was typed, on every target."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import rendered
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch import kubernetes, local, sky, slurm, yaml_text
from launch.job import Job

NASTY = [
    "",
    " ",
    "a b",
    "'",
    '"',
    "\\",
    "\n",
    "a\nb\n",
    "$HOME",
    "$(HOME)",
    "$$",
    "`id`",
    ";",
    "&&",
    "|",
    "*",
    "~",
    "#",
]
NASTY += [
    "!",
    "{a,b}",
    "%s",
    "\t",
    "\r",
    "é",
    "猫 😀",
    "\x85",
    "\u2028",
    "\x7f",
    "--",
    "-",
    "=",
    "yes",
    "1e-3",
    "EOF",
    "\\n",
]
TEXT = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.lists(st.sampled_from(NASTY), max_size=4).map("".join),
)
EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("project")
    rendered.make_programs(folder)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def job(flags: list[str], value: str) -> Job:
    """Two machines of two processes each."""
    made = Job("recipes/find_lr.py", tuple(flags), name="job", nodes=2, processes=2, config="two.yaml")
    return replace(made, environment=(("VALUE", value),))


@EXAMPLES
@given(flags=st.lists(TEXT, max_size=5), value=TEXT)
def test_local(folder: Path, flags: list[str], value: str) -> None:
    for restarts in (0, 1):
        made = replace(job(flags, value), restarts=restarts)
        text, _ = local.render(made, local.Place(1, "first", 29500))
        called = rendered.run(["bash", "-c", text], folder, "recipes/find_lr.py")
        assert (called.recipe[1:], called.variables["VALUE"]) == (flags, value)
        assert called.option("--machine_rank") == "1"


@EXAMPLES
@given(flags=st.lists(TEXT, max_size=5), value=TEXT, seed=TEXT.filter(lambda text: "," not in text and text))
def test_slurm(folder: Path, flags: list[str], value: str, seed: str) -> None:
    (folder / "script").write_bytes(slurm.render(job(flags, value), slurm.Queue(tasks=((("x", seed),),)))[0].encode())
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job", "SLURM_JOB_NODELIST": "n", "SLURM_ARRAY_TASK_ID": "0"}
    called = rendered.run(["bash", "script"], folder, "recipes/find_lr.py", **variables)
    assert (called.recipe[1:], called.variables["VALUE"]) == ([*flags, f"--x={seed}"], value)
    assert called.returncode == 0


@EXAMPLES
@given(flags=st.lists(TEXT, max_size=5), value=TEXT)
def test_kubernetes(folder: Path, flags: list[str], value: str) -> None:
    text, _ = kubernetes.render(job(flags, value), kubernetes.Cluster("image"))
    trainer = list(yaml.safe_load_all(text))[-1]["spec"]["trainer"]
    variables = {one["name"]: expanded(one["value"]) for one in trainer["env"]}
    command = [expanded(word) for word in (*trainer["command"], *trainer["args"])]
    given_by_trainer = {"PET_NODE_RANK": "1", "PET_MASTER_ADDR": "first", "PET_MASTER_PORT": "29500"}
    called = rendered.run(command, folder, "recipes/find_lr.py", **given_by_trainer, **variables)
    assert (called.recipe[1:], called.variables["VALUE"]) == (flags, value)
    assert (called.option("--machine_rank"), called.option("--main_process_ip")) == ("1", "first")


def expanded(word: str) -> str:
    """What Kubernetes makes of a word: ``$(NAME)`` is replaced, ``$$`` is a dollar."""
    made, at = "", 0
    while at < len(word):
        if word[at : at + 2] == "$$":
            made, at = made + "$", at + 2
        elif word[at : at + 2] == "$(" and ")" in word[at:]:
            made, at = made + "REPLACED", word.index(")", at) + 1
        else:
            made, at = made + word[at], at + 1
    return made


@EXAMPLES
@given(flags=st.lists(TEXT, max_size=5), value=TEXT)
def test_sky(folder: Path, flags: list[str], value: str) -> None:
    task = yaml.safe_load(sky.render(job(flags, value), sky.Cloud("bucket"))[0])
    given_by_sky = {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    called = rendered.run(["bash", "-c", task["run"]], folder, "recipes/find_lr.py", **given_by_sky, **task["envs"])
    assert (called.recipe[1:], called.variables["VALUE"]) == (flags, value)
    assert (called.option("--machine_rank"), called.option("--main_process_ip")) == ("1", "10.0.0.1")


SCALARS = st.one_of(TEXT, st.integers(-10, 10**9), st.booleans())
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXT, TREES, max_size=4))
def test_yaml_reads_back_as_it_was(value: dict[str, yaml_text.Value]) -> None:
    assert yaml.safe_load(yaml_text.dump(value)) == (value or None)
