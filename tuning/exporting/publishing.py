"""Uploading an export to the Hugging Face hub, and what an upload would hold."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from tuning.errors import UserError
from tuning.models.weights import first_line

_TRACKER_RUN = re.compile(r"(offline-)?run-\d{8}_\d{6}-(?P<id>[\w-]+)")


def check_repository(repository: str) -> None:
    """Refuse what can't be a repository of the hub; needs no network.

    Raises:
        UserError: names it.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)  # type: ignore[attr-defined]
    except HFValidationError as error:
        raise UserError(f"--push {repository!r} is no name of a repository: {first_line(error)}") from error
    if repository.count("/") != 1:
        raise UserError(f"--push {repository!r}: give OWNER/NAME, the user or organisation and the model's name.")


def check_login() -> None:
    """Ask the hub who we are, before anything is spent.

    Raises:
        UserError: no login, a login that is refused, or no network.
    """
    try:
        huggingface_hub.HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UserError(
            "--push needs a login on the Hugging Face hub: run hf auth login, or set HF_TOKEN. --dry-run needs none."
        ) from error
    except Exception as error:  # the hub client and its HTTP library each have their own
        raise UserError(
            f"--push: the Hugging Face hub can't be reached or refuses the login ({first_line(error)}). --dry-run "
            "shows what would be uploaded; without --push the export is made and nothing uploaded."
        ) from error


def push(repository: str, folder: Path) -> str:
    """Upload everything in *folder* as one commit; a new repository is private. The address of the repository.

    Raises:
        UserError: it failed; the export is complete, and the message says how to upload it later.
    """
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type="model",
            commit_message=f"Upload {folder.name}",
        )
    except Exception as error:  # the hub client and its HTTP library each have their own
        raise UserError(
            f"--push {repository} failed ({first_line(error)}). The export is complete in {folder}; upload it by: hf "
            f"upload {repository} {folder}"
        ) from error
    return str(address)


def tracker_run(run: Path | None) -> str:
    """W&B's id of the training run in the folder *run*, the newest if it was continued.

    Raises:
        UserError: there is none.
    """
    folders = sorted(run.glob("wandb/*run-*")) if run else []
    ids = [found["id"] for folder in folders if (found := _TRACKER_RUN.fullmatch(folder.name))]
    if not ids:
        raise UserError(
            f"--push-wandb: {run or 'this model'} has no W&B run that the artifact could belong to. Was it trained "
            "with --tracker wandb, and is its wandb/ folder still there?"
        )
    return ids[-1]


def artifact_name(name: str) -> str:
    """*name* with what W&B doesn't take in names replaced."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)[:128]


def upload_lines(target: str, files: Sequence[tuple[str, int]]) -> list[str]:
    """What an upload to *target* holds, for people.

    Args:
        files: name and size in bytes.
    """
    width = max((len(name) for name, _ in files), default=0)
    total = sum(size for _, size in files)
    lines = [f"  {name:<{width}}  {size:>13,} bytes" for name, size in files]
    return [f"{target}: {len(files)} files, {total:,} bytes", *lines]
