"""Documents in the state directory: SQLite holds them, FAISS and BM25 indexes in memory are made of it at the start.

A row of `documents` is one content: a document that is replaced gets a new row, so a vector that arrives late finds
its row gone and cannot be served for another text. Everything is committed (write-ahead log, synced) before a method
returns; the indexes follow the commit, so a kill at any moment leaves nothing to repair.
"""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from dptdr_jax.core.files import Path
from dptdr_jax.serving.collections import DiskFull, Made, Pending, Progress, Ranked, StaleModel, StorageError
from dptdr_jax.serving.documents import Document
from dptdr_jax.serving.lexical import Bm25Index
from dptdr_jax.serving.search import VectorIndex

_FORMAT = 1
_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)  # the second one: over a quota
_CHUNK = 2000  # rows read at a time, and removed in one transaction
_TABLES = """
CREATE TABLE IF NOT EXISTS documents (
  row INTEGER PRIMARY KEY AUTOINCREMENT, collection TEXT NOT NULL, id TEXT NOT NULL, title TEXT NOT NULL,
  text TEXT NOT NULL, fields TEXT NOT NULL, UNIQUE (collection, id));
CREATE INDEX IF NOT EXISTS documents_by_collection ON documents (collection, row);
CREATE TABLE IF NOT EXISTS vectors (
  row INTEGER PRIMARY KEY, collection TEXT NOT NULL, model TEXT NOT NULL, vector BLOB, cut INTEGER NOT NULL,
  error TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS vectors_by_collection ON vectors (collection, model);
CREATE TABLE IF NOT EXISTS fields (
  collection TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL, row INTEGER NOT NULL,
  PRIMARY KEY (collection, name, value, row)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS fields_by_row ON fields (row);
"""


class EmbeddedDocuments:
  """All collections of a server in one SQLite file; see `collections.Documents`."""

  def __init__(self, path: Path):
    """Opens the file, or makes it.

    Raises:
      StorageError: it is damaged, of another version, or cannot be written.
    """
    self.path = pathlib.Path(path)
    self.writing = threading.Lock()  # held over a transaction and what it changes in memory
    self._reading = threading.Lock()
    self._opened: dict[str, EmbeddedCollection] = {}
    with self._errors():
      self._writer, self._reader = (self._connect() for _ in range(2))
      version = self._writer.execute("PRAGMA user_version").fetchone()[0]
      if version not in (0, _FORMAT):
        raise StorageError(f"{self.path}: documents of another version ({version}). Name another --state")
      self._writer.executescript(_TABLES)
      self._writer.execute(f"PRAGMA user_version = {_FORMAT}")

  def _connect(self) -> sqlite3.Connection:
    connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=30)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA journal_size_limit = 67108864")
    return connection

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except sqlite3.Error as error:
      kind = DiskFull if getattr(error, "sqlite_errorcode", None) in _FULL else StorageError
      raise kind(f"{self.path}: {error}") from error

  @contextlib.contextmanager
  def transaction(self) -> Iterator[sqlite3.Connection]:
    """Commits at the end, or changes nothing. The caller holds `writing`."""
    with self._errors():
      self._writer.execute("BEGIN IMMEDIATE")
      try:
        yield self._writer
        self._writer.execute("COMMIT")
      except BaseException:
        if self._writer.in_transaction:  # SQLite itself rolls back when the disk is full
          self._writer.execute("ROLLBACK")
        raise

  def read(self, statement: str, values: Sequence = ()) -> list[tuple]:
    """Rows of a query; it sees what is committed, and does not wait for writers."""
    with self._errors(), self._reading:
      return self._reader.execute(statement, values).fetchall()

  def open(self, name: str, *, width: int, model: str, approximate: bool) -> EmbeddedCollection:
    """See `collections.Documents.open`; makes the indexes: seconds for 100,000 documents."""
    if name not in self._opened:
      self._opened[name] = EmbeddedCollection(self, name, width)
    self._opened[name].use(model, approximate)
    return self._opened[name]

  def drop(self, name: str) -> None:
    """Removes a collection, some documents at a time so that others can be written meanwhile."""
    self._opened.pop(name, None)
    for table in ("vectors", "fields", "documents"):
      count = 1
      while count:
        with self.writing, self.transaction() as writer:
          chosen = f"SELECT row FROM {table} WHERE collection = ? LIMIT {_CHUNK}"
          statement = f"DELETE FROM {table} WHERE collection = ? AND row IN ({chosen})"
          count = writer.execute(statement, (name, name)).rowcount

  def names(self) -> list[str]:
    """Collections that have documents."""
    return [name for (name,) in self.read("SELECT DISTINCT collection FROM documents")]

  def close(self) -> None:
    """Closes the file; its log is written back."""
    with self.writing, self._reading:
      self._reader.close()
      self._writer.close()


