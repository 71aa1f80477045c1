"""Text of a model's, a file's or a server's on a terminal, which obeys what it is written.

Escape sequences move the cursor, change the title, hide text or write to the clipboard; marks of direction make a line
read as another. Here they are shown instead.
"""

from __future__ import annotations

import re

import typer

# C0 but for newline and tab, DEL and C1; and the marks that turn the order of letters around.
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""The text with every command to the terminal written out (`\u001b`), which inside JSON is the same text."""
    return COMMANDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def echo(text: object, *, err: bool = False) -> None:
    """Prints it with nothing in it that a terminal would obey."""
    typer.echo(printable(str(text)), err=err)
