"""What the server asks of a store of documents: one implementation is embedded, one is on PostgreSQL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dptdr_jax.core.errors import DptdrError
from dptdr_jax.serving.documents import Document


class StaleModel(DptdrError):
  """A query vector is of a retriever that the task no longer has: encode the query again."""


class StorageError(DptdrError):
  """The store cannot be read or written: a full disk, a damaged file, a lost connection."""


class StorageUnavailable(StorageError):
  """The store does not answer now: a lost connection, a timeout. Try again (503)."""


class DiskFull(StorageError):
  """There is no room for what should be stored (507)."""


class Busy(DptdrError):
  """Too many searches and writes are waiting for a thread (429)."""

  def __init__(self, waiting: int):
    super().__init__(f"{waiting} searches and writes are waiting. Try again in a second")


class Ranked(NamedTuple):
  """Documents by descending score; equal scores by ascending row."""

  rows: np.ndarray  # int64 [n], see Pending
  scores: np.ndarray  # float [n]


class Pending(NamedTuple):
  """A document without a vector. A row names one content: a document that is replaced gets another row."""

  row: int
  document: Document


class Made(NamedTuple):
  """The vector of a row, or why there is none."""

  row: int
  vector: np.ndarray | None  # float32 [H]
  cut: int = 0  # tokens that were cut off
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far the documents of a task are encoded.

  Attributes:
    documents: all of them; BM25 finds each one at once.
    encoded: with a vector of the task's present retriever.
    failed: that could not be encoded.
    truncated: that are longer than the task reads, whose end is not in their vector.
  """

  documents: int
  encoded: int
  failed: int
  truncated: int

  @property
  def pending(self) -> int:
    """Documents that wait for their vector."""
    return self.documents - self.encoded - self.failed


class Collection(Protocol):
  """The documents of one task. Thread-safe; what a method wrote is on the disk when it returns.

  Any method may raise StorageError, or UnknownTask where another server has removed the task.
  """

  def upsert(self, documents: Sequence[Document]) -> int:
    """Adds documents, or replaces those of the same id; returns how many now wait for a vector."""

  def delete(self, ids: Sequence[str]) -> int:
    """Removes documents; returns how many there were."""

  def get(self, name: str) -> Document | None:
    """The document of an id."""

  def take_pending(self, count: int) -> list[Pending]:
    """Some documents without a vector, which the caller will encode: they are not returned again until `give_back`."""

  def give_back(self, rows: Sequence[int]) -> None:
    """Documents that were taken and not encoded wait again."""

  def store(self, model: str, made: Sequence[Made]) -> None:
    """Stores vectors of documents that were taken. A row that is gone, or another model, is ignored."""

  def nearest(self, vector: np.ndarray, model: str, k: int, filters: dict[str, str]) -> Ranked:
    """The k largest inner products. Raises StaleModel if the model is not the present one."""

  def bm25(self, text: str, k: int, filters: dict[str, str]) -> Ranked:
    """The k best by BM25 among those that share a word with the text."""

  def documents(self, rows: Sequence[int]) -> dict[int, Document]:
    """The documents of some rows; one that was removed meanwhile is missing."""

  def progress(self) -> Progress:
    """How far encoding is."""


class Documents(Protocol):
  """All collections of a server."""

  def open(self, name: str, *, width: int, model: str, approximate: bool) -> Collection:
    """Opens a collection, or makes an empty one; of one that is open already, sets its retriever.

    Args:
      name: chosen by the server, never by a client.
      width: H.
      model: hash of the retriever. Vectors of another one are not served, and their documents are pending.
      approximate: search a graph (HNSW) instead of all vectors.
    """

  def drop(self, name: str) -> None:
    """Removes a collection with its documents."""

  def names(self) -> list[str]:
    """Collections that have documents."""

  def close(self) -> None:
    """Ends; nothing may be called afterwards."""
