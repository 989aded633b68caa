"""prepare: raw files → text, ids and judgements by row → tokens; the BM25 index; a backbone to begin from nothing."""

from __future__ import annotations

import itertools
import logging
import pathlib
from collections.abc import Callable, Iterator

import jax

from dptdr_jax import backbone as backbones
from dptdr_jax.core import files, preemption, progress, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.core.store import Inputs, Kind, Making, Ref, neutral
from dptdr_jax.data import downloads, text
from dptdr_jax.data.formats import Format
from dptdr_jax.data.formats.beir import Beir
from dptdr_jax.data.formats.msmarco import MsMarco
from dptdr_jax.data.formats.nq import NaturalQuestions
from dptdr_jax.data.formats.plain import PlainText, TextFolder
from dptdr_jax.data.prepare import Corpus, Split, write_corpus, write_split
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.data.vocabulary import train_byte_level_bpe
from dptdr_jax.models import convert
from dptdr_jax.models.config import EncoderConfig
from dptdr_jax.pipeline.outside import Files
from dptdr_jax.retrieval.bm25 import Bm25
from dptdr_jax.settings import Data, Shape

_log = logging.getLogger(__name__)

OWN_CORPUS = "data"  # in pretrain.corpora: this run's own


class TokenizerInput(Inputs):
  """A tokenizer: the files of a backbone's, or the one that `scratch` made."""

  files: Files | None = None
  scratch: Ref | None = None

  def load(self, making: Making) -> Tokenizer:
    """Opens it."""
    return Tokenizer(self.files.directory if self.scratch is None else making.path(self.scratch))


class DataInput(Inputs):
  """The files of a corpus or of a split, and how they are read."""

  format: str
  files: Files
  empty_text: str
  title_augmented: bool

  def open(self) -> Format:
    """The reader."""
    return open_format(self.format, self.files.directory, self.empty_text, self.title_augmented)


class CorpusInputs(Inputs):
  """Text of the corpus."""

  data: DataInput


class SplitInputs(Inputs):
  """Text, judgements and negatives of a split's queries."""

  data: DataInput
  split: str
  corpus: Ref


class TokensInputs(Inputs):
  """Tokens of the corpus (`split` is '') or of a split's queries."""

  text: Ref
  split: str
  template: str
  separator: str
  tokenizer: TokenizerInput
  max_tokens: int


class Bm25Inputs(Inputs):
  """The BM25 index of the corpus."""

  corpus: Ref


class TextsInput(Inputs):
  """A corpus for pretraining: this run's own, a text or JSONL file, or that of another run."""

  name: str
  own: Ref | None = None
  file: Files | None = None
  other: str = ""  # the key of the other run's corpus
  directory: str = neutral("")

  def open(self, making: Making, separator: str) -> tuple[int, Callable[[int], Iterator[str]]]:
    """The number of passages, and texts(start): titles and texts, without a template."""
    if self.file is not None:
      plain = PlainText(self.name)
      count, read = plain.count(), plain.read
    else:
      corpus = Corpus(making.path(self.own) if self.own else pathlib.Path(self.directory))
      count, read = len(corpus), corpus.passages.read

    def texts(start: int = 0) -> Iterator[str]:
      for passage in read(start):
        yield text.passage_text(passage, separator)

    return count, texts


class ScratchInputs(Inputs):
  """A tokenizer of the corpora, and a random RoBERTa: what a run begins with that starts from nothing."""

  corpora: tuple[TextsInput, ...]
  separator: str
  vocabulary: int
  shape: Shape
  seed: int


def build_corpus(inputs: CorpusInputs, making: Making) -> None:
  """Writes the corpus, see `data.prepare.write_corpus`."""
  write_corpus(inputs.data.open(), making.directory)


def build_split(inputs: SplitInputs, making: Making) -> None:
  """Writes a split, see `data.prepare.write_split`."""
  write_split(inputs.data.open(), inputs.split, Corpus(making.path(inputs.corpus)), making.directory)
  counts = files.read_json(making.directory / "counts.json")
  _log.info("%s: %d queries, %d without judgements left out", inputs.split, counts["queries"], counts["skipped"])


