"""How each command starts: its flags; what is wrong with them is one line and status 2, like all errors of input."""

from __future__ import annotations

import functools
import logging
import pathlib
import sys
from collections.abc import Callable, Sequence

from absl import app, flags

_ROOT = pathlib.Path(__file__).parents[2]


def start(main: Callable[[list[str]], int], required: Sequence[str] = (), words: Sequence[str] = ()) -> None:
  """Parses the flags and runs `main`, which returns the exit status.

  Status 2: an unknown, missing or ill-typed flag or config field, a config that cannot be loaded, a word too many.

  Args:
    required: flags without which nothing can begin.
    words: of which one has to stand beside the flags; none: nothing may.
  """
  if (_ROOT / "configs").is_dir():
    sys.path.append(str(_ROOT))  # a config of one's own imports configs.base wherever it lies and is asked for
  flags.mark_flags_as_required(required)
  app.run(main, flags_parser=functools.partial(_parse, words=words))


def _parse(argv: list[str], words: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(argv)
    if "config" in flags.FLAGS:
      flags.FLAGS.config.to_dict()  # a file that could not be loaded says so here
  except Exception as error:  # of any kind: a config is a program of the user's
    _refuse(_told(error))
  given = rest[1:]
  if words and (len(given) != 1 or given[0] not in words):
    _refuse(f"say {' or '.join(words)}, and flags. See --help")
  if given and not words:
    _refuse(f"unexpected argument {given[0]!r}. See --help")
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = -1  # warnings; at INFO, app.run's own choice, orbax and others have much to tell
  logging.getLogger("dptdr_jax").setLevel(logging.INFO)
  return rest


def _told(error: Exception) -> str:
  """What is wrong with a flag, or with the config, in one line; how that came about is left out."""
  lines = [line.strip().rstrip(" .?") for line in str(error).splitlines() if line.strip()]
  if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith("config."):
    return f"--{error.flagname}, and no --config that it could change. See --help"
  if isinstance(error, flags.Error):  # which quotes the traceback of some errors of a config
    return f"config: {lines[-1]}" if "Traceback" in str(error) else f"{'; '.join(lines)}. See --help"
  if isinstance(error, AttributeError) and error.args and isinstance(error.args[0], KeyError):  # as ml_collections does
    return f"config: no such field: {' '.join(str(error.args[0].args[0]).split())}"
  if isinstance(error, OSError):
    return f"config: {lines[-1]}"
  return ": ".join(["config", type(error).__name__, *lines[-1:]])


def _refuse(what: str) -> None:
  sys.stderr.write(f"error: {what}\n")
  raise SystemExit(2)
