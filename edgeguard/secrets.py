"""Secrets in files: what server and client show each other."""

from __future__ import annotations

from pathlib import Path

from edgeguard.errors import InputError

SHORTEST_TOKEN, LONGEST_TOKEN = 16, 1024


def read_token(path: Path) -> str:
    """The secret in a file, without the white space around it.

    Raises:
        InputError: unreadable, too short to be a secret, or with characters that no HTTP header can carry.
    """
    try:
        with path.open("rb") as handle:
            token = handle.read(LONGEST_TOKEN + 2).decode("ascii").strip()
    except OSError as exc:
        raise InputError(f"cannot read the token file {path}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise InputError(f"the token in {path} must be of ASCII letters, digits and signs") from exc
    if not SHORTEST_TOKEN <= len(token) <= LONGEST_TOKEN or not token.isprintable() or " " in token:
        raise InputError(f"the token in {path} must have {SHORTEST_TOKEN} to {LONGEST_TOKEN} printable characters without spaces")
    return token
