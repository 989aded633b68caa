"""SHA-256 of files from outside, remembered by path, size and modification time."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from dptdr_jax.core import files, lock
from dptdr_jax.core.errors import InputError


class Fingerprints:
  """Hashes each file once; afterwards its size and time decide, unless `verify` asks for the bytes.

  Args:
    path: JSON file that remembers them; one that cannot be read counts as empty.
  """

  def __init__(self, path: files.Path, verify: bool = False):
    self._path, self._verify = pathlib.Path(path), verify
    self._seen: dict[str, str] = {}
    known = files.fields_in(path)
    self._known = {name: row for name, row in known.items() if isinstance(row, list) and len(row) == 3}

  def of(self, paths: Iterable[files.Path]) -> dict[str, str]:
    """Returns {path: SHA-256}.

    Raises:
      InputError: a file is missing or cannot be read.
    """
    before = dict(self._known)
    hashes = {name: self._hash(name) for name in map(os.fspath, paths)}
    if self._known != before:
      with lock.held(f"{self._path}.lock"):  # several runs may write here
        files.write_json(self._path, self._known)
    return hashes

  def _hash(self, name: str) -> str:
    if name not in self._seen:
      try:
        state = os.stat(name)
        size, time, known = self._known.get(name, [None, None, ""])
        if self._verify or (size, time) != (state.st_size, state.st_mtime_ns):
          known = files.sha256(name)
          self._known[name] = [state.st_size, state.st_mtime_ns, known]
      except OSError as error:
        raise InputError(f"the file cannot be read ({error.strerror})", path=name) from error
      self._seen[name] = known
    return self._seen[name]
