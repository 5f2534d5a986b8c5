"""Faults of the disk, the pictures, the numbers and the other process: what a run says, keeps and goes on from."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.faults import sabotage
from tests.faults.attempts import Ranks, attempt
from tests.faults.campaign import Campaign, Case
from tests.faults.comparison import checkpoints, differences, is_complete, logged_steps, newest_complete, records
from tuning.data.sampling import TrainOrder, step_seed
from tuning.data.sources import open_data
from tuning.errors import UserError
from tuning.flags import DataFlags
from tuning.safety import manifest
from tuning.sizes import BatchPlan

pytestmark = pytest.mark.slow

KEEP_ALL = ("--keep", "20")
DAMAGES = ("flipped", "truncated", "deleted")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def whole(campaign: Campaign) -> Path:
    """A run on one process with a checkpoint every other step, all of them kept."""
    folder = campaign.folder / "whole"
    ended = attempt(folder, (*campaign.flags("plain"), *KEEP_ALL))
    assert ended.codes == [0], ended.stderr
    return folder / "run"


# ---- the disk


@pytest.fixture
def disk() -> Iterator[Callable[[Path, int], None]]:
    """``disk(folder, kilobytes)`` mounts a file system of its own on *folder*, or gives it another size."""
    mounted: list[Path] = []

    def mount(folder: Path, kilobytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={kilobytes}k" + (",remount" if folder in mounted else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a file system needs root")
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def kilobytes(*folders: Path) -> int:
    """Room that files take on a tmpfs: whole pages."""
    sizes = [path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // 4096) * 4 for size in sizes)


def room_for(whole: Path, complete: int) -> int:
    """Kilobytes that hold the first *complete* checkpoints of the run *whole* and half of the next one."""
    listed = checkpoints(whole)
    return kilobytes(*listed[:complete]) + kilobytes(listed[complete]) // 2 + 60


def test_full_disk_is_said_and_the_run_goes_on(
    campaign: Campaign, whole: Path, disk: Callable[[Path, int], None], tmp_path: Path
) -> None:
    disk(tmp_path / "run", room_for(whole, 2))
    ended = attempt(tmp_path, (*campaign.flags("plain"), *KEEP_ALL))
    assert ended.codes == [0], ended.stderr
    third = checkpoints(whole)[2].name
    assert re.search(rf"{third} could not be written \(.*[Nn]o space", ended.stderr), ended.stderr
    assert "Traceback" not in ended.stderr
    assert [path.name for path in checkpoints(tmp_path / "run")][:2] == [path.name for path in checkpoints(whole)][:2]
    assert all(is_complete(path) for path in checkpoints(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("*.part*"))
    assert records(tmp_path / "run") == records(whole)
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"
    model = tmp_path / "run/model/model.safetensors"
    assert model.exists() or "best weights could not be written" in ended.stderr


def test_full_disk_ends_the_run_by_flag_and_it_goes_on_with_more_room(
    campaign: Campaign, whole: Path, disk: Callable[[Path, int], None], tmp_path: Path
) -> None:
    flags = (*campaign.flags("plain"), *KEEP_ALL, "--save-errors", "stop")
    disk(tmp_path / "run", room_for(whole, 2))
    ended = attempt(tmp_path, flags)
    assert ended.codes == [2], ended.stderr
    assert "Traceback" not in ended.stderr
    assert re.search("[Nn]o space", ended.stderr)
    assert "--resume auto" in ended.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"
    assert newest_complete(tmp_path / "run") == int(checkpoints(whole)[1].name.removeprefix("step-"))
    disk(tmp_path / "run", 2 * kilobytes(whole) + 1000)
    again = attempt(tmp_path, flags)
    assert again.codes == [0], again.stderr
    assert differences(tmp_path / "run", whole) == []


@pytest.mark.parametrize("blocks", [0, 8, 100])
def test_disk_that_is_full_from_the_start_is_said(
    campaign: Campaign, disk: Callable[[Path, int], None], tmp_path: Path, blocks: int
) -> None:
    """Room for nothing, for the config and few lines, for no checkpoint: one message, never a traceback."""
    disk(tmp_path / "run", 200)
    with (tmp_path / "run/other").open("wb") as other:
        other.write(bytes((200 - 4 * blocks) * 1024 if blocks < 50 else 0))
    ended = attempt(tmp_path, campaign.flags("plain"))
    assert "Traceback" not in ended.stderr, ended.stderr
    assert re.search("[Nn]o space", ended.stderr)
    assert ended.codes in ([0], [2])


def test_checkpoints_folder_that_becomes_read_only(
    campaign: Campaign, whole: Path, disk: Callable[[Path, int], None], tmp_path: Path
) -> None:
    folder = tmp_path / "run/checkpoints"
    disk(folder, 100_000)

    def strike(ranks: Ranks) -> None:
        assert ranks.wait_for(lambda: newest_complete(tmp_path / "run") is not None)
        command = ["mount", "-o", "remount,ro", str(folder)]
        assert ranks.wait_for(lambda: subprocess.run(command, capture_output=True).returncode == 0)

    ended = attempt(tmp_path, (*campaign.flags("plain"), *KEEP_ALL), strike=strike)
    assert ended.codes == [0], ended.stderr
    assert "Read-only file system" in ended.stderr
    assert "Traceback" not in ended.stderr
    kept = newest_complete(tmp_path / "run")
    assert kept is not None
    assert kept < logged_steps(tmp_path / "run")[-1]
    assert records(tmp_path / "run") == records(whole)


# ---- damaged checkpoints


@pytest.fixture(scope="module")
def killed(campaign: Campaign) -> Path:
    """A run that was killed when five checkpoints were complete."""
    folder = campaign.folder / "killed"
    strike = partial(arm, "torch.save", 6)
    ended = attempt(folder, (*campaign.flags("plain"), *KEEP_ALL), prepare=strike)
    assert ended.codes == [-signal.SIGKILL], ended.stderr
    assert len(checkpoints(folder / "run")) == 5
    return folder / "run"


def arm(call: str, number: int, rank: int) -> None:
    sabotage.kill_at(call, number, "before")


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "truncated":
        path.write_bytes(content[:-1])
    else:
        path.unlink()


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.pt", "manifest.json"])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(
    campaign: Campaign, whole: Path, killed: Path, tmp_path: Path, name: str, how: str
) -> None:
    shutil.copytree(killed, tmp_path / "run")
    before, newest = checkpoints(tmp_path / "run")[-2:]
    damage(newest / name, how)
    ended = attempt(tmp_path, (*campaign.flags("plain"), *KEEP_ALL))
    assert ended.codes == [0], ended.stderr
    shown = ended.stdout + ended.stderr
    assert re.search(rf"{newest.name}\b.*\b{re.escape(name)}\b", shown), shown
    assert f"step {int(before.name.removeprefix('step-'))}," in ended.stdout
    assert differences(tmp_path / "run", whole) == []


def test_all_checkpoints_damaged(campaign: Campaign, whole: Path, killed: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "run")
    for number, folder in enumerate(checkpoints(tmp_path / "run")):
        damage(sorted(folder.iterdir())[number % 3], DAMAGES[number % 3])
    ended = attempt(tmp_path, (*campaign.flags("plain"), *KEEP_ALL))
    assert ended.codes == [0], ended.stderr
    assert all(folder.name in ended.stdout for folder in checkpoints(killed))
    assert differences(tmp_path / "run", whole) == []


def test_every_flipped_bit_of_a_manifest_is_noticed(killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-copy"
    shutil.copytree(checkpoints(killed)[-1], folder)
    content = (folder / "manifest.json").read_bytes()
    good = manifest.read(folder)
    accepted = []
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        (folder / "manifest.json").write_bytes(changed)
        try:
            if manifest.read(folder) != good:
                accepted.append(place)
        except UserError:
            continue
    shown = [content[max(0, place - 20) : place + 3].decode() for place in accepted[:5]]
    assert not accepted, f"{len(accepted)} of {len(content)} flips were taken for the truth, the first: {shown}"


# ---- pictures


def test_corrupt_picture_in_rank_1s_worker(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path)
    rows = open_data(**vars(DataFlags(data=str(tmp_path / "photos"))), seed=0).train
    first_of_rank_1 = next(TrainOrder(len(rows), 0, BatchPlan(8, 2, 2), rank=1).micro_batches(0))[0].row
    path = Path(rows[first_of_rank_1]["image"]["path"])
    path.write_bytes(path.read_bytes()[:100])
    ended = attempt(tmp_path, campaign.flags("workers"), processes=2)
    assert ended.codes == [0, 0], ended.stderr
    name = f"{path.parent.name}/{path.name}"
    assert ended.stdout.count(name) == 1, ended.stdout
    assert (tmp_path / "run/unreadable.txt").read_text().count(name) == 1
    result = campaign.play(Case(seed=7, kind="kill", processes=2, variant="workers", strikes=2))
    assert result.problems == []


# ---- numbers


def not_a_number(bad: range, how: str, rank: int) -> Callable[[], None]:
    """On rank 1, make the losses of the optimizer steps *bad* (from 0), or their gradients, infinite or NaN.

    Which step it is says the seed of its forward pass, so a resumed run has the same fault. What is called when the
    run has ended writes a digest of all that must agree between processes.
    """
    from tuning import entering, losses

    seeds = {step_seed(0, step, number, 1) for step in bad for number in range(8)}
    make, enter, entered = losses.cross_entropy, entering.enter_stage, []

    def cross_entropy(*settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
        whole = make(*settings)

        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            values = whole(logits, labels)
            if torch.is_grad_enabled() and torch.initial_seed() in seeds:
                values = values.clone()
                if how == "loss":
                    values = values * float("nan")
                else:
                    values.register_hook(lambda gradient: gradient * float("inf"))
            return values

        return loss

    def enter_stage(*args: Any, **keywords: Any) -> Any:
        entered[:] = [enter(*args, **keywords)]
        return entered[0]

    entering.enter_stage = enter_stage
    if rank == 1:
        losses.cross_entropy = cross_entropy
    return lambda: Path(f"digest-{rank}").write_text(digest(entered[0]))


def digest(entered: Any) -> str:
    """Of parameters and optimizer state; running statistics are each process's own."""
    found = hashlib.sha256()
    for parameter in entered.model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    for state in entered.optimizer.state_dict()["state"].values():
        for value in state.values():
            found.update(value.numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_not_a_number_on_rank_1_is_left_out_on_both(campaign: Campaign, tmp_path: Path, how: str) -> None:
    bad = range(11, 13)  # the first steps of the stage with SGD have no momentum yet
    faulty = partial(not_a_number, bad, how)
    folders = tmp_path / "whole", tmp_path / "killed"
    ended = attempt(folders[0], campaign.flags("plain"), processes=2, prepare=faulty)
    assert ended.codes == [0, 0], ended.stderr
    assert len({(folders[0] / f"digest-{rank}").read_text() for rank in (0, 1)}) == 1
    run = folders[0] / "run"
    assert json.loads((run / "summary.json").read_text())["skipped_steps"] == len(bad)
    trained = {r["step"]: r for r in records(run) if "train/loss" in r}
    key = "train/loss" if how == "loss" else "train/grad_norm"
    assert [step for step, record in trained.items() if record[key] is None] == [step + 1 for step in bad]
    weights = load_file(checkpoints(run)[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())

    def strike(ranks: Ranks) -> None:
        ranks.wait_for(lambda: (newest_complete(folders[1] / "run") or 0) > bad[0])
        ranks.send(1, signal.SIGKILL)

    attempt(folders[1], campaign.flags("plain"), processes=2, prepare=faulty, strike=strike)
    ended = attempt(folders[1], campaign.flags("plain"), processes=2, prepare=faulty)
    assert ended.codes == [0, 0], ended.stderr
    assert differences(folders[1] / "run", run) == []


def test_too_many_such_steps_in_a_row_end_the_run(campaign: Campaign, tmp_path: Path) -> None:
    faulty = partial(not_a_number, range(6, 100), "loss")
    flags = (*campaign.flags("plain"), "--max-skipped", "3", "--log-every", "1")
    ended = attempt(tmp_path, flags, processes=2, prepare=faulty, watched=False)
    assert ended.codes == [2, 2], ended.stderr
    assert "Traceback" not in ended.stderr
    assert "step 7" in ended.stderr
    (replay,) = (tmp_path / "run/faults").glob("*.json")
    assert str(replay.relative_to(tmp_path)) in ended.stderr
    found = json.loads(replay.read_text())
    assert (found["step"], found["stage"], len(found["images"])) == (7, 1, 8)
    assert all((campaign.folder / "photos/train" / name).exists() for name in found["images"])
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"
    again = attempt(tmp_path, flags, processes=2)
    assert again.codes == [0, 0], again.stderr  # whatever made the numbers bad is gone


# ---- the other process


@pytest.mark.parametrize("rank", [0, 1])
def test_frozen_rank_is_named_within_the_time_out(campaign: Campaign, tmp_path: Path, rank: int) -> None:
    reference = campaign.reference("plain", 2)
    frozen: list[float] = []

    def strike(ranks: Ranks) -> None:
        ranks.wait_for(lambda: newest_complete(tmp_path / "run") is not None)
        ranks.send(rank, signal.SIGSTOP)
        began = time.monotonic()
        wait([ranks.processes[1 - rank].sentinel], timeout=90)
        frozen.append(time.monotonic() - began)
        ranks.send(rank, signal.SIGKILL)

    flags = campaign.flags("plain")
    ended = attempt(tmp_path, (*flags, "--timeout", "0.1"), processes=2, strike=strike, watched=False)
    assert ended.codes[rank] == -signal.SIGKILL
    assert ended.codes[1 - rank] == 1, ended.stderr
    assert frozen[0] < 6 + 30
    last = ended.texts[1 - rank][1].splitlines()[-3:]
    assert any(f"process {rank} " in line for line in last), last
    again = attempt(tmp_path, flags, processes=2)
    assert again.codes == [0, 0], again.stderr
    assert differences(tmp_path / "run", reference.run) == []


# ---- secrets


@pytest.mark.parametrize("fails", [False, True])
def test_no_credential_is_written(campaign: Campaign, tmp_path: Path, fails: bool) -> None:
    names = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN")
    secrets = {name: hashlib.sha1(name.encode()).hexdigest() for name in names}  # 40 characters, as W&B wants
    prepare = partial(not_a_number, range(3, 100), "loss") if fails else None
    flags = (*campaign.flags("wandb"), *(("--max-skipped", "2") if fails else ()))
    ended = attempt(tmp_path, flags, processes=2, environment=secrets, prepare=prepare)
    assert ended.codes[0] == (2 if fails else 0), ended.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    holding = [
        (str(path.relative_to(tmp_path)), name)
        for path in files
        for name, secret in secrets.items()
        if secret.encode() in path.read_bytes() or secret.encode("utf-16-le") in path.read_bytes()
    ]
    assert holding == []
