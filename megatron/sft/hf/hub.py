"""Talks to the model hub, as the only module: lists a repository's files, fetches, uploads, and explains its errors."""

import errno
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from megatron.sft.runtime.errors import UserError
from megatron.sft.runtime.manifest import read_json

if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when huggingface_hub is imported

import huggingface_hub
from huggingface_hub import errors as hub_errors

ANSWER_TIMEOUT_S = 10
TRIES = 3
# The HTTP client under huggingface_hub changes with its version.
HTTP_CLIENTS = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


@dataclass(frozen=True)
class Repository:
    """A model or data set on the hub at one commit, and its files' sizes in bytes."""

    kind: str  # "model" or "dataset"
    id: str
    commit: str
    files: dict[str, int]
    # SHA-256 of the large files; the hub has none of the others.
    checksums: dict[str, str] = field(default_factory=dict)


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, or the public one."""
    return str(huggingface_hub.constants.ENDPOINT)


def find_repository(kind: str, id: str, revision: str) -> Repository:
    """Ask the hub for the files of `id` at a branch, tag or commit. A `UserError` if it cannot be reached or refuses."""
    with explained(kind, id, revision):
        info = huggingface_hub.HfApi().repo_info(
            id, repo_type=kind, revision=revision, timeout=ANSWER_TIMEOUT_S, files_metadata=True
        )
    check_names(kind, id, [file.rfilename for file in info.siblings])
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    checksums = {file.rfilename: str(file.lfs.sha256) for file in info.siblings if file.lfs}
    return Repository(kind, id, info.sha, sizes, checksums)


def check_names(kind: str, id: str, names: list[str]) -> None:
    """Refuse a repository with a file that would be written outside of its folder."""
    for name in names:
        if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{kind} {id} has a file {name!r}, which lies outside its folder: do not use it")


def fetch_files(repository: Repository, names: list[str], folder: Path) -> None:
    """Bring these files of the repository to `folder`; those that an earlier try finished are not fetched again."""
    with explained(repository.kind, repository.id, repository.commit):
        for tries_left in reversed(range(TRIES)):
            try:
                _fetch_snapshot(repository, names, folder)
                break
            except Exception as error:
                if not (_is_of_the_network(error) and tries_left):
                    raise
                print(f"the connection broke ({error}): trying again", flush=True)
                time.sleep(1)
    # When the connection breaks, some versions of huggingface_hub return the part that they have.
    for name in names:
        path = folder / name
        if not path.is_file() or path.stat().st_size != repository.files[name]:
            raise UserError(
                f"{name} of {repository.kind} {repository.id} did not arrive completely: run the same command again"
            )


def _fetch_snapshot(repository: Repository, names: list[str], folder: Path) -> None:
    huggingface_hub.snapshot_download(
        repository.id,
        repo_type=repository.kind,
        revision=repository.commit,
        local_dir=folder,
        # snapshot_download takes names as patterns; brackets are the only pattern characters in file names.
        allow_patterns=[name.replace("[", "[[]") for name in names],
    )


def is_id(text: str) -> bool:
    """Whether a text can be a repository of the hub."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text) is not None


def fetch_config(id: str) -> dict[str, Any]:
    """A model's config.json, a few kilobytes. A `UserError` if it cannot be had."""
    with explained("model", id, "main"):
        huggingface_hub.HfApi().model_info(id, timeout=ANSWER_TIMEOUT_S)  # once, where the download would try for half a minute
        path = huggingface_hub.hf_hub_download(id, "config.json")
    config: dict[str, Any] = read_json(Path(path), "model configuration", "check the model's page")
    return config


def check_push(id: str) -> None:
    """Whether a model can be pushed to `id` with the token in use, before the work that makes it. A `UserError` if not."""
    if not is_id(id):
        raise UserError(f"PUSH_TO is {id!r}: give OWNER/NAME")
    if not huggingface_hub.get_token():
        raise UserError(f"PUSH_TO={id} needs a token that may write: set HF_TOKEN, or unset PUSH_TO")
    with explained("model", id, "main"):
        huggingface_hub.HfApi().whoami()


def push_folder(folder: Path, id: str) -> str:
    """Upload a model's folder in one commit; a new repository is private. Returns its address."""
    with explained("model", id, "main"):
        api = huggingface_hub.HfApi()
        api.create_repo(id, private=True, exist_ok=True)
        api.upload_folder(repo_id=id, folder_path=folder, commit_message=f"Upload {folder.name}")
    return f"{endpoint()}/{id}"


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.partition(".")[0] in HTTP_CLIENTS


@contextmanager
def explained(kind: str, id: str, revision: str) -> Iterator[None]:
    """Turn what the hub's client raises into a `UserError` that names the repository, the cause and the next step."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _meaning(error, kind, id, revision)
        if message is None:
            raise
        raise UserError(f"{kind} {id}{message}") from None


def _meaning(error: BaseException, kind: str, id: str, revision: str) -> str | None:
    """What follows `model ID` in the message; None for an error that is not from the hub or the network."""
    token = "the token in use was refused" if huggingface_hub.get_token() else "no token is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, hub_errors.GatedRepoError):
        return f" is gated and {token}: accept its conditions on its page, then set HF_TOKEN to a token that may read it"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f" has no revision {revision}: check REVISION against its branches, tags and commits"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return f" was not found at {endpoint()} ({token}): check its spelling; a private one needs HF_TOKEN"
    if isinstance(error, hub_errors.HFValidationError):
        return " is neither a folder nor an id as NAME or OWNER/NAME: check its spelling"
    if status in (401, 403):
        return f": {endpoint()} refused access ({status}, {token}): set HF_TOKEN to a token that may read it"
    if status is not None:
        return f": {endpoint()} answered {status}: try again later, or set HF_ENDPOINT to a mirror"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ": the disk is full: make room or set ASSETS_DIR to another disk, then run the same command again"
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return f" is not here and HF_HUB_OFFLINE is set: unset it, or {_offline(kind)}"
    if _is_of_the_network(error):
        return (
            f": {endpoint()} cannot be reached ({error or type(error).__name__}): check the network and its proxy, "
            f"set HF_ENDPOINT to a mirror, or {_offline(kind)}"
        )
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        return _meaning(error.__cause__, kind, id, revision) if error.__cause__ else ": the connection broke: try again"
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return ": a file did not arrive completely: run the same command again; finished files are kept"
    return None


def _offline(kind: str) -> str:
    path = "FOLDER" if kind == "model" else "FILE"
    return f"bring it here by other means and run bash scripts/1_download.sh {kind} {path}"
