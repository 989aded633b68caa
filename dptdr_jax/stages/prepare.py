"""prepare: raw files → checked text, ids and judgements by row → token stores."""

from __future__ import annotations

import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dptdr_jax import backbone as backbones
from dptdr_jax.core import files, manifest, remote
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import downloads, text
from dptdr_jax.data.prepare import PreparedSplit, prepare_source
from dptdr_jax.data.sources import Source
from dptdr_jax.data.sources.beir import Beir
from dptdr_jax.data.sources.docstrings import DocstringSource
from dptdr_jax.data.sources.msmarco import MsMarco
from dptdr_jax.data.sources.nq import NaturalQuestions
from dptdr_jax.data.sources.original_jsonl import OriginalJsonl
from dptdr_jax.data.sources.plain import TextFolder
from dptdr_jax.data.store import write_token_store
from dptdr_jax.data.tokenizer import Tokenizer
from dptdr_jax.stages import common, corpora, scratch
from dptdr_jax.stages.layout import Layout

_log = logging.getLogger(__name__)

OF_CORPUS = ("text/corpus", "tokens/corpus", "bm25", "backbone")  # what another split leaves as it is


def run(config: ConfigDict, workdir: files.Path) -> None:
  """Writes DIR/prepare: text, ids, judgements, and a token store for the corpus and the queries of each split."""
  layout = Layout.of(workdir)
  text.check_templates(config.text.query_template, config.text.passage_template)
  trained_on = config.data.train_split if common.trains(config) else None
  data = prepare_source(open_source(config), layout.prepared, training_split=trained_on)
  if scratch.is_wanted(config):
    scratch.make(config, layout)
  backbone = common.base_directory(config, layout)
  tokenizer = Tokenizer(backbone)
  said = backbones.published_vectors(backbone)
  other = [f"--config.vector.{name}={value}" for name, value in said.items() if value != config.vector[name]]
  if other:
    _log.warning("this backbone was published with other vectors: %s", " ".join(other))
  begun = manifest.read(layout.stage("prepare") / manifest.BEGUN) or {}

  def options(*splits: str) -> dict[str, Any]:
    key = manifest.key_of(part_of(begun["made_from"], splits)) if begun else ""
    return {"max_tokens": config.data.max_stored_tokens, "key": key}

  def passages(start: int) -> Iterator[str]:
    for passage in data.passages.read(start):
      yield text.passage_text(passage, config.text.separator, config.text.passage_template)

  if common.has_queries(config):  # pretraining has tokens of its own
    write_token_store(passages, len(data.passages), tokenizer, layout.store("corpus"), **options())
  for name, split in data.splits.items():
    write_token_store(_queries(split, config), len(split), tokenizer, layout.store(name), **options(name))
    _log.info("%s: %d queries", name, len(split))


def part_of(made_from: Mapping[str, Any], splits: Sequence[str]) -> dict[str, Any]:
  """What the corpus and some splits are made from, of what all of `prepare` is."""
  outside = made_from["files"]
  kept = {name: outside["splits"][name] for name in splits if name in outside["splits"]}
  return {**made_from, "files": {**outside, "splits": kept}}


def open_source(config: ConfigDict) -> Source:
  """The source that the config names.

  Raises:
    InputError: an unknown name, a folder that isn't there, a download that failed or that nobody offers.
  """
  data = config.data
  if data.download and data.source not in downloads.DATASETS:
    raise InputError("data.download has no files of this source", value=data.source, fix="Set it to False")
  if data.source == "docstrings":
    return DocstringSource(tuple(data.packages), tuple(data.test_modules), tuple(data.dev_modules))
  directory = _folder(data)
  if data.source == "beir":
    return Beir(directory, empty_text=data.empty_text)
  if data.source == "msmarco":
    return MsMarco(directory, titles=data.title_augmented)
  if data.source == "nq":
    return NaturalQuestions(directory)
  if data.source == "text":
    return TextFolder(directory)
  if data.source == "original":
    if scratch.is_wanted(config):
      raise InputError("the original's token ids need its own tokenizer", fix="Set pretrain.tokenizer to backbone")
    return OriginalJsonl(directory, tokenizer=Tokenizer(backbones.locate(config.backbone.path)))
  raise InputError("unknown data.source", value=data.source, fix="Use beir, msmarco, nq, original, docstrings or text")


