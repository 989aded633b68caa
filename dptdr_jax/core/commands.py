"""How each command starts and ends: its flags, and an exit status for whatever happens."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import DptdrError, RetryableError


def start(main: Callable[[list[str]], int], required: Sequence[str] = (), words: Sequence[str] = ()) -> None:
  """Parses the flags and runs `main`, which returns the exit status.

  Status 2: an unknown, missing or wrongly typed flag or setting, a config that cannot be loaded, or an argument that is
  not expected.

  Args:
    required: flags that must be given.
    words: subcommands, one of which must be given; empty: no argument is expected.
  """
  flags.mark_flags_as_required(required)
  app.run(main, flags_parser=functools.partial(_parse, words=words))


def status_of(work: Callable[[], object], *, on_stop: Callable[[], None] = lambda: None) -> int:
  """Runs `work` and prints what went wrong in one line; returns the exit status.

  0: done; 2: an error of input; 75: stopped by SIGTERM or Ctrl-C, everything is saved; 1: a restart may help.

  Args:
    on_stop: called where this process alone was stopped: tells the other processes of the run.
  """
  try:
    work()
  except preemption.Preempted as stop:
    if not stop.agreed:
      on_stop()
    sys.stderr.write(f"stopped: {stop}; the same command resumes\n")
    return preemption.EXIT_STATUS
  except KeyboardInterrupt:  # the second one, or one before `preemption.install`
    sys.stderr.write("interrupted; the same command resumes\n")
    return preemption.EXIT_STATUS
  except DptdrError as error:
    sys.stderr.write(f"error: {error}\n")
    return 1 if isinstance(error, RetryableError) else 2
  except OSError as error:
    if not files.is_input(error):
      traceback.print_exc()
      return 1
    sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
    return 2
  except Exception:
    traceback.print_exc()
    return 1
  return 0


def _parse(argv: list[str], words: Sequence[str]) -> list[str]:
  try:
    rest = flags.FLAGS(_with_config_path(argv))
    if "config" in flags.FLAGS:
      flags.FLAGS.config.to_dict()  # a file that could not be loaded says so here
  except Exception as error:  # of any kind: a config is a program of the user's
    _refuse(_reason(error))
  given = rest[1:]
  if words and (len(given) != 1 or given[0] not in words):
    _refuse(f"name {' or '.join(words)} before the flags. See --help")
  if given and not words:
    _refuse(f"unexpected argument {given[0]!r}. See --help")
  if flags.FLAGS["verbosity"].using_default_value:
    flags.FLAGS.verbosity = -1  # warnings alone: orbax and others log much at INFO, the default
  logging.getLogger("dptdr_jax").setLevel(logging.INFO)
  return rest


def _with_config_path(argv: list[str]) -> list[str]:
  """Takes the installed configs/NAME.py where the current directory has none of this name."""
  spec = importlib.util.find_spec("configs")
  installed = pathlib.Path(next(iter(spec.submodule_search_locations)) if spec else "configs")
  words = []
  for word in argv:
    flag, equals, value = word.partition("=")
    path, colon, rest = os.path.expanduser(value).partition(":")
    if flag.lstrip("-") == "config" and equals:
      beside = installed / path.removeprefix("configs/")
      if path.startswith("configs/") and not os.path.exists(path) and beside.exists():
        path = str(beside)
      word = f"{flag}={path}{colon}{rest}"
    words.append(word)
  return words


def _reason(error: Exception) -> str:
  """What is wrong with a flag or with the config, in one line and without a traceback."""
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
