"""Every key of accelerate_configs/ reaches the processes, and torchrun gets what the file says."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.run as torchrun
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin, patch_environment
from torch.distributed.launcher.api import LaunchConfig

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
PLACE = ("--machine_rank", "1", "--main_process_ip", "first")  # known on the machines only
# Another value for each key, under which something else must be started.
OTHER = {
    "distributed_type": {"NO": "MULTI_GPU", "MULTI_GPU": "NO", "FSDP": "MULTI_GPU"},
    "num_machines": {1: 2, 2: 1},
    "num_processes": {1: 2, 2: 4, 8: 4, 16: 8},
    "use_cpu": {True: False},
    "mixed_precision": {"no": "bf16", "bf16": "no", "fp16": "no"},
    "main_process_port": {29500: 29777},
    "machine_rank": {0: 2},
    "rdzv_backend": {"c10d": "static"},
    "same_network": {True: False},
    "max_restarts": {3: 2},
    "fsdp_version": {2: 1},
    "fsdp_auto_wrap_policy": {"TRANSFORMER_BASED_WRAP": "NO_WRAP"},
    "fsdp_reshard_after_forward": {True: False},
    "fsdp_activation_checkpointing": {False: True},
    "fsdp_offload_params": {False: True},
    "fsdp_use_orig_params": {True: False},
}


class Started(Exception):
    """What would have been started: command or `LaunchConfig`, and the variables that it adds."""


def started(monkeypatch: pytest.MonkeyPatch, content: Mapping[str, Any], folder: Path, *more: str) -> dict[str, Any]:
    """What `accelerate launch` starts under this config."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(dict(content)))
    before = dict(os.environ)

    def simple(command: list[str], env: Mapping[str, str]) -> None:
        raise Started({"command": command, "environment": env})

    def several(arguments: Any) -> None:
        config, script, flags = torchrun.config_from_args(arguments)
        raise Started({"config": config, "command": [script, *flags], "environment": dict(os.environ)})

    monkeypatch.setattr(subprocess, "Popen", simple)
    monkeypatch.setattr(torchrun, "run", several)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), *more, "recipe.py", "--lr", "0.1"])
    with pytest.raises(Started) as caught:
        launch_command(arguments)
    found: dict[str, Any] = caught.value.args[0]
    found["environment"] = {k: v for k, v in found["environment"].items() if before.get(k) != v}
    return found


def comparable(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is random; under FSDP with the plugin that the processes make of their variables."""
    config: LaunchConfig | None = found.get("config")
    shown = {k: str(v) for k, v in vars(config).items() if k not in ("logs_specs", "run_id")} if config else {}
    environment = dict(found["environment"])
    if environment.pop("ACCELERATE_USE_FSDP", None):
        fsdp = {name: environment.pop(name) for name in list(environment) if name.startswith("FSDP_")}
        shown |= plugin(fsdp)
    return {**shown, "command": found["command"], **environment}


def plugin(variables: Mapping[str, str]) -> dict[str, str]:
    """Fields of the FSDP plugin; version 1 can't be made without a GPU."""
    with patch_environment(**variables):
        try:
            made = FullyShardedDataParallelPlugin()
        except RuntimeError as error:
            return {"error": str(error)}
        return {field.name: str(getattr(made, field.name)) for field in dataclasses.fields(made)}


def keys(content: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in content.items():
        yield from ((key, *rest) for rest in keys(value)) if isinstance(value, dict) else [(key,)]


def with_other(content: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """*content* with another value at *path*."""
    key, *rest = path
    value = with_other(content[key], tuple(rest)) if rest else OTHER[key][content[key]]  # type: ignore[index]
    return {**content, key: value}


def dead(monkeypatch: pytest.MonkeyPatch, content: Mapping[str, Any], folder: Path) -> list[str]:
    """Keys whose value changes nothing."""
    first = comparable(started(monkeypatch, content, folder, *PLACE))
    found = []
    for path in keys(content):
        if comparable(started(monkeypatch, with_other(content, path), folder, *PLACE)) == first:
            found.append(".".join(path))
    return found


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_key_is_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert dead(monkeypatch, content, tmp_path) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("rdzv_backend", "c10d"), ("same_network", True), ("machine_rank", 0)],
    ids=lambda value: str(value),
)
def test_a_dead_key_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, key: str, value: object) -> None:
    """The first two Accelerate ignores; the third is overridden by what each machine is told."""
    content = yaml.safe_load((ROOT / "accelerate_configs" / "several_machines.yaml").read_text()) | {key: value}
    assert dead(monkeypatch, content, tmp_path) == [key]


