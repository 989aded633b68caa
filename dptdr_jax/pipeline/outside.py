"""Files from outside as inputs: named and hashed by their contents, wherever they lie."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from dptdr_jax.core import files, remote
from dptdr_jax.core.fingerprints import Fingerprints
from dptdr_jax.core.store import Inputs, neutral

_MANY = 16  # more files are told by one hash over all


class Files(Inputs):
  """Some files.

  Attributes:
    hashes: SHA-256 by name, relative to the directory; of many files one hash over all.
    directory: where they lie today; a copy elsewhere is the same input.
  """

  hashes: dict[str, str]
  directory: str = neutral("")


class Outside:
  """Hashes the files from outside; in a run of several processes the first one does, and the others are told.

  Attributes:
    known: {path: SHA-256} of all files asked for so far.
  """

  def __init__(self, fingerprints: Fingerprints | None = None, known: Mapping[str, str] | None = None):
    self._fingerprints, self.known = fingerprints, dict(known or {})

  def files(self, directory: files.Path, paths: Sequence[files.Path]) -> Files:
    """Some files of a directory, or of one above it.

    Raises:
      InputError: one is missing or cannot be read.
    """
    if self._fingerprints is not None:
      self.known |= self._fingerprints.of(paths)
    named = {_name(path, directory): self.known[str(path)] for path in paths}
    if len(named) > _MANY:
      text = "\n".join(f"{name} {named[name]}" for name in sorted(named))
      named = {f"{len(named)} files": files.sha256_of(text.encode())}
    return Files(hashes=named, directory=str(directory))


def _name(path: files.Path, directory: files.Path) -> str:
  """From the directory on; of a file elsewhere the URL it was fetched from, or its path."""
  path = pathlib.Path(path)
  if path.is_relative_to(directory):
    return path.relative_to(directory).as_posix()
  return remote.origin(path)
