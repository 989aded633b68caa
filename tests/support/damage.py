"""A finished run of which one file is damaged, started again: it ends as before, or says in one line what is wrong."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pathlib
import shutil
import traceback
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from unittest import mock

from ml_collections import ConfigDict

from dptdr_jax.core import store
from dptdr_jax.core.errors import DptdrError, RetryableError
from dptdr_jax.pipeline import models
from dptdr_jax.pipeline.run import run

STARTS = 4  # until a run that asks to be started again is given up


class Case(NamedTuple):
  """One file of a run, and what happens to it; `late`: after the store has looked, readers have to notice."""

  file: str
  harm: str
  late: bool

  @property
  def kind(self) -> str:
    """The kind of artefact that the file belongs to; 'run' or 'store' of one that belongs to none."""
    parts = pathlib.Path(self.file).parts
    return parts[1] if len(parts) > 3 else parts[0] if parts[0] == "store" else "run"


def cases(workdir: pathlib.Path) -> Iterator[Case]:
  """All cases of a finished run."""
  for path in sorted(workdir.rglob("*")):
    if path.is_file() and not path.is_symlink() and path.name != "lock":
      for harm, late in itertools.product(("lost", "cut", "flipped"), (False, True)):
        case = Case(path.relative_to(workdir).as_posix(), harm, late)
        if not late or (case.kind not in ("run", "store") and path.name != store.ABOUT):
          yield case


def few(workdir: pathlib.Path, cheap: Sequence[str]) -> list[Case]:
  """One case of each kind of artefact, and one that is late of kinds of which little is made."""
  chosen: dict[tuple, tuple[int, Case]] = {}
  for case in cases(workdir):
    weight = zlib.crc32(f"{case.file.rpartition('/')[2]} {case.harm}".encode())
    if not case.late or (case.kind in cheap and case.harm != "flipped"):
      chosen[case.kind, case.late] = max(chosen.get((case.kind, case.late), (-1, case)), (weight, case))
  return [case for _, case in chosen.values()]


def try_all(config: ConfigDict, finished: pathlib.Path, work: pathlib.Path, listed: Sequence[Case]) -> None:
  """Tries some cases in this process; WORK.json lists those that did not end as they should, and how they did."""
  ends = {str(case): try_case(case, config, finished, work) for case in listed}
  work.with_suffix(".json").write_text(json.dumps({case: wrong for case, wrong in ends.items() if wrong}))


def try_case(case: Case, config: ConfigDict, finished: pathlib.Path, work: pathlib.Path) -> str:
  """Damages a copy of a finished run at `work`, and starts it until it ends; returns what is wrong then, or ''."""
  shutil.rmtree(work, ignore_errors=True)
  shutil.copytree(finished, work, symlinks=True)
  damage(work / case.file, case.harm)
  if case.late:
    artefact = "/".join(pathlib.Path(case.file).parts[1:3])
    for about in work.glob(f"store/*/*/{store.ABOUT}"):
      if f'"{artefact}"' in about.read_text(encoding="utf-8"):  # what is made of it is made again
        shutil.rmtree(about.parent)
  for start in range(STARTS):
    blind = mock.patch.object(store, "damage", _damage_by_checksums) if case.late and not start else _NOTHING
    try:
      with blind, contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        models.forget()
        run(config, work, verify=case.harm == "flipped" and not case.late)
    except RetryableError:
      continue
    except DptdrError as error:
      return "" if "\n" not in str(error) else str(error)
    except Exception:
      return traceback.format_exc()
    expected, found = results(finished), results(work)
    return ", ".join(name for name in {**expected, **found} if expected.get(name) != found.get(name))
  return f"no end after {STARTS} starts"


def results(workdir: pathlib.Path) -> dict[str, bytes]:
  """The bytes of results.json and of the run files."""
  paths = [workdir / "results.json", *sorted(workdir.glob("evaluate/runs/*.trec"))]
  return {path.relative_to(workdir).as_posix(): path.read_bytes() for path in paths}


_NOTHING = contextlib.nullcontext()
_damage = store.damage


def _damage_by_checksums(directory: pathlib.Path, verify: bool) -> str:
  """`store.damage`, but blind to sizes: as if the file was damaged after the store had looked."""
  return _damage(directory, verify) if verify else ""


def damage(path: pathlib.Path, harm: str) -> None:
  """Loses a file, or cuts it to half, or flips a bit in its middle."""
  content = bytearray(path.read_bytes())
  if harm == "lost" or not content:
    path.unlink()
  elif harm == "cut":
    path.write_bytes(content[: len(content) // 2])
  else:
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
