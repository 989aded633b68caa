"""A run's safe copy on a remote file system: a machine whose disk is gone goes on from it.

Before a stage runs, what the copy has of it and this machine has not is fetched; while it runs a thread copies what is
new and whole; when it has ended the run waits until all is there. What a copy is says `core.stage_copy`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dptdr_jax.core import files, manifest, preemption, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.remote import RemoteDirectory
from dptdr_jax.core.stage_copy import ASIDE, StageCopy

_log = logging.getLogger(__name__)

EVERY_S = 10.0  # seconds between two looks at what is new
_SLOWEST_S = 300.0  # the same, after several failures
LAST_S = 15.0  # for the last copy after SIGTERM, which may be all that is left of the machine's time
_TOLD = 5  # files that a message names


class Mirror:
  """The remote copies of a run's stages; the first process has one, the others none.

  Args:
    url: directory of the run's copy.
    root: directory of the run.
  """

  def __init__(self, url: str, root: files.Path):
    if not remote.is_remote(url):
      raise InputError("a remote is a URL", value=url, fix="Say gs://BUCKET/DIR, s3://BUCKET/DIR, file:///DIR, …")
    self._remote, self._root = RemoteDirectory(url), pathlib.Path(root)
    files.remove(self._root / ASIDE)  # a killed run's
    self._copies: dict[str, StageCopy] = {}
    self._ended: dict[str, str] = {}  # keys of the stages that are to be kept whole

  def fetch(self, name: str, key: str, made_from: Mapping[str, Any], beside: Sequence[str] = ()) -> None:
    """Brings what the copy has of a stage under `key` and the run's directory has not; comes first for every stage.

    A finished stage comes as a whole, and one that was begun as it stood, if nothing of it is here.

    Args:
      made_from: what gives the key; the log says where it differs from what the copy was made from.
      beside: files that the stage writes at its end into the run's directory, outside of its own.
    """
    make = functools.partial(StageCopy, self._remote, self._root, name, beside)
    copy = self._copies[name] = self._insist(name, make)
    here = {}
    for part in (manifest.BEGUN, manifest.NAME):
      path = self._root / name / part
      here[part] = (manifest.read(path) or {}).get("key")
    if here[manifest.NAME] != key and (copy.is_whole(key) or (copy.is_begun(key) and here[manifest.BEGUN] != key)):
      copy.fetch()
      _log.info("%s: fetched from %s", name, self._remote.url)
    elif before := {} if copy.is_begun(key) else self._insist(name, copy.made_from):
      changes = "; ".join(manifest.differences(before, made_from))
      _log.warning("%s: the copy on %s is of another run (%s); this one's will replace it", name, self._remote.url,
                   changes or "a newer layout")  # fmt: skip

  @contextlib.contextmanager
  def follow(self, name: str, key: str) -> Iterator[None]:
    """Copies what is new of a stage while the `with` block runs it; when SIGTERM ends it, what is left, for LAST_S."""
    copy = self._copies[name]
    self._insist(name, lambda: copy.begin(key))
    stop = threading.Event()
    thread = threading.Thread(target=_keep_copying, args=(copy, key, stop), name=f"copy {name}", daemon=True)
    thread.start()
    wait_s = None
    try:
      yield
    except preemption.Preempted:
      stop.set()
      _copy_last(copy, key, thread)
      wait_s = 0.0  # it has had its time
      raise
    finally:
      stop.set()
      thread.join(wait_s)

  def keep(self, name: str, key: str) -> None:
    """Makes the copy of a finished stage whole, and adds what came to those before (BM25's index comes to prepare).

    SIGTERM ends it after the files at hand; the next start goes on.
    """
    self._ended[name] = key
    for each, its_key in self._ended.items():
      copy = self._copies[each]
      if not copy.is_whole(its_key) and not copy.is_begun(its_key):
        self._insist(each, lambda copy=copy, its_key=its_key: copy.begin(its_key))
      complete = functools.partial(copy.update, its_key, ended=True, go_on=lambda: not preemption.asked())
      self._insist(each, complete)
      if not copy.is_whole(its_key):
        preemption.check(f"the copy of {each} is not whole")

  def _insist(self, name: str, action: Callable[[], Any]) -> Any:
    fix = "The local files are whole: run the same command again when the remote can be reached"
    return remote.insist(action, f"the copy of {name} on {self._remote.url}", fix=fix)


def _keep_copying(copy: StageCopy, key: str, stop: threading.Event) -> None:
  """Copies every few seconds until told to stop; what fails is tried again, and raised when the stage ends."""
  pause = EVERY_S
  while not stop.wait(pause):
    try:
      copy.update(key, ended=False, go_on=lambda: not stop.is_set())
      pause = EVERY_S
    except Exception as error:  # training goes on without the network
      pause = min(2 * pause, max(_SLOWEST_S, EVERY_S))
      _log.warning("the copy of %s is behind (%s); again in %g s", copy.name, error, pause)


def _copy_last(copy: StageCopy, key: str, before: threading.Thread) -> None:
  """One more copy after the thread `before` has ended, within LAST_S in all; the log says what does not get there."""
  late, failures = threading.Event(), []

  def update() -> None:
    before.join()
    try:
      copy.update(key, ended=False, go_on=lambda: not late.is_set())
    except Exception as error:
      failures.append(error)

  thread = threading.Thread(target=update, name=f"last copy {copy.name}", daemon=True)
  thread.start()
  thread.join(LAST_S)
  late.set()
  if failures or thread.is_alive():
    reason = failures[0] if failures else f"not done in {LAST_S:g} s"
    here = copy.missing()
    _log.warning("the copy of %s ends behind (%s); %d files are only here: %s", copy.name, reason, len(here),
                 ", ".join(here[:_TOLD]) + ("" if len(here) <= _TOLD else ", …"))  # fmt: skip
