"""The token store against Hugging Face tokenizers, and what a killed writer leaves."""

import os

import numpy as np
import pytest
import tokenizers
import transformers

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.data import store as store_module
from dptdr_jax.data.store import TokenStore, write_token_store
from dptdr_jax.data.tokenizer import Tokenizer

WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "Ümläut", "猫", "unbelievable"]
TEXTS = [" ".join(WORDS[(row + place) % len(WORDS)] for place in range(row % 30)) for row in range(100)]


def _write(tokenizer, path, texts=TEXTS, **options):
  options = {"max_tokens": 64, **options}
  return write_token_store(lambda start: iter(texts[start:]), len(texts), tokenizer, path, **options)


def test_batches_equal_transformers(minilm, tmp_path):
  theirs = transformers.AutoTokenizer.from_pretrained(str(minilm))
  store = _write(Tokenizer(minilm), tmp_path / "s")
  assert len(store) == 100 and store._tokens.dtype == np.uint16
  rows = np.array([99, 0, 17, 17, 42])
  tokens, lengths = store.batch(rows, 64, bucket=16)
  assert tokens.dtype == lengths.dtype == np.int32
  expected = theirs([TEXTS[row] for row in rows], padding="longest", pad_to_multiple_of=16, return_tensors="np")
  np.testing.assert_array_equal(tokens, expected["input_ids"])
  np.testing.assert_array_equal(lengths, expected["attention_mask"].sum(1))
  for limit in (8, 20, 21):  # limits that are no multiple of the bucket stand
    tokens, lengths = store.batch(rows, limit)
    expected = theirs([TEXTS[row] for row in rows], padding="max_length", truncation=True, max_length=limit)
    np.testing.assert_array_equal(tokens, expected["input_ids"])


def test_byte_level_bpe_and_wide_ids(roberta, tmp_path):
  tokenizer = Tokenizer(roberta)
  store = _write(tokenizer, tmp_path / "s", max_tokens=512)
  for row in (0, 1, 29, 99):
    np.testing.assert_array_equal(store[row], tokenizer.encode([TEXTS[row]])[0])
  tokens, lengths = store.batch(np.array([29]), 512)
  assert tokens[0, : lengths[0]].tolist() == tokenizer.wrap(tokenizer.encode([TEXTS[29]])[0])
  assert (tokens[0, lengths[0] :] == 1).all()
  tokenizer.vocab_size = 70_000
  wide = _write(tokenizer, tmp_path / "w", max_tokens=512)
  assert wide._tokens.dtype == np.uint32
  np.testing.assert_array_equal(wide[29], store[29])


def test_widths_are_few_and_may_be_given(minilm, tmp_path):
  store = _write(Tokenizer(minilm), tmp_path / "s")
  assert store.width(np.arange(100), 64) == 48 and store.width(np.arange(100), 40) == 40
  assert store.width(np.array([0]), 64) == 16
  assert store.width(np.array([20]), 64) % 16 == 0
  np.testing.assert_array_equal(store.lengths, [len(store[row]) for row in range(100)])
  tokens, lengths = store.batch(np.array([0, 3]), 64, width=48)
  narrow, _ = store.batch(np.array([0, 3]), 64)
  assert tokens.shape == (2, 48) and (tokens[:, 16:] == 0).all()
  np.testing.assert_array_equal(tokens[:, :16], narrow)
  assert lengths[0] == 2
  assert store.batch(np.empty(0, np.int64), 64)[0].shape == (0, 16)


def test_rows_and_limits_are_checked(minilm, tmp_path):
  store = _write(Tokenizer(minilm), tmp_path / "s", max_tokens=10)
  assert store.lengths.max() == 10
  for rows in ([-1], [100]):
    with pytest.raises(IndexError, match="out of 0…99"):
      store.batch(np.array(rows), 12)
  with pytest.raises(InputError, match="rows were cut to 10 tokens, 11 are asked for"):
    store.batch(np.array([0]), 13)
  with pytest.raises(InputError, match="leave no room"):
    store.batch(np.array([0]), 2)


class Killed(BaseException):
  pass


