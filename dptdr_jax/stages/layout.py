"""Where a run keeps what: every path below its working directory has its name here."""

from __future__ import annotations

import dataclasses
import pathlib

from dptdr_jax.core import files


@dataclasses.dataclass(frozen=True)
class Layout:
  """Paths of one run."""

  root: pathlib.Path

  @classmethod
  def of(cls, workdir: files.Path) -> Layout:
    return cls(pathlib.Path(workdir))

  def stage(self, name: str) -> pathlib.Path:
    """A stage's own directory; it goes as a whole when the stage must be done anew."""
    return self.root / name

  @property
  def prepared(self) -> pathlib.Path:
    return self.root / "prepare" / "text"

  def store(self, part: str) -> pathlib.Path:
    """The token store of the corpus ('corpus') or of a split's queries."""
    return self.root / "prepare" / "tokens" / part

  @property
  def scratch(self) -> pathlib.Path:
    """The random backbone and its tokenizer, where a run starts from nothing."""
    return self.root / "prepare" / "backbone"

  @property
  def pretrain(self) -> pathlib.Path:
    return self.root / "pretrain"

  @property
  def pretrained(self) -> pathlib.Path:
    """The backbone after pretraining, in Hugging Face layout."""
    return self.pretrain / "backbone"

  @property
  def bm25(self) -> pathlib.Path:
    """The BM25 index of the corpus."""
    return self.root / "prepare" / "bm25"

  def mine(self, number: int) -> pathlib.Path:
    return self.root / f"mine{number}"

  def mined_vectors(self, number: int, part: str, further: str = "") -> pathlib.Path:
    """Vectors of the corpus or of the training queries by the retriever of mining round `number`, or by a further one
    that it asks."""
    home = self.mine(number) / "retrievers" / further if further else self.mine(number)
    return home / "vectors" / part

  def pool(self, number: int) -> pathlib.Path:
    """The negatives that training after mining round `number` draws from."""
    return self.mine(number) / "pool"

  def mining(self, number: int) -> pathlib.Path:
    """What the report shows of mining round `number`."""
    return self.mine(number) / "mining.json"

  def train(self, number: int) -> pathlib.Path:
    return self.root / f"train{number}"

  def generation(self, number: int, which: int) -> pathlib.Path:
    """What is mined while round `number` trains, from its state after `which` times train.refresh_every steps."""
    return self.train(number) / "generations" / str(which)

  def retriever(self, number: int) -> pathlib.Path:
    """The retriever that round `number` of training chose."""
    return self.train(number) / "retriever"

  def embeddings(self, system: str, part: str) -> pathlib.Path:
    """Vectors of the corpus ('corpus') or of a split's queries by one system."""
    return self.root / "encode" / system / part

  def index(self, system: str) -> pathlib.Path:
    """The FAISS index over a system's vectors of the corpus."""
    return self.root / "evaluate" / "index" / system

  def part(self, system: str, split: str) -> pathlib.Path:
    """Means and intervals of one system on one split."""
    return self.root / "evaluate" / "parts" / f"{system}.{split}.json"

  def run_file(self, system: str, split: str) -> pathlib.Path:
    return self.root / "evaluate" / "runs" / f"{system}.{split}.trec"

  @property
  def summary(self) -> pathlib.Path:
    """What the table and the report say besides the measures: counts, labels, confidence intervals."""
    return self.root / "evaluate" / "summary.json"

  @property
  def examples(self) -> pathlib.Path:
    """Queries with their top passages, for the report."""
    return self.root / "evaluate" / "examples.json"

  def found(self, system: str, split: str) -> pathlib.Path:
    """What a system's search found for a split, by row, and what it was made from."""
    return self.root / "evaluate" / "found" / f"{system}.{split}"

  def per_query(self, system: str, split: str) -> pathlib.Path:
    """Measures of every query, .npz: what significance tests read."""
    return self.root / "evaluate" / "per_query" / f"{system}.{split}.npz"

  @property
  def results(self) -> pathlib.Path:
    return self.root / "results.json"

  @property
  def report(self) -> pathlib.Path:
    return self.root / "report.html"
