"""Repositories of the Hugging Face hub by their id: downloading what is chosen, and uploading a folder.

`huggingface_hub` resumes, caches and takes the token from the environment (`HF_TOKEN`); it is imported
here alone, the extra `[hub]`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from qdit_jax.errors import UserError
from qdit_jax.files.paths import PathLike

PREFIX = "hf:"
ID = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<inside>.+?)/?)?")


# The packages by which versions of `huggingface_hub` speak HTTP.
CLIENTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class HubId(NamedTuple):
    """What `hf:OWNER/NAME[@REVISION][/PATH]` says."""

    repo: str
    revision: str | None
    inside: str


# From the names of a repository's files and what is asked for to those that are downloaded.
ChooseFn = Callable[[Sequence[str], HubId], list[str]]


def is_hub_id(src: PathLike) -> bool:
    """Returns whether `src` is `hf:OWNER/NAME...`; `hf://` is a URL of a file system."""
    text = os.fspath(src)
    return text.startswith(PREFIX) and not text.startswith(f"{PREFIX}/") and not Path(text).exists()


def hub_id(src: PathLike) -> HubId:
    """Returns the parts of an id.

    Raises:
        UserError: if it is none.
    """
    found = ID.fullmatch(os.fspath(src))
    if found is None:
        raise UserError(
            f"{src} is no id of the hub; write hf:OWNER/NAME, hf:OWNER/NAME@REVISION or "
            "hf:OWNER/NAME/FILE."
        )
    return HubId(found["repo"], found["revision"], found["inside"] or "")


def hub_package(src: PathLike) -> Any:
    """Returns the module `huggingface_hub`; raises `UserError` if it is not installed."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{src} needs the package huggingface_hub: pip install 'qdit-jax[hub]', or "
            "pip install huggingface_hub."
        ) from None
    return huggingface_hub


@contextmanager
def hub_errors_told(src: PathLike) -> Iterator[None]:
    """Turns what the hub refuses, or that it cannot be reached, into one sentence."""
    hub_package(src)
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no")
        raise UserError(
            f"{src}: the hub answers {status} ({first_line(error)}). Check the name and the revision; "
            "a private or gated repository, and writing to one, needs HF_TOKEN."
        ) from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(f"{src}: the hub cannot be reached ({first_line(error)}).") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in CLIENTS:
            raise
        raise UserError(f"{src}: the connection to the hub failed ({first_line(error)}).") from None


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def downloaded(src: PathLike, choose_fn: ChooseFn) -> tuple[Path, str]:
    """Returns the local file or folder of an id, downloaded where it is not cached, and its commit.

    Args:
        choose_fn: which files to download. If that is one file, its path is returned, and the
            file's own where the id names one; else the folder of all.

    Raises:
        UserError: if the package is missing, the hub does not have it or does not give it, or
            `choose_fn` refuses.
    """
    wanted, hub = hub_id(src), hub_package(src)
    with hub_errors_told(src):
        info = hub.HfApi().model_info(wanted.repo, revision=wanted.revision)
        names = sorted(found.rfilename for found in info.siblings or ())
        files = choose_fn(names, wanted)
        folder = Path(hub.snapshot_download(wanted.repo, revision=info.sha, allow_patterns=files))
    inside = files[0] if len(files) == 1 else wanted.inside
    return folder / inside, f"{wanted.repo}@{info.sha}"


def uploaded(folder: Path, dst: PathLike, *, private: bool, message: str) -> str:
    """Uploads the files of a folder to a repository, which is created if needed; returns its address.

    Raises:
        UserError: if the package is missing, `dst` names a revision or a path, or the hub refuses.
    """
    wanted, hub = hub_id(dst), hub_package(dst)
    if wanted.revision or wanted.inside:
        raise UserError(f"{dst}: write to a whole repository, hf:{wanted.repo}.")
    with hub_errors_told(dst):
        api = hub.HfApi()
        api.create_repo(wanted.repo, private=private, exist_ok=True)
        found = api.upload_folder(
            repo_id=wanted.repo, folder_path=str(folder), commit_message=message
        )
    return str(getattr(found, "commit_url", found))
