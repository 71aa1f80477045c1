"""Addresses of servers, which may hold a user's name and password, and must not once they are shown or kept."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit


def without_credentials(text: str) -> str:
    """The text with `***` in the place of what stands before the @ of an address."""
    return re.sub(r"//[^/\s'\"]*@", "//***@", text)


def credentials(url: str) -> tuple[str, str] | None:
    """Name and password in an address, or None."""
    parts = urlsplit(url)
    if "@" not in parts.netloc:
        return None
    return unquote(parts.username or ""), unquote(parts.password or "")


def bare(url: str) -> str:
    """The address without name and password."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def require_no_credentials(url: str | None) -> str | None:
    """The address of a recipe. Raises ValueError where it holds a password: recipes are copied into reports."""
    if url is not None and "@" in urlsplit(url).netloc:
        raise ValueError(
            "an address holds no name and password, for a recipe is copied into the run and its report; put the key "
            "into the environment variable that docs/security.md names"
        )
    return url