def test_a_dead_nested_key_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    content["fsdp_config"]["fsdp_use_orig_params"] = True
    assert dead(monkeypatch, content, tmp_path) == ["fsdp_config.fsdp_use_orig_params"]


def test_restarts_are_no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = yaml.safe_load((ROOT / "accelerate_configs" / "ddp_bf16.yaml").read_text()) | {"max_restarts": 3}
    with pytest.raises(ValueError, match="max_restarts"):
        started(monkeypatch, content, tmp_path)


def test_nothing_but_hardware() -> None:
    """Learning rates, batch sizes and clipping are the recipe's."""
    known = {"distributed_type", "num_machines", "num_processes", "use_cpu", "mixed_precision", "main_process_port"}
    for path in CONFIGS:
        assert yaml.safe_load(path.read_text()).keys() - {"fsdp_config"} <= known, path


# (processes a machine, machines, precision)
TORCHRUN = {
    "cpu_ddp": (2, 1, "no"),
    "cpu_several_machines": (1, 2, "no"),
    "ddp_bf16": (8, 1, "bf16"),
    "ddp_fp16": (8, 1, "fp16"),
    "several_machines": (8, 2, "bf16"),
    "fsdp2": (8, 1, "bf16"),
}
SIMPLE = {"cpu": ("True", "no"), "one_gpu": ("False", "bf16")}


def test_every_config_is_looked_at() -> None:
    assert {path.stem for path in CONFIGS} == TORCHRUN.keys() | SIMPLE.keys()


@pytest.mark.parametrize("name", TORCHRUN)
def test_torchrun_gets_what_the_file_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    processes, machines, precision = TORCHRUN[name]
    content = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    found = started(monkeypatch, content, tmp_path, *PLACE, "--max_restarts", "3")
    config: LaunchConfig = found["config"]
    assert (config.nproc_per_node, config.min_nodes, config.max_nodes) == (processes, machines, machines)
    assert (config.rdzv_backend, config.max_restarts) == ("static", 3)
    if machines > 1:
        assert (config.rdzv_endpoint, config.rdzv_configs["rank"]) == ("first:29500", 1)
    assert found["command"][-3:] == ["recipe.py", "--lr", "0.1"]
    assert found["environment"]["ACCELERATE_MIXED_PRECISION"] == precision


@pytest.mark.parametrize("name", SIMPLE)
def test_one_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    on_cpu, precision = SIMPLE[name]
    content = yaml.safe_load((ROOT / "accelerate_configs" / f"{name}.yaml").read_text())
    found = started(monkeypatch, content, tmp_path)
    assert "config" not in found
    assert found["environment"]["ACCELERATE_USE_CPU"] == on_cpu
    assert found["environment"]["ACCELERATE_MIXED_PRECISION"] == precision


def test_fsdp2_ignores_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Accelerate warns of what FSDP2 doesn't know."""
    content = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    found = started(monkeypatch, content, tmp_path)
    with caplog.at_level(logging.WARNING):
        made = plugin({k: v for k, v in found["environment"].items() if k.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))})
    assert made["fsdp_version"] == "2"
    assert [record.getMessage() for record in caplog.records if "FSDP2" in record.getMessage()] == []
