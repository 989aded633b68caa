"""Which tasks the servers on one database have, and the files of their retrievers; each server keeps a local copy."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import psycopg
from psycopg.types.json import Json

from dptdr_jax.backbone import Backbone
from dptdr_jax.core.errors import InputError
from dptdr_jax.serving.catalog import MOST_BYTES, Catalog, Entry, check_files, check_name
from dptdr_jax.serving.postgres import Database


class PostgresCatalog(Catalog):
  """The tasks in a database; `version` grows with each change."""

  shared = True

  def __init__(self, database: Database, cache: pathlib.Path, backbone: Backbone):
    """Reads the tasks.

    Raises:
      InputError: they are on another backbone, or of another version.
    """
    super().__init__(cache / "retrievers", backbone)
    self._database = database
    self._connection: psycopg.Connection | None = None  # holds the lock
    with database.transaction() as cursor:
      cursor.execute("UPDATE dptdr_server SET backbone = %s WHERE backbone = ''", [backbone.hash])
      known = cursor.execute("SELECT backbone FROM dptdr_server").fetchone()[0]
    if known != backbone.hash:
      raise InputError(f"the tasks of this database are on another backbone than {backbone.path}",
                       fix="Name their backbone, or another database")  # fmt: skip
    self.refresh()

  def version(self) -> int:
    """See `Catalog.version`."""
    return self._database.read("SELECT version FROM dptdr_server")[0][0]

  def refresh(self) -> int:
    """See `Catalog.refresh`."""
    rows = self._database.read(
      "SELECT version, name, entry FROM dptdr_server LEFT JOIN dptdr_tasks ON true ORDER BY name"
    )
    try:
      self._entries = {name: Entry(check_name(name), **fields) for _, name, fields in rows if name is not None}
    except TypeError:
      raise InputError("the tasks of this database are of another version", fix="Update this server") from None
    return rows[0][0]

  @contextlib.contextmanager
  def changing(self) -> Iterator[None]:
    """See `Catalog.changing`."""
    with self._database.locked() as connection:
      self._connection = connection
      try:
        yield
      finally:
        self._connection = None

  @contextlib.contextmanager
  def reading(self) -> Iterator[None]:
    """See `Catalog.reading`."""
    with self._database.locked(shared=True):
      yield

  def _write(self, entries: Mapping[str, Entry]) -> None:
    """On the connection that holds the lock: one that has lost it can write nothing."""
    with self._connection.transaction(), self._connection.cursor() as cursor:
      needed = {entry.content for entry in entries.values()}
      known = {content for (content,) in cursor.execute("SELECT DISTINCT content FROM dptdr_files")}
      for content in needed - known:
        home = self._home / content
        files = [(content, name, (home / name).read_bytes()) for name in MOST_BYTES if (home / name).is_file()]
        cursor.executemany("INSERT INTO dptdr_files VALUES (%s, %s, %s)", files)
      cursor.execute("DELETE FROM dptdr_files WHERE content <> ALL (%s)", [sorted(needed)])
      cursor.execute("DELETE FROM dptdr_tasks")
      rows = [(name, Json(entry.fields())) for name, entry in entries.items()]
      cursor.executemany("INSERT INTO dptdr_tasks VALUES (%s, %s)", rows)
      cursor.execute("UPDATE dptdr_server SET version = version + 1")

  def _fetch(self, content: str, directory: pathlib.Path) -> None:
    """See `Catalog._fetch`."""
    given = {}
    for name, content_of in self._database.read("SELECT name, bytes FROM dptdr_files WHERE content = %s", [content]):
      if name in MOST_BYTES:
        given[name] = directory / name
        given[name].parent.mkdir(exist_ok=True)
        given[name].write_bytes(content_of)
    if not given or check_files(given) != content:
      raise InputError("the files of a task are damaged in the database", value=content,
                       fix="Remove the task, and put it again")  # fmt: skip