def test_a_killed_writer_goes_on(minilm, tmp_path, monkeypatch):
  monkeypatch.setattr(store_module, "_BATCH", 8)
  monkeypatch.setattr(store_module, "_SHARD", 16)
  whole = _write(Tokenizer(minilm), tmp_path / "whole")
  calls, starts = [], []

  class Dying:
    """The tokenizer's backend until it has encoded 6 batches."""

    def __init__(self, backend):
      self.backend = backend

    def enable_truncation(self, **options):
      self.backend.enable_truncation(**options)

    def encode_batch_fast(self, batch, **options):
      calls.append(len(batch))
      if len(calls) == 6:
        raise Killed
      return self.backend.encode_batch_fast(batch, **options)

  class Module:
    Tokenizer = type("T", (), {"from_str": lambda text: Dying(tokenizers.Tokenizer.from_str(text))})

  def texts(start):
    starts.append(start)
    return iter(TEXTS[start:])

  with monkeypatch.context() as patch:
    patch.setattr(store_module, "tokenizers", Module)
    with pytest.raises(Killed):
      write_token_store(texts, 100, Tokenizer(minilm), tmp_path / "s", max_tokens=64)
  assert not (tmp_path / "s").exists()
  with open(tmp_path / "s.growing" / "tokens.bin", "ab") as stream:  # half a batch that no note counts
    stream.write(b"rubbish")
  store = write_token_store(texts, 100, Tokenizer(minilm), tmp_path / "s", max_tokens=64)
  assert starts == [0, 32]
  assert sorted(os.listdir(tmp_path / "s")) == ["offsets.npy", "store.json", "tokens.bin"]
  assert not (tmp_path / "s.growing").exists()
  np.testing.assert_array_equal(store._tokens, whole._tokens)
  np.testing.assert_array_equal(store._offsets, whole._offsets)


def test_killed_between_the_last_write_and_the_rename(minilm, tmp_path, monkeypatch):
  rename = files.rename

  def refuse(source, target):
    if source.suffix == ".growing":
      raise Killed
    rename(source, target)

  monkeypatch.setattr(files, "rename", refuse)
  with pytest.raises(Killed):
    _write(Tokenizer(minilm), tmp_path / "s")
  monkeypatch.setattr(files, "rename", rename)
  assert not (tmp_path / "s").exists()
  store = _write(Tokenizer(minilm), tmp_path / "s")
  np.testing.assert_array_equal(store[29], Tokenizer(minilm).encode([TEXTS[29]])[0])


def test_written_once_and_anew_when_something_changed(minilm, roberta, tmp_path):
  def never(start):
    raise AssertionError("read again")

  _write(Tokenizer(minilm), tmp_path / "s", key="a")
  same = write_token_store(never, 100, Tokenizer(minilm), tmp_path / "s", max_tokens=64, key="a")
  assert same.key == "a"
  with pytest.raises(AssertionError, match="read again"):
    write_token_store(never, 100, Tokenizer(minilm), tmp_path / "s", max_tokens=64, key="b")
  assert TokenStore(tmp_path / "s").key == "a"  # the old one stays until the new one is whole
  assert _write(Tokenizer(roberta), tmp_path / "s", key="a").tokenizer_hash == Tokenizer(roberta).hash
  with pytest.raises(InputError, match="100 texts came where 101 were expected"):
    write_token_store(lambda start: iter(TEXTS[start:]), 101, Tokenizer(minilm), tmp_path / "t", max_tokens=64)


def test_a_truncated_file_is_named(minilm, tmp_path):
  _write(Tokenizer(minilm), tmp_path / "s")
  path = tmp_path / "s" / "tokens.bin"
  path.write_bytes(path.read_bytes()[:-2])
  with pytest.raises(InputError, match=r"tokens\.bin: \d+ tokens expected"):
    TokenStore(tmp_path / "s")


def test_texts_without_a_token(minilm, tmp_path):
  store = _write(Tokenizer(minilm), tmp_path / "s", texts=["", ""])
  tokens, lengths = store.batch(np.array([1]), 16)
  assert tokens[0, :3].tolist() == [101, 102, 0] and lengths.tolist() == [2]