class EmbeddedCollection:
  """See `collections.Collection`."""

  def __init__(self, store: EmbeddedDocuments, name: str, width: int):
    self._store, self._name, self._width = store, name, width
    self._memory = threading.Lock()  # of everything below
    self._bm25 = Bm25Index()
    self._model, self._approximate = "", False
    first = -1
    statement = "SELECT row, title, text FROM documents WHERE collection = ? AND row > ? ORDER BY row LIMIT ?"
    while rows := store.read(statement, (name, first, _CHUNK)):
      self._bm25.add([row for row, _, _ in rows], [f"{title} {text}".strip() for _, title, text in rows])
      first = rows[-1][0]

  def use(self, model: str, approximate: bool) -> None:
    """Sets the retriever and the kind of index, and makes the index of the vectors that are there."""
    with self._store.writing:
      if (model, approximate) == (self._model, self._approximate):
        return
      index, failed, truncated = VectorIndex(self._width, approximate), set(), set()
      first, columns = -1, "row, vector, cut, error"
      statement = f"SELECT {columns} FROM vectors WHERE collection = ? AND model = ? AND row > ? ORDER BY row LIMIT ?"
      while rows := self._store.read(statement, (self._name, model, first, _CHUNK)):
        first = rows[-1][0]
        failed.update(row for row, _, _, error in rows if error)
        truncated.update(row for row, _, cut, _ in rows if cut)
        kept = [(row, vector) for row, vector, _, _ in rows if vector and len(vector) == 4 * self._width]
        vectors = np.frombuffer(b"".join(vector for _, vector in kept), np.float32).reshape(-1, self._width)
        index.add(np.array([row for row, _ in kept], np.int64), vectors)
      documents = self._store.read("SELECT row FROM documents WHERE collection = ? ORDER BY row", (self._name,))
      waiting = (row for (row,) in documents if row not in index and row not in failed)
      with self._memory:
        self._model, self._approximate = model, approximate
        self._index, self._failed, self._truncated = index, failed, truncated
        self._waiting = collections.OrderedDict.fromkeys(waiting)

  def upsert(self, documents: Sequence[Document], vectors: np.ndarray | None = None) -> int:
    """See `collections.Collection.upsert`; with `vectors` float32 [n, H] of the present model none has to be made."""
    with self._store.writing:
      removed: list[int] = []
      added: dict[int, Document] = {}
      made: dict[int, Made] = {}
      with self._store.transaction() as writer:
        for place, document in enumerate(documents):
          row = self._write(writer, document, removed, added)
          if vectors is not None and row not in self._index:
            made[row] = Made(row, vectors[place])
        self._write_vectors(writer, self._model, made.values())
      with self._memory:
        self._forget(removed)
        self._bm25.add(list(added), [document.searched() for document in added.values()])
        self._waiting.update(dict.fromkeys(added))
        self._add_vectors(made.values())
      return sum(row not in made for row in added)

  def _write(
    self, writer: sqlite3.Connection, document: Document, removed: list[int], added: dict[int, Document]
  ) -> int:
    """Writes one document and returns its row; the same title and text keep their row and vector."""
    key, fields = (self._name, document.id), json.dumps(document.fields, ensure_ascii=False)
    former = writer.execute("SELECT row, title, text FROM documents WHERE collection = ? AND id = ?", key).fetchone()
    if former and former[1:] == (document.title, document.text):
      row = former[0]
      writer.execute("UPDATE documents SET fields = ? WHERE row = ?", (fields, row))
      writer.execute("DELETE FROM fields WHERE row = ?", (row,))
    else:
      if former:
        self._delete(writer, former[0])
        removed.append(former[0])
        added.pop(former[0], None)
      statement = "INSERT INTO documents (collection, id, title, text, fields) VALUES (?, ?, ?, ?, ?)"
      row = writer.execute(statement, (*key, document.title, document.text, fields)).lastrowid
      added[row] = document
    pairs = [(self._name, name, value, row) for name, value in document.pairs()]
    writer.executemany("INSERT OR IGNORE INTO fields VALUES (?, ?, ?, ?)", pairs)
    return row

  def _delete(self, writer: sqlite3.Connection, row: int) -> None:
    for table in ("documents", "vectors", "fields"):
      writer.execute(f"DELETE FROM {table} WHERE row = ?", (row,))

  def _forget(self, rows: Sequence[int]) -> None:
    self._index.remove(list(rows))
    self._bm25.remove(rows)
    for row in rows:
      self._waiting.pop(row, None)
    self._failed.difference_update(rows)
    self._truncated.difference_update(rows)

  def delete(self, ids: Sequence[str]) -> int:
    """See `collections.Collection.delete`."""
    with self._store.writing:
      removed = []
      with self._store.transaction() as writer:
        for name in ids:
          statement = "SELECT row FROM documents WHERE collection = ? AND id = ?"
          if row := writer.execute(statement, (self._name, name)).fetchone():
            self._delete(writer, row[0])
            removed.append(row[0])
      with self._memory:
        self._forget(removed)
      return len(removed)

  def get(self, name: str) -> Document | None:
    """See `collections.Collection.get`."""
    rows = self._store.read("SELECT row FROM documents WHERE collection = ? AND id = ?", (self._name, name))
    return next(iter(self.documents([row for (row,) in rows]).values()), None)

  def take_pending(self, count: int) -> list[Pending]:
    """See `collections.Collection.take_pending`."""
    with self._memory:
      rows = [self._waiting.popitem(last=False)[0] for _ in range(min(count, len(self._waiting)))]
    return [Pending(row, document) for row, document in self.documents(rows).items()]

  def give_back(self, rows: Sequence[int]) -> None:
    """See `collections.Collection.give_back`."""
    with self._memory:
      self._waiting.update((row, None) for row in rows if row in self._bm25)

  def store(self, model: str, made: Sequence[Made]) -> None:
    """See `collections.Collection.store`."""
    with self._store.writing:
      if model != self._model:
        return
      made = [one for one in made if one.row in self._bm25 and one.row not in self._index]
      with self._store.transaction() as writer:
        self._write_vectors(writer, model, made)
      with self._memory:
        self._add_vectors(made)

  def _write_vectors(self, writer: sqlite3.Connection, model: str, made: Sequence[Made]) -> None:
    rows = [
      (one.row, self._name, model, None if one.vector is None else one.vector.astype(np.float32).tobytes(), one.cut,
       one.error) for one in made
    ]  # fmt: skip
    writer.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?, ?, ?, ?)", rows)

  def _add_vectors(self, made: Sequence[Made]) -> None:
    whole = [one for one in made if one.vector is not None]
    if whole:
      self._index.add(np.array([one.row for one in whole], np.int64), np.stack([one.vector for one in whole]))
    self._failed.update(one.row for one in made if one.error)
    self._truncated.update(one.row for one in made if one.cut)
    for one in made:
      self._waiting.pop(one.row, None)

  def nearest(self, vector: np.ndarray, model: str, k: int, filters: dict[str, str]) -> Ranked:
    """See `collections.Collection.nearest`."""
    rows = self._filtered(filters)
    with self._memory:
      if model != self._model:
        raise StaleModel("the task was replaced meanwhile")
      return self._index.search(vector, k, rows)

  def bm25(self, text: str, k: int, filters: dict[str, str]) -> Ranked:
    """See `collections.Collection.bm25`."""
    rows = self._filtered(filters)
    with self._memory:
      return self._bm25.search(text, k, rows)

  def _filtered(self, filters: dict[str, str]) -> np.ndarray | None:
    """Rows whose fields have all of some values; None: no filter."""
    rows = None
    for name, value in filters.items():
      statement = "SELECT row FROM fields WHERE collection = ? AND name = ? AND value = ?"
      some = np.array([row for (row,) in self._store.read(statement, (self._name, name, value))], np.int64)
      rows = some if rows is None else np.intersect1d(rows, some)
    return rows

  def documents(self, rows: Sequence[int]) -> dict[int, Document]:
    """See `collections.Collection.documents`."""
    found = {}
    for start in range(0, len(rows), _CHUNK):
      some = [int(row) for row in rows[start : start + _CHUNK]]
      marks = ", ".join("?" * len(some))
      statement = f"SELECT row, id, title, text, fields FROM documents WHERE collection = ? AND row IN ({marks})"
      for row, name, title, text, fields in self._store.read(statement, (self._name, *some)):
        found[row] = Document(name, text, title, json.loads(fields))
    return {row: found[row] for row in map(int, rows) if row in found}

  def progress(self) -> Progress:
    """See `collections.Collection.progress`."""
    with self._memory:
      return Progress(len(self._bm25), len(self._index), len(self._failed), len(self._truncated))
