"""Secrets in files: what server and client show each other."""

from __future__ import annotations

from pathlib import Path

from edgeguard.errors import InputError

SHORTEST_TOKEN, LONGEST_TOKEN = 16, 1024


def read_token(path: Path) -> str:
    """The secret in a file, without the white space around it.

    Raises:
        InputError: unreadable, or as `check_token`.
    """
    try:
        with path.open("rb") as handle:
            token = handle.read(LONGEST_TOKEN + 64).decode("latin-1").strip()
    except OSError as exc:
        raise InputError(f"cannot read the token file {path}: {exc.strerror or exc}") from exc
    return check_token(token, f"the token in {path}")


def check_token(token: str, what: str) -> str:
    """The token itself; raises InputError, which does not show it, for one that is too short or that no header can carry."""
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{what} must have {SHORTEST_TOKEN} to {LONGEST_TOKEN} ASCII letters, digits and signs, without spaces")
    return token
