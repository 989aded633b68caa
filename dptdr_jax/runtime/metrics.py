"""Metrics of a training over its steps, in metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from dptdr_jax.core import files
from dptdr_jax.runtime.hosts import TEAM


class MetricWriter:
  """Appends {"step": …, name: value, …} to DIR/metrics.jsonl, in process 0 alone.

  On resuming, records beyond the restored step and an unfinished last line are removed, so the file ends as if there
  had been no interruption.
  """

  def __init__(self, directory: str | os.PathLike, resume_step: int = 0, again: str = ""):
    """Opens the file for appending.

    Args:
      directory: made if it is not there.
      resume_step: the last step whose records stay; 0 starts afresh.
      again: prefix of names that will be written again for that step, so their record is removed, too; '': none.
    """
    self._stream = None
    if not TEAM.is_main:
      return
    path = pathlib.Path(directory, "metrics.jsonl")
    kept = [record for record in read_metrics(path) if resume_step and record["step"] <= resume_step]
    if again:
      kept = [one for one in kept if one["step"] < resume_step or not any(name.startswith(again) for name in one)]
    with files.atomic_path(path) as partial:
      partial.write_text("".join(map(_line, kept)), encoding="utf-8")
    self._stream = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one record and flushes it; `values` are scalars, and null in the file if not finite."""
    if self._stream is not None:
      self._stream.write(_line({"step": int(step), **{name: float(value) for name, value in values.items()}}))
      self._stream.flush()

  def close(self) -> None:
    """Closes the file."""
    if self._stream is not None:
      self._stream.close()


def read_metrics(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
  """Yields the records of a metrics.jsonl up to a last line that was cut; nothing if there is no file."""
  if not os.path.exists(path):
    return
  with open(path, encoding="utf-8") as stream:
    for line in stream:
      if not line.endswith("\n"):
        return
      yield json.loads(line)


def _line(record: Mapping[str, Any]) -> str:
  finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
  return json.dumps(finite, allow_nan=False) + "\n"
