"""Search spaces: those that are shipped work, W&B's own code takes them, and what can't be searched is refused."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tuning.cli.command_line import parse_command
from tuning.errors import UserError
from tuning.flags import Flags
from tuning.searching.commands import Trials, as_flags, check_edges, edges, launcher_words, whose
from tuning.searching.space_files import read_space
from tuning.searching.spaces import Choice, Range, Space, Stopper, typed_names

ROOT = Path(__file__).parents[2]
SPACES = ROOT / "recipes" / "sweeps"
NAMES = sorted(path.stem for path in SPACES.glob("*.yaml"))
PROGRAM = ROOT / "recipes" / "finetune.py"


def read(tmp_path: Path, **changes: Any) -> Space:
    """A space from a file of its own; None removes a key."""
    content = {
        "program": "recipes/finetune.py",
        "method": "random",
        "metric": {"name": "eval/top1", "goal": "maximize"},
        "parameters": {"lr": {"values": [0.1, 0.2]}},
        **changes,
    }
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return read_space(str(path), SPACES)


def trials(space: Space, tmp_path: Path, launcher: str = "") -> Trials:
    config = tmp_path / "config.yaml"
    config.write_text("data: photos\n")
    return Trials(space, PROGRAM, config, launcher_words(launcher, space))


def test_there_is_a_space_for_every_family() -> None:
    assert NAMES == ["convnet", "convnext", "hierarchical", "linear-probe", "mobile", "vit"]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_values_work_in_the_parser_of_the_recipe(name: str, tmp_path: Path) -> None:
    """One flag at a time; all combinations are among the slow tests."""
    space = read_space(name, SPACES)
    made = trials(space, tmp_path)
    assert len(space.searched) >= 3
    for values in edges(space):
        command = made.parsed(values)
        given = {key: value for group in vars(command.flags).values() for key, value in vars(group).items()}
        assert {key: given[key] for key in values} == values
        assert given["model"] == space.fixed["model"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_combination_of_the_edges_works(name: str, tmp_path: Path) -> None:
    space = read_space(name, SPACES)
    made = trials(space, tmp_path)
    sides = [parameter.edges for parameter in space.searched.values()]
    for values in itertools.product(*sides):
        made.parsed(dict(zip(space.searched, values, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_models_are_timms_with_weights(name: str) -> None:
    timm = importlib.import_module("timm")
    space = read_space(name, SPACES)
    model = space.fixed["model"]
    assert model in timm.list_models(pretrained=True)
    if "drop_path_rate" in space.parameters:
        torch = importlib.import_module("torch")
        with torch.device("meta"):
            timm.create_model(model, num_classes=3, drop_path_rate=0.1)


def given_by_server(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {"value": value} for key, value in {**space.fixed, **values}.items()}


@pytest.mark.parametrize("name", NAMES)
def test_wandbs_agent_makes_the_same_flags(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent's own code expands the command: what it would start is what the parser takes, and the local search."""
    monkeypatch.chdir(tmp_path)
    for variable, value in (("WANDB_DIR", str(tmp_path)), ("WANDB_SWEEP_ID", "abc"), ("DATA", "photos")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WANDB_RUN_ID", "")  # the agent sets these two: so that they are put back
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", "")
    agents = importlib.import_module("wandb.wandb_agent")
    started: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    monkeypatch.setattr(agents, "AgentProcess", Process)
    space = read_space(name, SPACES)
    values = edges(space)[-1]
    agent = agents.Agent(api=None, queue=None, sweep_id="abc")
    content = yaml.safe_load((SPACES / f"{name}.yaml").read_text())
    agent._sweep_command = content["command"]
    agent._command_run({"run_id": "r1", "program": content["program"], "args": given_by_server(space, values)})
    (words,) = started
    assert words[:4] == ["/usr/bin/env", "accelerate", "launch", "recipes/finetune.py"]
    command = parse_command(words[4:], "recipes/finetune.py", "", ROOT / "recipes" / "presets")
    assert command.config == trials(space, tmp_path).parsed(values).config


@pytest.mark.parametrize("name", NAMES)
def test_wandbs_client_takes_the_file(name: str) -> None:
    """What `wandb sweep` does before it asks the server; ranges must be numbers to YAML (1e-5 is a text to it)."""
    utils = importlib.import_module("wandb.sdk.launch.sweeps.utils")
    api = importlib.import_module("wandb.apis.public.sweeps")
    content = utils.load_sweep_config(str(SPACES / f"{name}.yaml"))
    filled = api._validate_config_and_fill_distribution(content)
    assert filled["parameters"].keys() == content["parameters"].keys()
    for parameter in content["parameters"].values():
        assert all(isinstance(parameter[bound], int | float) for bound in ("min", "max") if bound in parameter)


def test_ranges_and_values(tmp_path: Path) -> None:
    listed = {
        "lr": {"distribution": "log_uniform_values", "min": "1e-5", "max": 0.1},
        "epochs": {"min": 2, "max": 9},
        "weight_decay": {"min": 0.0, "max": 0.5},
        "ema-decay": {"values": [None, 0.99]},
        "label_smoothing": {"distribution": "q_uniform", "min": 0, "max": 0.2, "q": 0.1},
        "augment": {"value": "none"},
    }
    space = read(tmp_path, parameters=listed, run_cap=7, early_terminate={"type": "hyperband", "min_iter": 2})
    assert space.parameters == {
        "lr": Range(1e-5, 0.1, log=True),
        "epochs": Range(2, 9),
        "weight_decay": Range(0.0, 0.5),
        "ema_decay": Choice((None, 0.99)),
        "label_smoothing": Range(0.0, 0.2, step=0.1),
        "augment": Choice(("none",)),
    }
    assert (space.fixed, space.run_cap, space.stopper) == ({"augment": "none"}, 7, Stopper("hyperband", 2, 3))
    assert [type(edge) for edge in space.parameters["epochs"].edges] == [int, int]
    assert (space.metric, space.best_by) == ("eval/top1", "top1")
    assert space.without({"lr", "augment"}).parameters.keys() == {*space.parameters} - {"lr", "augment"}
    with pytest.raises(UserError, match="nothing is left to search"):
        space.without(typed_names(["--lr=1", "--epochs", "3", "--weight-decay", "0", "--ema_decay", "1"])).without(
            ["label_smoothing"]
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"methud": "grid"}, "Perhaps you meant 'method'"),
        ({"method": "gird"}, "Perhaps you meant 'grid'"),
        ({"method": None}, "method is None"),
        ({"program": "train.py"}, "program is 'train.py'"),
        ({"metric": None}, "metric: expected"),
        ({"metric": {"name": "eval/top", "goal": "maximize"}}, "Perhaps you meant 'eval/top1'"),
        ({"metric": {"name": "eval/loss", "goal": "maximize"}}, "must be minimize"),
        ({"metric": {"name": "eval/top1", "goal": "maximize", "target": 1}}, "'target'"),
        ({"parameters": {}}, "parameters: expected"),
        ({"parameters": {"learning_rate": {"value": 1}}}, "there is no such flag"),
        ({"parameters": {"layer_decai": {"value": 1}}}, "Perhaps you meant 'layer_decay'"),
        ({"parameters": {"output": {"value": "x"}}}, "there is no such flag to search"),
        ({"parameters": {"lr": {"mim": 1, "max": 2}}}, "Perhaps you meant 'min'"),
        ({"parameters": {"lr": {"min": 1.0}}}, "give one of value, values, or min with max"),
        ({"parameters": {"lr": {"value": 1, "values": [1]}}}, "give one of value"),
        ({"parameters": {"lr": {"min": 0.2, "max": 0.1}}}, "not below max"),
        ({"parameters": {"lr": {"min": 0, "max": 0.5}}}, "both bounds as whole numbers"),
        ({"parameters": {"lr": {"min": "low", "max": 0.1}}}, "min is 'low'"),
        ({"parameters": {"lr": {"min": 0.0, "max": 0.1, "distribution": "log_uniform_values"}}}, "no logarithm"),
        ({"parameters": {"lr": {"min": -3, "max": -1, "distribution": "log_uniform"}}}, "'log_uniform' is none of"),
        ({"parameters": {"lr": {"mu": 0, "sigma": 1, "distribution": "normal"}}}, "no use for the key 'mu'"),
        ({"parameters": {"lr": {"values": [1], "distribution": "uniform"}}}, "does not go with values"),
        ({"parameters": {"lr": {"min": 0.1, "max": 0.2, "q": 0.1}}}, "q goes with"),
        ({"parameters": {"lr": {"values": []}}}, "values is []"),
        ({"parameters": {"lr": {"values": [[1]]}}}, "values is [[1]]"),
        ({"method": "grid", "parameters": {"lr": {"min": 0.1, "max": 0.2}}}, "a grid needs values"),
        ({"command": ["python", "${program}"]}, "once ${args}"),
        ({"command": ["python", "${args}"]}, "needs ${program} once"),
        ({"command": ["${program}", "${args}", "${args_json}"]}, "${args_json}"),
        ({"command": "accelerate launch"}, "give a list of words"),
        ({"early_terminate": {"type": "hyperbnd", "min_iter": 1}}, "Perhaps you meant 'hyperband'"),
        ({"early_terminate": {"type": "hyperband"}}, "give min_iter"),
        ({"early_terminate": {"type": "hyperband", "max_iter": 9}}, "Perhaps you meant 'min_iter'"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 2, "eta": 1}}, "an eta from 2"),
        ({"early_terminate": {"type": "median", "min_iter": 0}}, "min_iter is 0"),
        ({"run_cap": 0}, "run_cap is 0"),
    ],
)
def test_what_can_not_be_searched_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, **changes)
    assert reason in str(refused.value)
    assert "space.yaml" in str(refused.value)


