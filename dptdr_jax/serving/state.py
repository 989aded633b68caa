"""Where a server keeps its tasks and documents: a directory of its own, or a database that several servers share."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib

from dptdr_jax.backbone import Backbone
from dptdr_jax.core import lock, marks
from dptdr_jax.core.errors import InputError
from dptdr_jax.serving.catalog import Catalog, DirectoryCatalog
from dptdr_jax.serving.collections import Documents
from dptdr_jax.serving.embedded import EmbeddedDocuments

_SCHEMES = ("postgresql://", "postgres://")


@dataclasses.dataclass
class State:
  """Tasks and documents.

  Attributes:
    exit: closes them.
  """

  catalog: Catalog
  documents: Documents
  exit: contextlib.ExitStack


def is_database(place: str) -> bool:
  """Whether --state is the URL of a database."""
  return place.startswith(_SCHEMES)


def open_state(place: str, directory: pathlib.Path, backbone: Backbone) -> State:
  """Opens the state of a server.

  Args:
    place: URL of a database; anything else: the directory is the state.
    directory: the state, or with a database the copies of retrievers' files. No other process may use it meanwhile.

  Raises:
    InputError: another process uses the directory, it is damaged, or the database cannot be used.
  """
  marks.claim(directory, "server")
  with contextlib.ExitStack() as stack:
    _hold(stack, directory, "Name another --cache" if is_database(place) else
          "Several servers need PostgreSQL: --state=postgresql://USER@HOST/DATABASE")  # fmt: skip
    if is_database(place):
      catalog, documents = _in_database(stack, place, directory, backbone)
    else:
      catalog = DirectoryCatalog(directory, backbone)
      documents = EmbeddedDocuments(directory / "documents.sqlite")
      stack.callback(documents.close)
    return State(catalog, documents, stack.pop_all())


def _hold(stack: contextlib.ExitStack, directory: pathlib.Path, fix: str) -> None:
  try:
    stack.enter_context(lock.exclusive(directory))
  except InputError as error:
    raise InputError("another server uses this directory", path=directory, fix=fix) from error


def _in_database(
  stack: contextlib.ExitStack, url: str, cache: pathlib.Path, backbone: Backbone
) -> tuple[Catalog, Documents]:
  try:
    from dptdr_jax.serving.postgres import Database
    from dptdr_jax.serving.postgres_catalog import PostgresCatalog
    from dptdr_jax.serving.postgres_documents import PostgresDocuments
  except ImportError as error:
    raise InputError(f"a package for PostgreSQL is missing ({error.name})",
                     fix="pip install 'dptdr_jax[postgres]'") from error  # fmt: skip
  database = Database(url, backbone.config.hidden_size)
  stack.callback(database.close)
  return PostgresCatalog(database, cache, backbone), PostgresDocuments(database)
