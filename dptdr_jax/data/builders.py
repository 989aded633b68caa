"""TFDS builders that hold prepared text as ArrayRecord, and its reader with random access. TensorFlow is not needed.

One TFDS dataset per part: the corpus, or the queries of a split with their judgements. TFDS's own writer shuffles in
memory and, beyond 1 GB, through TensorFlow's files (core/shuffle.py); this one streams in order, shard by shard, so
that Wikipedia's 21 million passages pass in megabytes. Any TFDS installation reads what it wrote.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging
from array_record.python import array_record_module
from tensorflow_datasets.core import naming
from tensorflow_datasets.proto import tf_example_pb2

from dptdr_jax.core import files, preemption, progress
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import downloads
from dptdr_jax.data.records import Passage, Query
from dptdr_jax.data.sources import Source
from dptdr_jax.data.sources.msmarco import MsMarco
from dptdr_jax.data.sources.nq import NaturalQuestions

_log = logging.getLogger(__name__)

CORPUS = "corpus"
_SHARD_ROWS = 200_000
_READ = 1024
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"  # the count of shards is not known ahead
_Values = dict[str, list[str] | list[int]]


class PreparedText(tfds.core.GeneratorBasedBuilder):
  """The text of any source. The configuration names the part: "corpus", or a split whose queries it holds.

  Features of the corpus (TFDS split "corpus"): id, title, text. Of a split (TFDS split "queries"): id, text, answers,
  passage_ids and grades (its judgements). Rows keep the source's order.

  Args:
    part: "corpus" or a split's name.
    source: where the text comes from.
    on_row: called with the id of every row as it is written.
    manual_dir: official files of the same names here come before downloads (MsMarcoText, NaturalQuestionsText).
  """

  VERSION = tfds.core.Version("1.0.0")
  code_path = None  # TFDS looks there for checksums, and fails on packages that are installed in editable mode

  def __init__(
    self,
    part: str,
    source: Source | None = None,
    on_row: Callable[[str], None] | None = None,
    manual_dir: str | pathlib.Path | None = None,
    **kwargs,
  ):
    self._part, self._source, self._on_row, self._manual_dir = part, source, on_row, manual_dir
    config = tfds.core.BuilderConfig(name=part)
    super().__init__(config=config, version=str(self.VERSION), file_format="array_record", **kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
    if self._part == CORPUS:
      features = {"id": text, "title": text, "text": text}
    else:
      grades = tfds.features.Sequence(tfds.features.Scalar(np.int64))
      features = {"id": text, "text": text, "answers": texts, "passage_ids": texts, "grades": grades}
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[_Values]]:
    source = self._source or self._download(dl_manager)
    return {CORPUS if self._part == CORPUS else "queries": self._generate_examples(source)}

  def _download(self, dl_manager: tfds.download.DownloadManager) -> Source:
    raise InputError("a source must be given", value=type(self).__name__)

  def _fetched(self, dataset: str, dl_manager: tfds.download.DownloadManager) -> pathlib.Path:
    # TFDS's checksum files know SHA-256 alone; what is on record for these files are MD5 sums: `downloads` checks.
    return downloads.fetch_dataset(dataset, pathlib.Path(dl_manager.download_dir, dataset), self._manual_dir)

  def _generate_examples(self, source: Source) -> Iterator[_Values]:
    if self._part == CORPUS:
      for passage in source.passages():
        yield {"id": [passage.id], "title": [passage.title], "text": [passage.text]}
      return
    judged: dict[str, list[tuple[str, int]]] = {}
    for judgement in source.judgements(self._part):
      judged.setdefault(judgement.query_id, []).append((judgement.passage_id, judgement.grade))
    for query in source.queries(self._part):
      ids, grades = zip(*judged.get(query.id, ()), strict=True) if query.id in judged else ((), ())
      yield {
        "id": [query.id], "text": [query.text], "answers": list(query.answers),
        "passage_ids": list(ids), "grades": list(grades),
      }  # fmt: skip

  def _download_and_prepare(self, dl_manager: tfds.download.DownloadManager, download_config=None) -> None:
    infos = []
    for split, rows in self._split_generators(dl_manager).items():
      template = naming.ShardedFileTemplate(
        dataset_name=self.name, data_dir=self.data_path, split=split,
        filetype_suffix=self.info.file_format.file_suffix, template=_TEMPLATE,
      )  # fmt: skip
      lengths, size = self._write_shards(progress.track(rows, f"write {self._part}", unit="row"), template)
      infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
    self.info.set_splits(tfds.core.SplitDict(infos))

  def _write_shards(self, rows: Iterator[_Values], template: naming.ShardedFileTemplate) -> tuple[list[int], int]:
    lengths, size, writer = [], 0, None
    try:
      for row in rows:
        if writer is None or lengths[-1] == _SHARD_ROWS:
          if writer is not None:
            writer.close()
          path = template.sharded_filepath(shard_index=len(lengths), num_shards=None)
          writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
          lengths.append(0)
        record = _encode(row)
        writer.write(record)
        lengths[-1] += 1
        size += len(record)
        if self._on_row is not None:
          self._on_row(row["id"][0])
        preemption.check(f"{self._part} will be written again")
      if writer is not None:
        writer.close()
    except RuntimeError as error:  # what ArrayRecord raises when the disk refuses
      raise OSError(f"{template.data_dir}: {error}") from error
    return lengths, size


class MsMarcoText(PreparedText):
  """MS MARCO out of its official files, downloaded and checked; `manual_dir` comes first."""

  def _download(self, dl_manager: tfds.download.DownloadManager) -> Source:
    return MsMarco(self._fetched("msmarco", dl_manager))


class NaturalQuestionsText(PreparedText):
  """Natural Questions out of DPR's files, downloaded and checked; `manual_dir` comes first."""

  def _download(self, dl_manager: tfds.download.DownloadManager) -> Source:
    return NaturalQuestions(self._fetched("nq", dl_manager))


