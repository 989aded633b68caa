"""FAISS indexes by factory string, inner product, built from embeddings on disk and kept in a directory."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import faiss
import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_directory, read_json, write_json
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import checked_queries, faiss_threads, search_ties

_FORMAT = 1
_PARAMETERS = ("nprobe", "efSearch")
_STRINGS = 'Write one as FAISS does: "Flat", "IVF1024,Flat", "IVF1024,PQ48", "HNSW32", …'


class Index:
  """A FAISS index and what it was made from.

  Attributes:
    faiss: the index itself.
    manifest: factory string, count, width, training sample, seed, and the embeddings' source.
  """

  def __init__(self, index: faiss.Index, manifest: Mapping[str, object]):
    self.faiss, self.manifest = index, dict(manifest)

  def __len__(self) -> int:
    """Number of passages."""
    return self.faiss.ntotal

  @classmethod
  def build(
    cls, embeddings: Embeddings, factory: str = "Flat", *, sample: int = 1_000_000, seed: int = 0,
    threads: int | None = None, block_rows: int = 131_072,
  ) -> Index:  # fmt: skip
    """Trains an index on a sample, where it is of a kind that is trained, and adds all passages in row order.

    The index is held in memory ("Flat": 4 · C · H bytes; "…PQm": about m + 8 bytes a passage), and with it the sample
    and one block. Built again from the same arguments it is the same, but for HNSW: several threads link its graph in
    the order in which they come, so ask for threads=1 where that matters.

    Args:
      embeddings: C passages.
      factory: FAISS' factory string.
      sample: passages to train on (faiss takes at most 256 a centroid of them), drawn without repetition.
      seed: of the sample.
      threads: faiss' threads; None: all cores.
      block_rows: passages added at a time.

    Raises:
      InputError: a string that FAISS doesn't know, that doesn't fit the width, or that wants more passages.
    """
    index = _made(embeddings.width, factory)
    _leave_out_polysemous_codes(index)
    with faiss_threads(threads):
      if not index.is_trained:
        chosen = np.random.default_rng(seed).choice(len(embeddings), min(sample, len(embeddings)), replace=False)
        try:
          index.train(embeddings.take(np.sort(chosen)))
        except RuntimeError as error:
          fix = "Take fewer lists or centroids, or a larger sample."
          raise InputError(
            f"cannot train on {len(chosen)} passages ({_brief(error)})", value=factory, fix=fix
          ) from error
      with progress.bar(f"index {factory}", len(embeddings), "passage") as shown:
        for _, block in embeddings.blocks(block_rows):
          index.add(block)
          shown.advance(len(block))
          preemption.check("the index will be built again")
    manifest = {
      "format": _FORMAT, "kind": "index", "factory": factory, "count": len(embeddings), "width": embeddings.width,
      "sample": sample, "seed": seed, "source": embeddings.source, "dtype": embeddings.dtype,
    }  # fmt: skip
    return cls(index, manifest)

  @classmethod
  def check(cls, width: int, factory: str, parameters: Mapping[str, int]) -> None:
    """Raises InputError for a factory string or search parameters that `build` or `set_parameters` would refuse."""
    if factory != "Flat":
      cls(_made(width, factory), {"factory": factory}).set_parameters(parameters)

  def save(self, directory: Path) -> None:
    """Writes index and manifest, atomically."""
    with atomic_directory(directory) as partial:
      try:
        faiss.write_index(self.faiss, str(partial / "index.faiss"))
      except RuntimeError as error:
        raise OSError(f"{directory}: FAISS cannot write its index ({_brief(error)})") from error
      write_json(partial / "manifest.json", self.manifest)

  @classmethod
  def load(cls, directory: Path) -> Index:
    """Reads what `save` wrote.

    Raises:
      InputError: no index, or one that is not whole.
    """
    manifest = read_json(pathlib.Path(directory, "manifest.json"))
    if manifest.get("format") != _FORMAT or manifest.get("kind") != "index":
      raise InputError("not an index of this version", path=directory, fix="Build it again.")
    path = pathlib.Path(directory, "index.faiss")
    try:
      index = faiss.read_index(str(path))
    except RuntimeError as error:
      raise InputError(f"FAISS cannot read its index ({_brief(error)})", path=path, fix="Build it again.") from error
    if index.ntotal != manifest["count"] or index.d != manifest["width"]:
      raise InputError(f"index has {index.ntotal} vectors, its manifest says {manifest['count']}", path=path)
    return cls(index, manifest)

  def set_parameters(self, parameters: Mapping[str, int]) -> None:
    """Sets what trades speed for recall: {"nprobe": 32} for IVF, {"efSearch": 128} for HNSW.

    Raises:
      InputError: the index has no such parameter, or the value is not a whole number from 1.
    """
    for name, value in parameters.items():
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"search parameter {name} is not a whole number from 1", value=value)
      try:
        if name not in _PARAMETERS:
          raise RuntimeError(name)
        faiss.ParameterSpace().set_index_parameter(self.faiss, name, value)
      except RuntimeError as error:
        raise InputError(f"index {self.manifest['factory']} has no search parameter of this name", value=name,
                         fix="IVF has nprobe, HNSW has efSearch, Flat has none.") from error  # fmt: skip

  def search(self, queries: np.ndarray, k: int, *, threads: int | None = None, query_rows: int = 4096) -> Run:
    """Finds k passages for each query; equal scores stand by ascending row.

    Args:
      queries: float32 [Q, H].
      k: depth; where fewer passages are found (k beyond the index, few lists probed) −1 fills the end.
      threads: faiss' threads; None: all cores.
      query_rows: queries at a time.

    Returns:
      A run [Q, k].
    """
    queries = checked_queries(queries, self.faiss.d)
    if k < 1:
      raise ValueError(f"k = {k} is not a depth")
    run, depth = Run.empty(len(queries), k), min(k, len(self))
    with faiss_threads(threads), progress.bar("search index", len(queries), "query") as shown:
      for start in range(0, len(queries), query_rows):
        part = slice(start, start + query_rows)
        found = search_ties(self.faiss.search, queries[part], depth, len(self))
        run.rows[part, :depth], run.scores[part, :depth] = found.rows, found.scores
        shown.advance(len(found))
        preemption.check("the search will begin again")
    return run


def _made(width: int, factory: str) -> faiss.Index:
  """An empty index."""
  try:
    return faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
  except RuntimeError as error:
    raise InputError(f"no FAISS index of width {width} ({_brief(error)})", value=factory, fix=_STRINGS) from error


def _leave_out_polysemous_codes(index: faiss.Index) -> None:
  """Saves the simulated annealing (3 s a byte of code) for a filter that no search here turns on."""
  if isinstance(index, faiss.IndexPreTransform):
    index = faiss.downcast_index(index.index)
  if isinstance(index, faiss.IndexPQ | faiss.IndexIVFPQ):
    index.do_polysemous_training = False


def _brief(error: RuntimeError) -> str:
  """FAISS' message without the C++ function that it names first."""
  return str(error).rsplit(": ", 1)[-1]
