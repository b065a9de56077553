"""What goes wrong between here and the hub, in one clear line that never holds the token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors

from saber.errors import HubError, SaberError, UsageError

FAILURES: tuple[type[Exception], ...] = (
    *(e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)),
    *(OSError, ValueError, RuntimeError, KeyError, TypeError),
)
"""What the hub's client raises: errors of its own and of its HTTP library, and those of its storage or
of an answer that it does not understand."""


def offline() -> UsageError:
    """Return the error for a hub that the user has switched off."""
    return UsageError(
        "the hub is switched off: HF_HUB_OFFLINE is set.", "Unset it to push, or leave --push out."
    )


@contextmanager
def told(repo: str, token: str = "", again: str = "") -> Iterator[None]:
    """Turn what the hub's client raises into a `HubError`, or a `UsageError` when it is offline.

    The token is taken out of what a server said. `again` is what to do once all is mended. Errors of
    SABER and of local files pass.
    """
    try:
        yield
    except SaberError:
        raise
    except FAILURES as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise _clear(error, repo, token, again) from error


def _clear(error: Exception, repo: str, token: str, again: str) -> SaberError:
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline()
    root, status = _root(error)
    hub, said = constants.ENDPOINT, _said(root, token)
    if status == 401:
        return HubError(f"{hub} does not accept the token.", _fresh(hub, again))
    if status == 403:
        return HubError(f"the token may not write to {repo} ({said}).", _fresh(hub, again))
    if status == 429:
        return HubError(f"{hub} asks to wait: too many requests.", again or "Try again later.")
    if status is not None:
        return HubError(f"{hub} answered {status} for {repo}: {said}.", again)
    if isinstance(root, errors.HTTPError | OSError):
        mend = "Check the connection."
        return HubError(
            f"no connection to {hub}, or it was lost ({said}).", f"{mend} {again}".strip()
        )
    return HubError(f"{repo} cannot be pushed to {hub}: {said}.", again)


def _fresh(hub: str, again: str) -> str:
    return (
        f"Make a token with write access at {hub}/settings/tokens; set HF_TOKEN to it, or run: "
        f"hf auth login.{f' {again}' if again else ''}"
    )


def _root(error: BaseException) -> tuple[BaseException, int | None]:
    """Return the error that others were raised from, and the status of the hub's answer if it gave one."""
    link: BaseException | None = error
    while link is not None:
        response = getattr(link, "response", None)
        if response is not None:
            return link, int(response.status_code)
        if isinstance(link, errors.HTTPError | OSError):
            return link, None
        link = link.__cause__ or link.__context__
    return error, None


def _said(error: BaseException, token: str) -> str:
    """Return the error's own words in one line, without the token, whoever put it there."""
    own = str(getattr(error, "server_message", None) or error)
    line = " ".join((own.replace(token, "***") if token else own).split()).rstrip(".")
    return line[:200] or type(error).__name__
