"""Errors that a user can fix: one line that names the file, the line, the value, and what to do."""

from __future__ import annotations

import os


class DptdrError(Exception):
  """An error that a user can fix. `main` prints it as one line and exits with status 2."""


class RetryableError(DptdrError):
  """The input is fine and a restart may succeed: `main` exits with status 1, which launchers restart."""


class OutageError(RetryableError):
  """A service outside of the run is not reachable; a restart continues when it is back."""


class InputError(DptdrError):
  """Bad input: says where it is and what to do about it.

  Attributes:
    path: the bad file, or None.
    line: its line, from 1, or None.
  """

  def __init__(
    self,
    what: str,
    *,
    path: str | os.PathLike | None = None,
    line: int | None = None,
    value: object = None,
    fix: str | None = None,
  ):
    self.path, self.line = path, line
    where = "" if path is None else f"{os.fspath(path)}:{line}: " if line is not None else f"{os.fspath(path)}: "
    shown = "" if value is None else f": {_shorten(repr(value))}"
    advice = "" if fix is None else f". {fix}"
    super().__init__(f"{where}{what}{shown}{advice}")


def _shorten(text: str, limit: int = 200) -> str:
  return text if len(text) <= limit else text[: limit - 1] + "…"
