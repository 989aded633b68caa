"""Documents in a database that several servers share; the same answers as `embedded`.

A row of `documents` is one content: a document that is replaced gets a new row, so a vector that arrives late finds
its row gone. `pending` holds the rows without a vector of the present retriever, and who takes some has them for
LEASE_S seconds. Whoever writes to a collection holds the lock of its line in `collections`, which has its retriever
and its totals. Nothing is kept in memory, so all servers are equal.
"""

from __future__ import annotations

import collections
import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import psycopg
from psycopg import sql

from dptdr_jax.core.errors import InputError
from dptdr_jax.serving.collections import Made, Pending, Progress, Ranked, StaleModel
from dptdr_jax.serving.documents import Document
from dptdr_jax.serving.lexical import K1, B, tokenize
from dptdr_jax.serving.limits import UnknownTask
from dptdr_jax.serving.postgres import PARTITIONED, Database, partition
from dptdr_jax.serving.search import EF_CONSTRUCTION, EF_SEARCH, FEW, NEIGHBOURS

LEASE_S = 15  # of documents that a server encodes; it starts anew with each batch that this server takes or stores
_LONGEST_TOKEN = 128  # characters; an index entry must fit a third of a page
_LARGEST_EF, _LARGEST_GRAPH = 1000, 2000  # of pgvector: efSearch, and H
_NEAREST = """
SELECT c.model, v."row", v.score FROM dptdr_collections c LEFT JOIN LATERAL (
    SELECT "row", -(vector <#> %(vector)s) AS score FROM {vectors}
    WHERE model = %(model)s AND vector IS NOT NULL {filter} {order} LIMIT %(k)s) v ON c.model = %(model)s
WHERE c.number = %(number)s ORDER BY v.score DESC, v."row"
"""
_GRAPH = "ORDER BY vector <#> %(vector)s"
_EXACT = 'ORDER BY -(vector <#> %(vector)s) DESC, "row"'  # no index has this: all vectors are compared
# Weights come first, once a word, and a word's postings are read from the index alone: a join that the planner turns
# around, or a window over the postings, took three to eight times as long. In real (float4) equal documents tie.
_BM25 = """
WITH words AS (
    SELECT token, count(*) AS times, (SELECT count(*) FROM {postings} p WHERE p.token = given.token) AS frequency
    FROM unnest(%(tokens)s::text[]) AS given(token) GROUP BY token),
  weights AS MATERIALIZED (
    SELECT token, times * ln(1 + (documents - frequency + 0.5::float8) / (frequency + 0.5::float8)) AS weight,
      %(k1)s::float8 * (1 - %(b)s::float8) AS least,
      %(k1)s::float8 * %(b)s::float8 / greatest(tokens::float8 / greatest(documents, 1), 1e-9) AS slope
    FROM words CROSS JOIN dptdr_collections WHERE number = %(number)s),
  scored AS (
    SELECT "row", sum(weight * count / (count + least + slope * length))::real AS score
    FROM weights CROSS JOIN LATERAL (
      SELECT "row", count, length FROM {postings} p WHERE p.token = weights.token OFFSET 0) AS matched
    GROUP BY "row")
SELECT "row", score FROM scored {filter} ORDER BY score DESC, "row" LIMIT %(k)s
"""


class PostgresDocuments:
  """All collections of the servers on one database; see `collections.Documents`."""

  def __init__(self, database: Database):
    self._database = database

  def open(self, name: str, *, width: int, model: str, approximate: bool) -> PostgresCollection:
    """See `collections.Documents.open`; for a graph of 100,000 vectors that are there already it takes a minute.

    Raises:
      InputError: vectors of another width than the database's, or too wide for a graph.
    """
    if width != self._database.width:
      raise InputError(f"the vectors of this database have {self._database.width} numbers, not", value=width)
    if approximate and width > _LARGEST_GRAPH:
      raise InputError(f"a graph needs vectors of at most {_LARGEST_GRAPH} numbers", value=width, fix="Use exact")
    with self._database.transaction() as cursor:
      statement = "INSERT INTO dptdr_collections (name) VALUES (%s) ON CONFLICT DO NOTHING RETURNING number"
      if made := cursor.execute(statement, [name]).fetchone():
        for kind in PARTITIONED:
          cursor.execute(
            sql.SQL("CREATE TABLE {} PARTITION OF {} FOR VALUES IN ({})").format(
              partition(kind, made[0]), sql.Identifier(f"dptdr_{kind}"), made[0]
            )
          )
      number = cursor.execute("SELECT number FROM dptdr_collections WHERE name = %s", [name]).fetchone()[0]
    collection = PostgresCollection(self._database, number)
    collection.use(model, approximate)
    return collection

  def drop(self, name: str) -> None:
    """Removes a collection: its partitions, whatever their size."""
    with self._database.transaction() as cursor:
      statement = "DELETE FROM dptdr_collections WHERE name = %s RETURNING number"
      for (number,) in cursor.execute(statement, [name]).fetchall():
        for kind in PARTITIONED:
          cursor.execute(sql.SQL("DROP TABLE {}").format(partition(kind, number)))

  def names(self) -> list[str]:
    """Collections that there are."""
    return [name for (name,) in self._database.read("SELECT name FROM dptdr_collections")]

  def close(self) -> None:
    """Closes the connections."""
    self._database.close()


