"""A database that several servers share: its connections, its tables, and its errors as ours."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import psycopg
from pgvector.psycopg import register_vector
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool

from dptdr_jax.core.errors import InputError, OutageError
from dptdr_jax.serving.collections import DiskFull, StorageError, StorageUnavailable
from dptdr_jax.serving.limits import UnknownTask

log = logging.getLogger(__name__)

PARTITIONED = ("documents", "vectors", "postings", "pending")  # by collection; a dropped task drops partitions
_FORMAT = 1
_LOCK = 0x6470_7464_72  # of the database's advisory locks: "dptdr"
_SETUP = _LOCK + 1
_CONNECTIONS = 16  # more than the threads that use them
_WAIT_S = 3  # for a connection
_LARGEST_PLAIN = 1990  # H; a row with its vector must fit a page of 8 kB
_PARAMETERS = {  # of a connection: whatever the network does, no call hangs
  "connect_timeout": 5, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 2,
  "tcp_user_timeout": 15_000, "application_name": "dptdr_jax",
}  # fmt: skip
# Seconds that a statement may take; what a failed disk or a standby would lose is not acknowledged; compiling a plan
# takes longer than most of them. In a filtered graph search goes on until enough documents pass the filter. Without
# `fastupdate` a search never reads a list of what has still to be put into the index of the filters.
_SESSION = """
SET statement_timeout = '20s'; SET lock_timeout = '15s'; SET idle_in_transaction_session_timeout = '60s';
SET synchronous_commit = on; SET jit = off; SET work_mem = '64MB';
SET client_encoding = 'UTF8'; SET client_min_messages = warning;
SET hnsw.iterative_scan = strict_order; SET hnsw.max_scan_tuples = 200000; SET hnsw.scan_mem_multiplier = 4
"""
_TABLES = """
CREATE TABLE IF NOT EXISTS dptdr_server (
  one boolean PRIMARY KEY DEFAULT true CHECK (one), format integer NOT NULL, width integer NOT NULL,
  backbone text NOT NULL DEFAULT '', version bigint NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS dptdr_tasks (name text PRIMARY KEY, entry jsonb NOT NULL);
CREATE TABLE IF NOT EXISTS dptdr_files (
  content text, name text, bytes bytea NOT NULL, PRIMARY KEY (content, name));
CREATE TABLE IF NOT EXISTS dptdr_collections (
  number integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL UNIQUE, model text NOT NULL DEFAULT '',
  approximate boolean NOT NULL DEFAULT false, documents bigint NOT NULL DEFAULT 0, tokens bigint NOT NULL DEFAULT 0,
  encoded bigint NOT NULL DEFAULT 0, failed bigint NOT NULL DEFAULT 0, truncated bigint NOT NULL DEFAULT 0);
CREATE SEQUENCE IF NOT EXISTS dptdr_rows;
CREATE TABLE IF NOT EXISTS dptdr_documents (
  collection integer NOT NULL, "row" bigint NOT NULL, id text COLLATE "C" NOT NULL, content json NOT NULL,
  pairs jsonb NOT NULL, length integer NOT NULL, PRIMARY KEY ("row", collection), UNIQUE (id, collection))
  PARTITION BY LIST (collection);
CREATE INDEX IF NOT EXISTS dptdr_documents_pairs ON dptdr_documents USING gin (pairs jsonb_path_ops)
  WITH (fastupdate = off);
CREATE TABLE IF NOT EXISTS dptdr_vectors (
  collection integer NOT NULL, "row" bigint NOT NULL, model text NOT NULL, vector vector({width}),
  cut integer NOT NULL, error text NOT NULL, PRIMARY KEY ("row", collection)) PARTITION BY LIST (collection);
CREATE TABLE IF NOT EXISTS dptdr_postings (
  collection integer NOT NULL, "row" bigint NOT NULL, count integer NOT NULL, length integer NOT NULL,
  token text COLLATE "C" NOT NULL, PRIMARY KEY (token, "row", collection) INCLUDE (count, length))
  PARTITION BY LIST (collection);
CREATE INDEX IF NOT EXISTS dptdr_postings_row ON dptdr_postings ("row");
CREATE TABLE IF NOT EXISTS dptdr_pending (
  collection integer NOT NULL, "row" bigint NOT NULL, until timestamptz NOT NULL DEFAULT '-infinity',
  PRIMARY KEY ("row", collection)) PARTITION BY LIST (collection);
INSERT INTO dptdr_server (format, width) VALUES ({format}, {width})
"""


class Database:
  """Connections to one database, with the tables of a server. Thread-safe."""

  def __init__(self, url: str, width: int):
    """Connects, and makes the tables if there are none.

    Args:
      url: postgresql://USER@HOST/DATABASE; a password may stand in it, in PGPASSWORD or in ~/.pgpass.
      width: H of the backbone, the same for all servers on this database.

    Raises:
      InputError: no valid URL, no pgvector, or a database of another width or version.
      OutageError: no connection.
    """
    _check_url(url)
    self.width, self._checking = width, threading.Lock()
    try:
      with psycopg.connect(url, **_PARAMETERS, autocommit=True) as connection:
        _set_up(connection, width)
    except psycopg.OperationalError as error:
      raise OutageError(f"the database does not answer ({_line(error)})") from None
    except psycopg.Error as error:
      raise InputError(f"the database cannot be used ({_line(error)})") from None
    # A database that was away is tried anew by every call: the pool itself would wait longer after each attempt.
    self._pool = ConnectionPool(
      url, kwargs={**_PARAMETERS, "autocommit": True, "prepare_threshold": None}, min_size=1, max_size=_CONNECTIONS,
      timeout=_WAIT_S, reconnect_timeout=_WAIT_S, configure=_configure, open=True,
    )  # fmt: skip
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # one line an attempt; our errors say it

  @contextlib.contextmanager
  def connection(self) -> Iterator[psycopg.Connection]:
    """A connection; every statement is a transaction.

    Raises:
      StorageUnavailable: it is lost, or a statement took too long.
      UnknownTask: the partition of a task was dropped.
      DiskFull, StorageError: anything else.
    """
    try:
      with self._pool.connection() as connection:
        yield connection
    except errors.UndefinedTable as error:
      raise UnknownTask("the task was removed meanwhile") from error
    except errors.DiskFull as error:
      raise DiskFull("the disk of the database is full") from error
    except (psycopg.OperationalError, psycopg.InterfaceError, errors.ReadOnlySqlTransaction) as error:
      if not isinstance(error, errors.QueryCanceled | errors.LockNotAvailable | errors.DeadlockDetected):
        self._drop_broken()
      raise StorageUnavailable(f"the database does not answer ({_line(error)})") from error
    except psycopg.Error as error:
      raise StorageError(f"the database refuses a statement ({_line(error)})") from error

  @contextlib.contextmanager
  def transaction(self) -> Iterator[psycopg.Cursor]:
    """A transaction: committed at the end, or nothing is changed. Errors as in `connection`."""
    with self.connection() as connection, connection.transaction(), connection.cursor() as cursor:
      yield cursor

  def read(self, statement: sql.Composed | str, values: Any = None) -> list[tuple]:
    """Rows of a query."""
    with self.connection() as connection:
      return connection.execute(statement, values).fetchall()

  @contextlib.contextmanager
  def locked(self, shared: bool = False) -> Iterator[psycopg.Connection]:
    """Holds a lock on the set of tasks among all servers, by the connection that is yielded.

    A server that dies loses its connection, and so the lock.
    """
    kind = sql.SQL("_shared" if shared else "")
    with self.connection() as connection:
      connection.execute(sql.SQL("SELECT pg_advisory_lock{}({})").format(kind, _LOCK))
      try:
        yield connection
      finally:
        with contextlib.suppress(psycopg.Error):
          connection.execute(sql.SQL("SELECT pg_advisory_unlock{}({})").format(kind, _LOCK))

  def close(self) -> None:
    """Closes the connections."""
    self._pool.close()

  def _drop_broken(self) -> None:
    """After a lost connection the others are likely lost, too: the next calls shall not have to find out.

    In a thread: where the network swallows everything, each connection takes seconds to be found broken.
    """

    def check() -> None:
      with self._checking, contextlib.suppress(psycopg.Error):
        self._pool.check()

    if not self._checking.locked():
      threading.Thread(target=check, name="connections", daemon=True).start()


def partition(kind: str, number: int) -> sql.Identifier:
  """The name of a collection's partition."""
  return sql.Identifier(f"dptdr_{kind}_{number}")


def _check_url(url: str) -> None:
  """Raises InputError for a URL whose errors would show a part of the password as a host, a port or a database."""
  try:
    parts = conninfo_to_dict(url)
  except psycopg.Error:
    parts = {"port": "?"}
  named = (str(parts.get(name) or "") for name in ("host", "dbname"))
  if any("@" in part for part in named) or not str(parts.get("port") or "0").replace(",", "").isdigit():
    raise InputError("not a valid URL of a database", fix="Use postgresql://USER@HOST/DATABASE, and in a password "
                     "%40 for @, %2F for /, %3A for : and %25 for %")  # fmt: skip


def _configure(connection: psycopg.Connection) -> None:
  connection.execute(_SESSION)
  register_vector(connection)


def _set_up(connection: psycopg.Connection, width: int) -> None:
  """Makes the extension and the tables; one server at a time."""
  if (encoding := connection.execute("SHOW server_encoding").fetchone()[0]) != "UTF8":
    raise InputError("the database must have the encoding UTF8", value=encoding)
  connection.execute("SET statement_timeout = '20s'; SET client_min_messages = warning")
  with connection.transaction():
    connection.execute("SELECT pg_advisory_xact_lock(%s)", [_SETUP])
    _make_extension(connection)
    if connection.execute("SELECT to_regclass('dptdr_server')").fetchone()[0] is None:
      connection.execute(_TABLES.format(width=width, format=_FORMAT))
      if width <= _LARGEST_PLAIN:  # beside its row, not in a table of large values, which takes a look-up for each
        connection.execute("ALTER TABLE dptdr_vectors ALTER COLUMN vector SET STORAGE PLAIN")
    known, former = connection.execute("SELECT format, width FROM dptdr_server").fetchone()
  if known != _FORMAT:
    raise InputError(f"a database of another version ({known})", fix="Name another one")
  if former != width:
    raise InputError(f"the vectors of this database have {former} numbers, and the backbone's", value=width,
                     fix="Name another database: one has the tasks of one backbone")  # fmt: skip


def _make_extension(connection: psycopg.Connection) -> None:
  try:
    with connection.transaction():
      connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
  except psycopg.Error as error:
    if isinstance(error, psycopg.OperationalError):
      raise
    raise InputError(f"the extension pgvector cannot be made ({_line(error)})",
                     fix="Install it, and run CREATE EXTENSION vector as an administrator") from None  # fmt: skip
  version = connection.execute("SELECT extversion FROM pg_extension WHERE extname = 'vector'").fetchone()[0]
  if tuple(map(int, version.split(".")[:2])) < (0, 8):
    raise InputError("the extension pgvector is too old", value=version, fix="Update it to 0.8 or later")


def _line(error: psycopg.Error) -> str:
  """The first line of an error; libpq's texts have no password of a valid URL."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
