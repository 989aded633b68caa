"""FAISS indexes by factory string, inner product, built from embeddings on disk and kept in a directory."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import faiss
import numpy as np

from dptdr_jax.core import preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.files import Path, atomic_path, read_json, write_json
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.retrieval.runs import Run
from dptdr_jax.retrieval.search import checked_queries, search_ties

_FORMAT = 1
_KIND = "index"
_AGAIN = "Build it again"
_PASSAGES, _QUERIES = 131_072, 4096  # added and searched for at a time
_PARAMETERS = ("nprobe", "efSearch")
_STRINGS = 'Write one as FAISS does: "Flat", "IVF1024,Flat", "IVF1024,PQ48", "HNSW32", …'


class Index:
  """A FAISS index and what it was made from. FAISS works on all cores.

  Attributes:
    faiss: the index itself.
    manifest: factory string, count, width, training sample, and the embeddings' source.
  """

  def __init__(self, index: faiss.Index, manifest: Mapping[str, object]):
    self.faiss, self.manifest = index, dict(manifest)

  def __len__(self) -> int:
    """Number of passages."""
    return self.faiss.ntotal

  @classmethod
  def build(cls, embeddings: Embeddings, factory: str = "Flat", *, sample: int = 1_000_000) -> Index:
    """Trains an index on a sample, if its kind is trained, and adds all passages in row order.

    The index is held in memory ("Flat": 4 · C · H bytes; "…PQm": about m + 8 bytes a passage), and with it the sample
    and one block. The same arguments give the same index, except for HNSW: its graph depends on the order in which
    threads insert passages.

    Args:
      embeddings: C passages.
      factory: FAISS' factory string.
      sample: passages to train on (faiss takes at most 256 a centroid of them), drawn without replacement.

    Raises:
      InputError: a string that FAISS doesn't know, that doesn't fit the width, or that needs more passages.
    """
    index = _empty(embeddings.width, factory)
    _skip_polysemous_training(index)
    if not index.is_trained:
      chosen = np.random.default_rng(0).choice(len(embeddings), min(sample, len(embeddings)), replace=False)
      try:
        index.train(embeddings.take(np.sort(chosen)))
      except RuntimeError as error:
        fix = "Take fewer lists or centroids, or a larger sample"
        raise InputError(f"cannot train on {len(chosen)} passages ({_brief(error)})", value=factory, fix=fix) from error
    with progress.bar(f"index {factory}", len(embeddings), "passage") as shown:
      for _, block in embeddings.blocks(_PASSAGES):
        index.add(block)
        shown.advance(len(block))
        preemption.check("the index will be built again")
    manifest = {
      "format": _FORMAT, "kind": _KIND, "factory": factory, "count": len(embeddings), "width": embeddings.width,
      "sample": sample, "source": embeddings.source, "dtype": embeddings.dtype,
    }  # fmt: skip
    return cls(index, manifest)

  @classmethod
  def check(cls, width: int, factory: str, parameters: Mapping[str, int]) -> None:
    """Raises InputError for a factory string or search parameters that `build` or `set_parameters` would refuse."""
    if factory != "Flat":
      cls(_empty(width, factory), {"factory": factory}).set_parameters(parameters)

  def save(self, directory: Path) -> None:
    """Writes index.faiss and manifest.json; an index that is there is replaced."""
    path, manifest = (pathlib.Path(directory, name) for name in ("index.faiss", "manifest.json"))
    manifest.unlink(missing_ok=True)
    with atomic_path(path) as partial:
      try:
        faiss.write_index(self.faiss, str(partial))
      except RuntimeError as error:
        raise OSError(f"{path}: FAISS cannot write its index ({_brief(error)})") from error
    write_json(manifest, self.manifest)

  @classmethod
  def load(cls, directory: Path) -> Index:
    """Reads what `save` wrote.

    Raises:
      InputError: there is no index, or it is damaged.
    """
    about, path = pathlib.Path(directory, "manifest.json"), pathlib.Path(directory, "index.faiss")
    manifest = read_json(about)
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("kind")) != (_FORMAT, _KIND):
      raise InputError("not an index of this version", path=about, fix=_AGAIN)
    if not path.is_file():
      raise InputError("the index is missing", path=path, fix=_AGAIN)
    try:
      index = faiss.read_index(str(path))
    except Exception as error:  # RuntimeError, or MemoryError where a damaged size is huge, or another
      raise InputError(f"FAISS cannot read its index ({_brief(error)})", path=path, fix=_AGAIN) from error
    if (index.ntotal, index.d) != (manifest.get("count"), manifest.get("width")):
      raise InputError(f"index has {index.ntotal} vectors of {index.d}, its manifest says otherwise", path=about)
    return cls(index, manifest)

  def set_parameters(self, parameters: Mapping[str, int]) -> None:
    """Sets what trades speed for recall: {"nprobe": 32} for IVF, {"efSearch": 128} for HNSW.

    Raises:
      InputError: the index has no such parameter, or the value is not a whole number from 1.
    """
    for name, value in parameters.items():
      if value < 1:
        raise InputError(f"search parameter {name} is not a whole number from 1", value=value)
      try:
        if name not in _PARAMETERS:
          raise RuntimeError(name)
        faiss.ParameterSpace().set_index_parameter(self.faiss, name, value)
      except RuntimeError as error:
        raise InputError(f"index {self.manifest['factory']} has no search parameter of this name", value=name,
                         fix="IVF has nprobe, HNSW has efSearch, Flat has none") from error  # fmt: skip

  def search(self, queries: np.ndarray, k: int) -> Run:
    """Finds k passages for each query float32 [Q, H], equal scores by ascending row.

    Returns:
      A run [Q, k]; −1 fills where the index returns fewer passages (k beyond the corpus, few lists probed).
    """
    queries = checked_queries(queries, self.faiss.d)
    if k < 1:
      raise ValueError(f"k = {k} is not a depth")
    run, depth = Run.empty(len(queries), k), min(k, len(self))
    with progress.bar("search index", len(queries), "query") as shown:
      for start in range(0, len(queries), _QUERIES):
        part = slice(start, start + _QUERIES)
        some = search_ties(self.faiss.search, queries[part], depth, len(self))
        run.rows[part, :depth], run.scores[part, :depth] = some.rows, some.scores
        shown.advance(len(some))
        preemption.check("the search will begin again")
    return run


def _empty(width: int, factory: str) -> faiss.Index:
  """An index without passages."""
  try:
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
  except RuntimeError as error:
    raise InputError(f"no FAISS index of width {width} ({_brief(error)})", value=factory, fix=_STRINGS) from error
  if isinstance(index, faiss.IndexIDMap | faiss.IndexIDMap2):
    raise InputError("rows are the numbers of the index: it needs no map of its own", value=factory, fix=_STRINGS)
  return index


def _skip_polysemous_training(index: faiss.Index) -> None:
  """Saves the simulated annealing (3 s a byte of code) for a filter that no search here turns on."""
  if isinstance(index, faiss.IndexPreTransform):
    index = faiss.downcast_index(index.index)
  if isinstance(index, faiss.IndexPQ | faiss.IndexIVFPQ):
    index.do_polysemous_training = False


def _brief(error: Exception) -> str:
  """FAISS' message without the C++ function that it names first."""
  return str(error).rsplit(": ", 1)[-1]
