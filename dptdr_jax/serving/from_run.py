"""What a finished run has for a server: its last retriever, its cross-encoder, its corpus and that corpus' vectors."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import pathlib
import re

from dptdr_jax.core.errors import InputError
from dptdr_jax.data.prepare import Corpus
from dptdr_jax.retrieval.embeddings import Embeddings
from dptdr_jax.serving import catalog
from dptdr_jax.serving.documents import Document
from dptdr_jax.serving.service import Service

log = logging.getLogger(__name__)

_BATCH = 1000  # documents stored at a time


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """Where the parts of a run are.

  Attributes:
    name: of its task: the directory's, in the letters that a task may have.
    retriever: directory.
    corpus: directory of the artefact.
    cross_encoder: directory, or None.
  """

  name: str
  retriever: pathlib.Path
  corpus: pathlib.Path
  cross_encoder: pathlib.Path | None

  @classmethod
  def of(cls, workdir: pathlib.Path) -> FinishedRun:
    """Looks at the links of a run.

    Raises:
      InputError: it has no trained retriever, or no corpus.
    """
    rounds = [path for path in workdir.glob("train*") if (path / "retriever" / "retriever.json").is_file()]
    if not rounds:
      raise InputError("this run has no trained retriever", path=workdir, fix="Finish it: python -m dptdr_jax.main")
    last = max(rounds, key=lambda path: int(re.sub(r"\D", "", path.name) or 0)) / "retriever"
    published = workdir / "retriever"  # the last one, with search.json beside it
    corpus = workdir / "prepare" / "corpus"
    if not corpus.exists():
      raise InputError("this run has no corpus", path=corpus)
    cross = workdir / "cross" / "model"
    name = re.sub(r"[^a-z0-9_-]+", "-", workdir.resolve().name.lower()).strip("-")[:50] or "run"
    if name.endswith(("-query", "-passage")):
      name += "-run"
    retriever = published if (published / "retriever.json").is_file() else last
    return cls(name, retriever.resolve(), corpus.resolve(), cross.resolve() if cross.is_dir() else None)

  def files(self) -> dict[str, pathlib.Path]:
    """The files of its task."""
    return catalog.files_of(self.retriever, self.cross_encoder)

  def import_documents(self, service: Service) -> None:
    """Stores its corpus as documents, once, with the run's own vectors if they are there.

    A process that is killed meanwhile begins again; what is stored by then stays as it is.
    """
    served, what = service.served(self.name), self.corpus.name
    if served.entry.imported == what:
      return
    corpus = Corpus(self.corpus)
    vectors = self._vectors(service.engine.task(self.name).hash, len(corpus))
    for start in range(0, len(corpus), _BATCH):
      rows = range(start, min(start + _BATCH, len(corpus)))
      documents = [Document(one.id, one.text, one.title) for one in corpus.passages.take(rows)]
      service.upsert(self.name, documents, vectors.take(rows) if vectors is not None else None)
    service.imported(self.name, what)
    log.info("%s: %d documents, %s", self.name, len(corpus), "their vectors too" if vectors else "to be encoded")

  def _vectors(self, retriever: str, count: int) -> Embeddings | None:
    """The vectors of the corpus by this retriever, in the store that has the corpus."""
    for path in sorted(self.corpus.parent.parent.glob("vectors/*/manifest.json")):
      with contextlib.suppress(InputError):
        found = Embeddings(path.parent)
        about = found.source
        if (about.get("retriever"), about.get("kind"), len(found)) == (retriever, "passage", count):
          return found
    return None