def _folder(data: ConfigDict) -> pathlib.Path:
  """The folder of data, downloaded or staged where the config says so."""
  if not data.dir:
    raise InputError("no folder of data is named", fix="Set --config.data.dir=DIR")
  if data.download and remote.is_remote(data.dir):
    raise InputError("downloads go into a local folder", value=data.dir)
  if data.download:
    downloads.fetch_dataset(data.source, data.dir)
    if data.source == "msmarco" and data.title_augmented:
      downloads.fetch_dataset("msmarco-titles", data.dir)
  directory = remote.staged(data.dir)
  if not directory.is_dir():
    raise InputError("no such folder", path=data.dir)
  return directory


def outside_files(config: ConfigDict) -> dict[str, Any]:
  """Every file from outside that a run depends on: the corpus', the backbone's, and those of each split.

  Raises:
    InputError: the data lacks a split that the config names.
  """
  source = open_source(config)
  splits = source.splits()
  if common.has_queries(config):
    _check_splits(config, splits)
    _check_measures(config, source)
  if common.trains(config):
    _check_negatives(config, source)
  found = {"corpus": source.files(), "splits": {name: source.files(name) for name in splits}}
  if scratch.is_wanted(config):
    return found | {"pretrain.corpora": corpora.outside_files(config)}
  return found | {"backbone": backbones.files_of(backbones.locate(config.backbone.path))}


def _check_negatives(config: ConfigDict, source: Source) -> None:
  asked = {"train.negatives": config.train.negatives} if config.train.passages > 1 else {}
  asked |= {"cross.negatives": config.cross.negatives} if config.cross.enabled else {}
  for field, named in asked.items():
    if named == "source" and next(iter(source.negatives(config.data.train_split)), None) is None:
      fix = f"Set {field} to bm25 or random; MS MARCO's are a file of their own, see configs/msmarco.py"
      raise InputError(f"{field} is 'source', and no negatives come with this data", path=config.data.dir or None,
                       fix=fix)  # fmt: skip


def _check_measures(config: ConfigDict, source: Source) -> None:
  """Raises InputError for a split that has not what a measure is taken by, judgements or answers."""
  answered = common.measured_by_answers(config)
  judged = [name for name in config.evaluate.measures if name not in answered]
  for split in config.evaluate.splits:
    # Docstrings judge every query, and to read them takes half a minute.
    if judged and config.data.source != "docstrings" and next(iter(source.judgements(split)), None) is None:
      fix = f"Leave {split} out of evaluate.splits, or measure Success@k alone where it has answers"
      raise InputError(f"nothing is judged in split {split}, which {judged[0]} needs", path=config.data.dir or None,
                       fix=fix)  # fmt: skip
    if answered and not any(query.answers for query in source.queries(split)):
      raise InputError(f"evaluate.answers is set, and no query of split {split} has one", path=config.data.dir or None,
                       fix="Set evaluate.answers to False, or leave the split out")  # fmt: skip


def homes(config: ConfigDict) -> dict[str, pathlib.Path]:
  """The directories of data and backbone: their files are named from there, as they may stand elsewhere next time."""
  found = {"data": remote.staged(config.data.dir)} if config.data.dir else {}
  return found if scratch.is_wanted(config) else {**found, "backbone": backbones.locate(config.backbone.path)}


def _check_splits(config: ConfigDict, known: Sequence[str]) -> None:
  data, evaluate = config.data, config.evaluate
  tries = [config[name].evaluate_every for name in ("pretrain", "cross") if config[name].enabled]
  tries += [config.train.evaluate_every] if common.trains(config) else []
  wanted = {"data.train_split": (data.train_split,)} if common.trains(config) else {}
  wanted["evaluate.splits"] = evaluate.splits
  if any(tries) and data.dev_split:
    wanted["data.dev_split"] = (data.dev_split,)
  for field, names in wanted.items():
    for name in names:
      if name not in known:
        others = {"data.dev_split": "; '' for none", "data.train_split": "; to train nothing, set rounds to 0"}
        fix = f"There are {', '.join(known)}{others.get(field, '')}"
        raise InputError(f"{field} names a split that is not here", path=data.dir or None, value=name, fix=fix)
  if not evaluate.splits:
    fix = f"There are {', '.join(known)}; --stages may end before it is measured"
    raise InputError("evaluate.splits names no split", fix=fix)


def _queries(split: PreparedSplit, config: ConfigDict) -> Callable[[int], Iterator[str]]:
  def texts(start: int) -> Iterator[str]:
    for query in split.queries.read(start):
      yield text.query_text(query, config.text.query_template)

  return texts
