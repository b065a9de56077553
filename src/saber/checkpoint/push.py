"""An edited model to the hub: private unless asked otherwise, in one commit, and read back."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo, RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    logging,
    validate_repo_id,
)

from saber.checkpoint.export import CARD
from saber.checkpoint.hub_errors import offline, told
from saber.checkpoint.parcel import Parcel
from saber.errors import HubError, UsageError


@dataclass(frozen=True)
class Target:
    """A repository that may be pushed to, as it was when it was looked at."""

    repo: str
    """Owner and name."""
    public: bool
    """Whether everybody may read it."""
    endpoint: str
    """Address of the hub."""
    user: str
    """Whom the token belongs to."""
    held: frozenset[str] | None
    """Files in it; None where there is no such repository yet."""


@dataclass(frozen=True)
class Pushed:
    """A push that was read back."""

    repo: str
    """Owner and name."""
    url: str
    """Its page."""
    commit: str
    """The commit that holds the files."""
    public: bool
    """Whether everybody may read it."""
    files: int
    """Files that were pushed."""
    bytes: int
    """Their size."""


def check(repo: str, *, public: bool = False) -> Target:
    """Hold everything against the hub that can stop a push, and change nothing there.

    A name without an owner is the user's own. Raises `UsageError` for a name that cannot be, when there is
    no token or no hub, and for a repository that is public when a private one is wanted or the other
    way round; `HubError` when the hub does not accept the token or cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(
            f"{repo!r} is no name for a repository.",
            "Give OWNER/NAME of letters, digits, '-', '_' and '.'.",
        ) from error
    if constants.HF_HUB_OFFLINE:
        raise offline()
    token = _token(repo)
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    with told(repo, token):
        me = api.whoami()
        user = str(me["name"])
        repo = repo if "/" in repo else f"{user}/{repo}"
        _may_write(me, user, repo)
        info = _info(api, repo)
    if info is None:
        return Target(repo, public, constants.ENDPOINT, user, None)
    _same_visibility(info, repo, public)
    held = frozenset(s.rfilename for s in info.siblings or ())
    return Target(info.id, public, constants.ENDPOINT, user, held)


def send(parcel: Parcel, target: Target, *, quiet: bool = False) -> Pushed:
    """Push the files in one commit, after making the repository where there is none, and read it back.

    Until the commit nothing is seen in the repository; what was uploaded before a failure is not sent
    again. Files of the repository that the parcel has not stay. Raises `UsageError` and `HubError` as
    `check` does, and `HubError` when the repository does not hold what was sent.
    """
    repo, later = target.repo, again(parcel.source, target)
    token = _token(repo)
    api = HfApi(endpoint=target.endpoint, token=token)
    adds = [
        CommitOperationAdd(name, parcel.card_for(repo) if name == CARD else str(path))
        for name, path in parcel.files.items()
    ]
    with told(repo, token, later), _calm(quiet):
        info = _info(api, repo)
        if info is None:
            api.create_repo(repo, private=not target.public)
            info = _info(api, repo)
        # Looked at again: hours may lie between, and a hub may have made it other than it was told.
        if info is None:
            raise HubError(f"{repo} was made, and the hub does not show it.", later)
        _same_visibility(info, repo, target.public)
        commit = api.create_commit(repo, adds, commit_message=_message(parcel)).oid
        other = _other(api, repo, commit, adds)
    url = f"{target.endpoint}/{repo}"
    if other:
        raise HubError(
            f"{url} does not hold what was sent: {', '.join(other[:3])} in commit {commit}.",
            f"Do not use that commit. {later}",
        )
    return Pushed(repo, url, commit, target.public, len(parcel.files), parcel.size)


def again(source: Path, target: Target) -> str:
    """Return the advice to push what is there, once more or later."""
    words = ["saber", "push", str(source), target.repo, *(["--public"] if target.public else [])]
    return f"Push it with: {shlex.join(words)}"


def _token(repo: str) -> str:
    with told(repo):
        token = get_token()
    if not token:
        raise UsageError(
            "there is no token for the hub.",
            "Set HF_TOKEN, or run: hf auth login. It needs write access.",
        )
    return token


def _may_write(me: dict[str, Any], user: str, repo: str) -> None:
    """Raise for a token that can only read, or for an owner that it does not belong to."""
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise HubError(
            f"the token of {user} can only read.",
            f"Make one with write access at {constants.ENDPOINT}/settings/tokens.",
        )
    owners = [user, *(str(org.get("name")) for org in me.get("orgs") or ())]
    owner = repo.partition("/")[0]
    # A fine-grained token need not show the organisations that it may write to.
    if role != "fineGrained" and owner.lower() not in [name.lower() for name in owners]:
        raise UsageError(
            f"the token of {user} cannot push to {owner}.", f"It can to: {', '.join(owners)}."
        )


def _info(api: HfApi, repo: str) -> ModelInfo | None:
    """Return what the hub knows of a repository, None where there is none."""
    try:
        return api.model_info(repo)
    except GatedRepoError as error:
        raise HubError(
            f"{repo} exists and is gated for this token.", "Choose another name."
        ) from error
    except RepositoryNotFoundError:
        return None


def _same_visibility(info: ModelInfo, repo: str, public: bool) -> None:
    """Raise `UsageError` when a repository is public and must not be, or the other way round."""
    if public == (not info.private):
        return
    if public:
        raise UsageError(
            f"{repo} is private on the hub, and --public was given.",
            "Make it public on its page first, or leave --public out.",
        )
    raise UsageError(
        f"{repo} is public on the hub, so that everybody could read what is pushed.",
        "Choose another name, make it private on its page, or pass --public.",
    )


def _message(parcel: Parcel) -> str:
    """Return the commit's message; of a base in a local folder it names the folder alone."""
    base = parcel.origin.get("base", "a model")
    if base.count("/") > 1 or base.startswith((".", "~", "/")) or "\\" in base:
        base = base.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return f"{base}, edited by SABER {parcel.origin.get('version', '')}".rstrip()


@contextmanager
def _calm(quiet: bool) -> Iterator[None]:
    """Keep the client's warnings of what it tries again to itself, and its bars when quiet."""
    level, bars = logging.get_verbosity(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if quiet and bars:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if quiet and bars:
            enable_progress_bars()


def _other(api: HfApi, repo: str, commit: str, adds: list[CommitOperationAdd]) -> list[str]:
    """Return files that the commit lacks or holds with other bytes."""
    tree = api.list_repo_tree(repo, recursive=True, revision=commit)
    there = {item.path: item for item in tree if isinstance(item, RepoFile)}
    return [a.path_in_repo for a in adds if not _same(there.get(a.path_in_repo), a)]


def _same(file: RepoFile | None, sent: CommitOperationAdd) -> bool:
    if file is None or file.size != sent.upload_info.size:
        return False
    if file.lfs is not None:
        return bool(file.lfs.sha256 == sent.upload_info.sha256.hex())
    given = sent.path_or_fileobj
    content = given if isinstance(given, bytes) else Path(str(given)).read_bytes()
    return bool(file.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