def test_spaces_are_found_by_name_or_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Perhaps you meant 'convnet'.* Known: convnet, "):
        read_space("covnet", SPACES)
    with pytest.raises(UserError, match="there is no such file"):
        read_space(str(tmp_path / "none.yaml"), SPACES)


def test_a_value_that_can_not_work_is_found_before_anything_runs(tmp_path: Path) -> None:
    space = read(tmp_path, parameters={"lr": {"values": [0.1, -1.0]}, "epochs": {"min": 1, "max": 3}})
    with pytest.raises(UserError, match=r"space.yaml: --epochs=1 --lr=-1.0 can't work: --lr is -1.0; give auto or"):
        check_edges(trials(space, tmp_path), "data: photos\n")
    own = read(tmp_path, parameters={"lr": {"values": [0.1, 0.2]}})
    with pytest.raises(UserError, match="the stages listed in the preset set that themselves"):
        check_edges(trials(own, tmp_path), "data: photos\nstages: [{open: head, epochs: 1, lr: 0.1}]\n")


def test_the_words_of_a_trial(tmp_path: Path) -> None:
    command = ["${env}", "accelerate", "launch", "--cpu", "${program}", "--seed=3", "--data=${envvar:X}"]
    parameters = {"lr": {"values": [0.1, 0.2]}, "cache_features": {"value": True}, "ema_decay": {"value": None}}
    space = read(tmp_path, parameters=parameters, command=[*command, "${args_no_boolean_flags}"])
    made = trials(space, tmp_path, launcher="--num_processes 2 --main_process_port '0'")
    words = made.words({"lr": 0.2}, "--output", "a b")
    assert words[1:7] == ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port"]
    assert words[7:] == [
        *("0", str(PROGRAM), "--config", str(tmp_path / "config.yaml"), "--output", "a b", "--seed=3"),
        *("--cache_features", "--ema_decay=None", "--lr=0.2"),
    ]
    flags = made.parsed({"lr": 0.2}).flags
    assert (flags.run.seed, flags.staging.cache_features, flags.data.data) == (3, True, "photos")
    plain = read(tmp_path, command=["${interpreter}", "${program}", "${args}"])
    assert trials(plain, tmp_path).words({"lr": 0.1})[1:4] == [str(PROGRAM), "--config", str(tmp_path / "config.yaml")]
    with pytest.raises(UserError, match="does not begin with accelerate launch"):
        launcher_words("--num_processes 2", plain)
    with pytest.raises(UserError, match="No closing quotation"):
        launcher_words("'2", space)


@pytest.mark.parametrize("macro", ["args", "args_no_boolean_flags"])
def test_flags_are_written_as_wandb_writes_them(macro: str) -> None:
    utils = importlib.import_module("wandb.sdk.launch.sweeps.utils")
    values = {"lr": 1e-05, "cache_features": True, "x": False, "ema_decay": None, "augment": "light", "epochs": 3}
    theirs = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    assert as_flags(values, f"${{{macro}}}") == theirs[macro]


def test_whose_evaluation_counts(tmp_path: Path) -> None:
    space = read(tmp_path, parameters={"ema_decay": {"values": [None, 0.9]}})
    made = trials(space, tmp_path)
    assert [whose(made.parsed({"ema_decay": decay})) for decay in (None, 0.9)] == ["eval", "eval_ema"]
    (tmp_path / "config.yaml").write_text("data: photos\nbest_of: raw\n")
    assert whose(made.parsed({"ema_decay": 0.9})) == "eval"


def test_typed_names() -> None:
    argv = ["--lr", "1", "--batch-size=3", "--no-cache-features", "--launcher", "-x", "word"]
    assert typed_names(argv) == {"lr", "batch_size", "cache_features", "launcher"}
    assert Flags().sweep.trials is None
