"""Measurements of a run over its steps: metrics.jsonl for programs, TensorBoard events for people."""

from __future__ import annotations

import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dptdr_jax.core import files
from dptdr_jax.runtime import hosts


class MetricWriter:
  """Appends {"step": …, name: value, …} to DIR/metrics.jsonl and the same values to DIR/tensorboard.

  Process 0 alone writes. On resuming, what an interrupted run wrote beyond the restored step goes, as does a line that
  it did not finish, so that the file ends as if nothing had happened; the events are written anew from the file.
  """

  def __init__(self, directory: str | os.PathLike, resume_step: int = 0, again: str = ""):
    """Opens both for appending.

    Args:
      directory: made if it is not there.
      resume_step: the last step whose records stay; 0 starts afresh.
      again: start of the names whose record of that step goes, too, as it will be written again; '': none.
    """
    self._stream = self._events = None
    if not hosts.is_main():
      return
    self._path = pathlib.Path(directory, "metrics.jsonl")
    kept = [record for record in read_metrics(self._path) if resume_step and record["step"] <= resume_step]
    if again:
      kept = [one for one in kept if one["step"] < resume_step or not any(name.startswith(again) for name in one)]
    with files.atomic_path(self._path) as partial:
      partial.write_text("".join(map(_line, kept)), encoding="utf-8")
    self._stream = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
    events = self._path.with_name("tensorboard")
    files.remove(events)
    self._events = _tensorboard().SummaryWriter(os.fspath(events))
    for record in kept:
      self._add_events(record)
    self._events.flush()

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one record and flushes it; `values` are scalars, those that are not finite become null in the file."""
    if self._stream is None:
      return
    record = {"step": int(step), **{name: float(value) for name, value in values.items()}}
    self._stream.write(_line(record))
    self._stream.flush()
    self._add_events(record)
    self._events.flush()

  def close(self) -> None:
    """Closes both files."""
    if self._stream is not None:
      self._stream.close()
      self._events.close()

  def _add_events(self, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
      if name != "step" and value is not None:
        self._events.add_scalar(name, value, record["step"])


def read_metrics(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Yields the records of a metrics.jsonl; a last line that was cut short, or a missing file, ends it quietly."""
  if not os.path.exists(path):
    return
  with open(path, encoding="utf-8") as stream:
    for line in stream:
      if not line.endswith("\n"):
        return
      yield json.loads(line)


def _tensorboard():
  """tensorboardX, without torch: it would import that wherever it is installed, which takes longer than all else."""
  absent = "torch" not in sys.modules
  if absent:
    sys.modules["torch"] = None  # an import of it raises ImportError, which tensorboardX is ready for
  try:
    import tensorboardX
  finally:
    if absent:
      del sys.modules["torch"]
  return tensorboardX


def _line(record: Mapping[str, Any]) -> str:
  finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
  return json.dumps(finite, allow_nan=False) + "\n"