def build_tokens(inputs: TokensInputs, making: Making) -> None:
  """Writes a token store."""
  place = making.path(inputs.text)

  def passages(start: int) -> Iterator[str]:
    for passage in Corpus(place).passages.read(start):
      yield text.passage_text(passage, inputs.separator, inputs.template)

  def queries(start: int) -> Iterator[str]:
    for query in Split(place, inputs.split).queries.read(start):
      yield text.query_text(query, inputs.template)

  count = len(Split(place, inputs.split) if inputs.split else Corpus(place))
  texts = queries if inputs.split else passages
  write_token_store(texts, count, inputs.tokenizer.load(making), making.directory / "tokens",
                    max_tokens=inputs.max_tokens)  # fmt: skip


def build_bm25(inputs: Bm25Inputs, making: Making) -> None:
  """Builds the index; title and text are joined by a space."""
  passages = Corpus(making.path(inputs.corpus)).passages
  Bm25.build((f"{p.title} {p.text}".strip() for p in passages.read()), making.directory / "index")


def build_scratch(inputs: ScratchInputs, making: Making) -> None:
  """Writes a backbone in Hugging Face layout."""
  directory = making.directory
  opened = [corpus.open(making, inputs.separator)[1] for corpus in inputs.corpora]
  texts = _until_stopped(progress.track(itertools.chain.from_iterable(read(0) for read in opened), "train tokenizer",
                                        unit="text"))  # fmt: skip
  size = train_byte_level_bpe(texts, inputs.vocabulary, directory)
  _log.info("tokenizer of %d ids trained", size)
  encoder = scratch_encoder(inputs.shape, size)
  backbones.export(directory, convert.init_params(jax.random.key(inputs.seed), encoder), encoder, Tokenizer(directory))


def _until_stopped(texts: Iterator[str]) -> Iterator[str]:
  for one in texts:
    yield one
    preemption.check("the tokenizer will be trained again")


CORPUS = Kind("corpus", 1, build_corpus, together=False)
SPLIT = Kind("split", 1, build_split, together=False)
TOKENS = Kind("tokens", 1, build_tokens, together=False)
BM25 = Kind("bm25", 1, build_bm25, together=False)
SCRATCH = Kind("scratch", 1, build_scratch, together=False)


def scratch_encoder(shape: Shape, vocabulary: int) -> EncoderConfig:
  """The RoBERTa of `pretrain.shape`."""
  return EncoderConfig("roberta", vocabulary, type_vocab_size=1, pad_id=1, layer_norm_eps=1e-5, **shape.model_dump())


def data_directory(data: Data) -> pathlib.Path:
  """The folder of the data, downloaded or fetched where the settings say so.

  Raises:
    InputError: none is named, it is not there, or nobody offers this download.
  """
  if data.download and data.format not in downloads.DATASETS:
    raise InputError("data.download has no files of this format", value=data.format, fix="Set it to False")
  if not data.dir:
    raise InputError("no folder of data is named", fix="Set --config.data.dir=DIR")
  if data.download and remote.is_remote(data.dir):
    raise InputError("downloads go into a local folder", value=data.dir)
  if data.download:
    downloads.fetch_dataset(data.format, data.dir)
    if data.format == "msmarco" and data.title_augmented:
      downloads.fetch_dataset("msmarco-titles", data.dir)
  directory = remote.staged(data.dir)
  if not directory.is_dir():
    raise InputError("no such folder", path=data.dir)
  return directory


def open_format(name: str, directory: files.Path, empty_text: str, title_augmented: bool) -> Format:
  """The reader of a data format."""
  if name == "beir":
    return Beir(directory, empty_text=empty_text)
  if name == "msmarco":
    return MsMarco(directory, titles=title_augmented)
  if name == "nq":
    return NaturalQuestions(directory)
  return TextFolder(directory)
