"""The two errors that are the user's to mend: one plain sentence each, with a remedy, and an exit status."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The message says what, where and what to do; the command line prints it alone."""

    exit_status = 1


class UsageError(UserError):
    """A command, a config or an option that is wrong as written (exit status 2)."""

    exit_status = 2


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean "x"?` for the nearest known word, or for those that begin with `word`; the sorted list of what is
    known when none is near."""
    choices = sorted(known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    near = near or [choice for choice in choices if word and choice.startswith(word)]
    if near:
        return " Did you mean {}?".format(" or ".join(f'"{choice}"' for choice in near))
    return f" Known: {', '.join(choices)}." if choices else ""