def write_text(source: Source, part: str, directory: pathlib.Path, on_row: Callable[[str], None] | None = None) -> None:
  """Writes one part of a source's text as a TFDS dataset below `directory`."""
  logger = absl_logging.get_absl_logger()
  level = logger.level
  logger.setLevel(logging.ERROR)  # TFDS warns of every configuration that is made on the spot,
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # and announces downloads of unknown size
      builder = PreparedText(part, source, on_row, data_dir=str(directory))
      builder.download_and_prepare(download_dir=str(directory / "downloads"))
  finally:
    logger.setLevel(level)
  files.remove(directory / "downloads")


class TextRows(Sequence):
  """Random access to one part that `write_text` wrote: `rows[row]` → Passage or Query, `rows.take(rows)` → a list of
  them; `rows.read(start)` streams."""

  def __init__(self, directory: str | pathlib.Path, part: str):
    version = PreparedText.VERSION
    builder = tfds.builder_from_directory(str(pathlib.Path(directory, "prepared_text", part, str(version))))
    self._decode = _passage if part == CORPUS else _query
    self._count = sum(split.num_examples for split in builder.info.splits.values())
    split = CORPUS if part == CORPUS else "queries"
    self._records = builder.as_data_source(split).data_source if self._count else []

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, row: int) -> Passage | Query:
    if not 0 <= row < self._count:
      raise IndexError(f"row {row} of {self._count}")
    return self._decode(self._records[int(row)])

  def take(self, rows: np.ndarray) -> list[Passage] | list[Query]:
    """Some rows, in the order of `rows`: many at once are read an order of magnitude faster than one by one."""
    if len(rows) and not 0 <= min(rows) <= max(rows) < self._count:
      raise IndexError(f"rows {min(rows)} to {max(rows)} of {self._count}")
    records = self._records.__getitems__([int(row) for row in rows]) if len(rows) else []
    return [self._decode(record) for record in records]

  def read(self, start: int = 0) -> Iterator[Passage | Query]:
    """Yields rows in order from `start`, read in blocks."""
    for first in range(start, self._count, _READ):
      for record in self._records.__getitems__(range(first, min(first + _READ, self._count))):
        yield self._decode(record)


def _encode(row: _Values) -> bytes:
  """Encodes a row as the tf.Example that TFDS reads; ten times as fast as its own serializer."""
  example = tf_example_pb2.Example()
  for name, values in row.items():
    feature = example.features.feature[name]
    if name == "grades":
      feature.int64_list.value.extend(values)
    else:
      feature.bytes_list.value.extend(value.encode() for value in values)
  return example.SerializeToString()


def _passage(record: bytes) -> Passage:
  feature = tf_example_pb2.Example.FromString(record).features.feature
  return Passage(*(feature[name].bytes_list.value[0].decode() for name in ("id", "title", "text")))


def _query(record: bytes) -> Query:
  feature = tf_example_pb2.Example.FromString(record).features.feature
  query_id, text = (feature[name].bytes_list.value[0].decode() for name in ("id", "text"))
  return Query(query_id, text, tuple(answer.decode() for answer in feature["answers"].bytes_list.value))