class PostgresCollection:
  """See `collections.Collection`. Its partitions are named in the statements: nothing has to be pruned."""

  def __init__(self, database: Database, number: int):
    self._database, self._number = database, number
    self._tables = {kind: partition(kind, number) for kind in PARTITIONED}
    self._approximate = False
    self._taken: set[int] = set()  # rows that this server encodes
    self._memory = threading.Lock()

  def _sql(self, statement: str, **parts: sql.Composable) -> sql.Composed:
    """A statement with the names of the partitions."""
    return sql.SQL(statement).format(**self._tables, **parts)

  def _lock(self, cursor: psycopg.Cursor) -> tuple[str, bool]:
    """The present retriever, and whether there is a graph; other writers wait until this transaction ends."""
    statement = "SELECT model, approximate FROM dptdr_collections WHERE number = %s FOR UPDATE"
    if (found := cursor.execute(statement, [self._number]).fetchone()) is None:
      raise UnknownTask("the task was removed meanwhile")
    return found

  def use(self, model: str, approximate: bool) -> None:
    """Sets the retriever and the kind of index, for all servers; finds out which documents need a vector."""
    with self._database.transaction() as cursor:
      former, was_approximate = self._lock(cursor)
      self._approximate = approximate
      if (former, was_approximate) == (model, approximate):
        return
      cursor.execute("SET LOCAL statement_timeout = '6h'; SET LOCAL maintenance_work_mem = '512MB'")
      if former != model:
        cursor.execute(self._sql("DELETE FROM {pending}"))
        cursor.execute(self._sql("""INSERT INTO {pending} (collection, "row") SELECT collection, "row"
          FROM {documents} d WHERE NOT EXISTS (SELECT FROM {vectors} v WHERE v."row" = d."row" AND v.model = %s)"""),
          [model])  # fmt: skip
        counted = self._sql("""UPDATE dptdr_collections SET (encoded, failed, truncated) = (
          SELECT count(vector), count(*) FILTER (WHERE error <> ''), count(*) FILTER (WHERE cut > 0)
          FROM {vectors} WHERE model = %s) WHERE number = %s""")
        cursor.execute(counted, [model, self._number])
      statement = "UPDATE dptdr_collections SET model = %s, approximate = %s WHERE number = %s"
      cursor.execute(statement, [model, approximate, self._number])
      self._make_graph(cursor, model if approximate else None)

  def _make_graph(self, cursor: psycopg.Cursor, model: str | None) -> None:
    """An index of this retriever's vectors alone: those of a former one would be in the way of a search."""
    graph = sql.Identifier(f"dptdr_graph_{self._number}")
    cursor.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(graph))
    if model is not None:
      cursor.execute(self._sql(
        "CREATE INDEX {graph} ON {vectors} USING hnsw (vector vector_ip_ops) WITH (m = {m}, ef_construction = {ef}) "
        "WHERE model = {model}", graph=graph, m=sql.Literal(NEIGHBOURS), ef=sql.Literal(EF_CONSTRUCTION),
        model=sql.Literal(model)))  # fmt: skip

  def upsert(self, documents: Sequence[Document], vectors: np.ndarray | None = None) -> int:
    """See `collections.Collection.upsert`; with `vectors` float32 [n, H] of the present model none has to be made."""
    last = {document.id: place for place, document in enumerate(documents)}  # of an id that comes twice
    with self._database.transaction() as cursor:
      model, _ = self._lock(cursor)
      statement = self._sql('SELECT id, "row", content FROM {documents} WHERE id = ANY (%s)')
      former = {name: (row, content) for name, row, content in cursor.execute(statement, [list(last)])}
      rows: dict[str, int] = {}
      for name, (row, content) in former.items():
        given = documents[last[name]]
        if (content["title"], content["text"]) == (given.title, given.text):
          rows[name] = row
          if content["fields"] != given.fields or list(content["fields"]) != list(given.fields):
            change = self._sql('UPDATE {documents} SET content = %s, pairs = %s WHERE "row" = %s')
            cursor.execute(change, [_content(given), _pairs(given.pairs()), row])
      self._remove(cursor, model, [row for name, (row, _) in former.items() if name not in rows])
      new = [documents[place] for name, place in sorted(last.items(), key=lambda item: item[1]) if name not in rows]
      numbered = self._insert(cursor, new)
      rows.update(numbered)
      made = [] if vectors is None else [Made(rows[name], vectors[place]) for name, place in last.items()]
      stored = self._store(cursor, model, made)
    return len({*numbered.values()} - stored)

  def _insert(self, cursor: psycopg.Cursor, new: Sequence[Document]) -> dict[str, int]:
    """Writes new documents, which wait for a vector; returns the row of each id."""
    if not new:
      return {}
    statement = "SELECT nextval('dptdr_rows') FROM generate_series(1, %s)"
    rows = sorted(row for (row,) in cursor.execute(statement, [len(new)]))
    tokens = [[_token(token) for token in one] for one in tokenize([document.searched() for document in new])]
    numbered = list(zip(rows, new, tokens, strict=True))
    self._copy(cursor, "documents", '"row", id, content, pairs, length', (
      (row, one.id, _content(one), _pairs(one.pairs()), len(words)) for row, one, words in numbered))  # fmt: skip
    self._copy(cursor, "postings", '"row", count, length, token', (
      (row, count, len(words), token) for row, _, words in numbered
      for token, count in sorted(collections.Counter(words).items())))  # fmt: skip
    self._copy(cursor, "pending", '"row"', ((row,) for row in rows))
    self._count(cursor, documents=len(new), tokens=sum(map(len, tokens)))
    return {document.id: row for row, document, _ in numbered}

  def _copy(self, cursor: psycopg.Cursor, kind: str, columns: str, rows: Iterable[tuple], types: Sequence[str] = ()):
    """Writes rows by COPY; with their types in PostgreSQL's binary form, where a vector is not written as text."""
    form = sql.SQL("(FORMAT BINARY)" if types else "")
    statement = self._sql(f"COPY {{{kind}}} (collection, {columns}) FROM STDIN {{form}}", form=form)
    with cursor.copy(statement) as copy:
      if types:
        copy.set_types(["int4", *types])
      for row in rows:
        copy.write_row((self._number, *row))

  def _count(self, cursor: psycopg.Cursor, **changes: int) -> None:
    """Adds to totals of the collection, which is locked."""
    if changes := {name: change for name, change in changes.items() if change}:
      sets = sql.SQL(", ").join(sql.SQL("{0} = {0} + %s").format(sql.Identifier(name)) for name in changes)
      statement = sql.SQL("UPDATE dptdr_collections SET {} WHERE number = %s").format(sets)
      cursor.execute(statement, [*changes.values(), self._number])

  def _remove(self, cursor: psycopg.Cursor, model: str, rows: Sequence[int]) -> None:
    """Removes rows from every table and from the totals."""
    if not rows:
      return
    lengths = cursor.execute(self._sql('DELETE FROM {documents} WHERE "row" = ANY (%s) RETURNING length'), [rows])
    lengths = [length for (length,) in lengths]
    for kind in ("postings", "pending"):
      cursor.execute(self._sql(f'DELETE FROM {{{kind}}} WHERE "row" = ANY (%s)'), [rows])
    statement = """DELETE FROM {vectors} WHERE "row" = ANY (%s) RETURNING model = %s, vector IS NOT NULL, error, cut"""
    gone = [one for one in cursor.execute(self._sql(statement), [rows, model]) if one[0]]
    self._count(
      cursor, documents=-len(lengths), tokens=-sum(lengths), encoded=-sum(has for _, has, _, _ in gone),
      failed=-sum(error != "" for _, _, error, _ in gone), truncated=-sum(cut > 0 for *_, cut in gone),
    )  # fmt: skip

  def delete(self, ids: Sequence[str]) -> int:
    """See `collections.Collection.delete`."""
    with self._database.transaction() as cursor:
      model, _ = self._lock(cursor)
      found = cursor.execute(self._sql('SELECT "row" FROM {documents} WHERE id = ANY (%s)'), [_valid(ids)])
      rows = [row for (row,) in found]
      self._remove(cursor, model, rows)
    return len(rows)

  def get(self, name: str) -> Document | None:
    """See `collections.Collection.get`."""
    statement = self._sql("SELECT id, content FROM {documents} WHERE id = ANY (%s)")
    return next((_document(*row) for row in self._database.read(statement, [_valid([name])])), None)

  def take_pending(self, count: int) -> list[Pending]:
    """See `collections.Collection.take_pending`."""
    with self._database.transaction() as cursor:
      self._renew(cursor)
      rows = cursor.execute(self._sql("""
        WITH free AS (
          SELECT "row" FROM {pending} WHERE until < now() ORDER BY "row" LIMIT %s FOR UPDATE SKIP LOCKED),
        taken AS (
          UPDATE {pending} p SET until = now() + %s * interval '1 s' FROM free WHERE p."row" = free."row"
          RETURNING p."row")
        SELECT "row", id, content FROM taken JOIN {documents} USING ("row") ORDER BY "row" """),
        [count, LEASE_S]).fetchall()  # fmt: skip
    with self._memory:
      self._taken.update(row for row, _, _ in rows)
    return [Pending(row, _document(name, content)) for row, name, content in rows]

  def _renew(self, cursor: psycopg.Cursor) -> None:
    """Begins the leases of this server anew: it is alive, and has other batches under way."""
    with self._memory:
      rows = list(self._taken)
    if rows:
      cursor.execute(self._sql("""UPDATE {pending} SET until = now() + %s * interval '1 s' WHERE "row" IN (
        SELECT "row" FROM {pending} WHERE "row" = ANY (%s) ORDER BY "row" FOR UPDATE SKIP LOCKED)"""),
        [LEASE_S, rows])  # fmt: skip

  def give_back(self, rows: Sequence[int]) -> None:
    """See `collections.Collection.give_back`."""
    with self._memory:
      self._taken.difference_update(rows)
    with self._database.transaction() as cursor:
      self._lock(cursor)
      self._give_back(cursor, rows)

  def _give_back(self, cursor: psycopg.Cursor, rows: Sequence[int]) -> None:
    statement = self._sql("""UPDATE {pending} SET until = '-infinity' WHERE "row" = ANY (%s)""")
    cursor.execute(statement, [list(rows)])

  def store(self, model: str, made: Sequence[Made]) -> None:
    """See `collections.Collection.store`."""
    with self._database.transaction() as cursor:
      present, _ = self._lock(cursor)
      if present == model:
        self._store(cursor, model, made)
        self._renew(cursor)
      else:
        self._give_back(cursor, [one.row for one in made])
    with self._memory:
      self._taken.difference_update(one.row for one in made)

  def _store(self, cursor: psycopg.Cursor, model: str, made: Sequence[Made]) -> set[int]:
    """Writes vectors of rows that wait for them, and returns these rows: others are gone, or have their vector."""
    if not made:
      return set()
    statement = self._sql('DELETE FROM {pending} WHERE "row" = ANY (%s) RETURNING "row"')
    rows = {row for (row,) in cursor.execute(statement, [[one.row for one in made]])}
    kept = [one for one in made if one.row in rows]
    cursor.execute(self._sql('DELETE FROM {vectors} WHERE "row" = ANY (%s)'), [list(rows)])  # of another retriever
    vectors = (None if one.vector is None else np.asarray(one.vector, np.float32) for one in kept)
    self._copy(cursor, "vectors", '"row", model, vector, cut, error', (
      (one.row, model, vector, one.cut, one.error.replace("\0", "")) for one, vector in zip(kept, vectors, strict=True)
    ), ("int8", "text", "vector", "int4", "text"))  # fmt: skip
    self._count(
      cursor, encoded=sum(one.vector is not None for one in kept), failed=sum(bool(one.error) for one in kept),
      truncated=sum(one.cut > 0 for one in kept),
    )  # fmt: skip
    return rows

  def nearest(self, vector: np.ndarray, model: str, k: int, filters: dict[str, str]) -> Ranked:
    """See `collections.Collection.nearest`."""
    values = {"vector": np.asarray(vector, np.float32), "model": model, "k": k, "number": self._number,
              "filter": _pairs(filters.items())}  # fmt: skip
    with self._database.connection() as connection:
      order = _GRAPH if self._approximate and self._passes(connection, filters) else _EXACT
      statement = self._sql(_NEAREST, filter=self._filter("AND", filters), order=sql.SQL(order))
      with connection.pipeline(), connection.transaction():
        depth = str(min(_LARGEST_EF, max(EF_SEARCH, 2 * k)))
        connection.execute("SELECT set_config('hnsw.ef_search', %s, true)", [depth])
        answer = connection.execute(statement, values)
      rows = answer.fetchall()
    if not rows:
      raise UnknownTask("the task was removed meanwhile")
    if rows[0][0] != model:
      raise StaleModel("the task was replaced meanwhile")
    return _ranked([row[1:] for row in rows if row[1] is not None])

  def _filter(self, word: str, filters: dict[str, str]) -> sql.Composable:
    """A condition on rows behind WHERE or AND; nothing without a filter."""
    chosen = f'{word} "row" IN (SELECT "row" FROM {{documents}} WHERE pairs @> %(filter)s)'
    return self._sql(chosen) if filters else sql.SQL("")

  def _passes(self, connection: psycopg.Connection, filters: dict[str, str]) -> bool:
    """Whether a filter leaves enough documents for a search in the graph."""
    if not filters:
      return True
    statement = self._sql("""SELECT c.documents, (
      SELECT count(*) FROM (SELECT FROM {documents} WHERE pairs @> %s LIMIT ceil(c.documents * %s::float8)::bigint))
      FROM dptdr_collections c WHERE number = %s""")
    row = connection.execute(statement, [_pairs(filters.items()), FEW, self._number]).fetchone()
    return row is not None and row[1] >= FEW * row[0]

  def bm25(self, text: str, k: int, filters: dict[str, str]) -> Ranked:
    """See `collections.Collection.bm25`."""
    tokens = [_token(token) for token in tokenize([text])[0]]
    if not tokens:
      return _ranked([])
    values = {"tokens": tokens, "number": self._number, "k1": K1, "b": B, "k": k, "filter": _pairs(filters.items())}
    return _ranked(self._database.read(self._sql(_BM25, filter=self._filter("WHERE", filters)), values))

  def documents(self, rows: Sequence[int]) -> dict[int, Document]:
    """See `collections.Collection.documents`."""
    wanted = list(map(int, rows))
    statement = self._sql('SELECT "row", id, content FROM {documents} WHERE "row" = ANY (%s)')
    found = {row: _document(name, content) for row, name, content in self._database.read(statement, [wanted])}
    return {row: found[row] for row in wanted if row in found}

  def progress(self) -> Progress:
    """See `collections.Collection.progress`."""
    statement = "SELECT documents, encoded, failed, truncated FROM dptdr_collections WHERE number = %s"
    rows = self._database.read(statement, [self._number])
    return Progress(*rows[0]) if rows else Progress(0, 0, 0, 0)


def _ranked(rows: Sequence[tuple[int, float]]) -> Ranked:
  return Ranked(np.array([row for row, _ in rows], np.int64), np.array([score for _, score in rows], np.float32))


def _token(token: str) -> str:
  return token if len(token) <= _LONGEST_TOKEN else hashlib.sha256(token.encode()).hexdigest()


def _content(document: Document) -> str:
  """As JSON, which the database keeps as it is: a text of PostgreSQL cannot hold every character."""
  about = {"title": document.title, "text": document.text, "fields": document.fields}
  return json.dumps(about, ensure_ascii=False)


def _document(name: str, content: dict[str, Any]) -> Document:
  return Document(name, content["text"], content["title"], content["fields"])


def _pairs(pairs: Iterable[tuple[str, str]]) -> str:
  """Names and values that a filter compares, as texts of JSON: types differ, and no character is special."""
  return json.dumps({json.dumps(name)[1:-1]: value for name, value in pairs})


def _valid(ids: Iterable[str]) -> list[str]:
  """Those that a document can have: the database refuses some characters."""
  return [name for name in ids if name.isprintable()]
