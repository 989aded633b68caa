"""The token store against Hugging Face tokenizers, and resuming after a kill."""

import os

import numpy as np
import pytest
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
  assert len(store) == 100 and store.flat.dtype == np.uint16
  rows = np.array([99, 0, 17, 17, 42])
  tokens, lengths = store.batch(rows, 64)
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
  assert wide.flat.dtype == np.uint32
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
    with pytest.raises(IndexError, match="of 100"):
      store.batch(np.array(rows), 12)
  with pytest.raises(InputError, match="texts were cut to 10 tokens, 11 are needed"):
    store.batch(np.array([0]), 13)
  with pytest.raises(InputError, match="leave no room"):
    store.batch(np.array([0]), 2)


class Killed(BaseException):
  pass


@pytest.mark.parametrize("words", [False, True])
def test_killed_writer_resumes(minilm, tmp_path, monkeypatch, words):
  monkeypatch.setattr(store_module, "_BATCH", 8)
  monkeypatch.setattr(store_module, "_NOTED", 16)
  tokenizer, starts = Tokenizer(minilm), []

  def texts(start):
    starts.append(start)
    for row in range(start, 100):
      if len(starts) == 1 and row == 45:
        raise Killed
      yield TEXTS[row]

  with pytest.raises(Killed):
    write_token_store(texts, 100, tokenizer, tmp_path / "s", max_tokens=64, words=words)
  with pytest.raises(InputError, match=r"store\.json: no such file"):
    TokenStore(tmp_path / "s")
  with open(tmp_path / "s" / "tokens.bin", "ab") as stream:  # half a batch that progress.json does not count
    stream.write(b"rubbish")
  store = write_token_store(texts, 100, tokenizer, tmp_path / "s", max_tokens=64, words=words)
  assert starts == [0, 32]
  whole = _write(tokenizer, tmp_path / "whole", words=words)
  names = ["offsets.npy", "store.json", "tokens.bin", *(["words.bin"] if words else [])]
  assert sorted(os.listdir(store.path)) == names
  assert [(store.path / name).read_bytes() for name in names] == [(whole.path / name).read_bytes() for name in names]


@pytest.mark.parametrize("name", ["offsets.npy", "store.json"])
def test_killed_before_the_last_files_resumes_without_tokenising(minilm, tmp_path, monkeypatch, name):
  rename = files.rename

  def refuse(temporary, target):
    if target.name == name:
      raise Killed
    rename(temporary, target)

  with monkeypatch.context() as patch:
    patch.setattr(files, "rename", refuse)
    with pytest.raises(Killed):
      _write(Tokenizer(minilm), tmp_path / "s")
  store = write_token_store(lambda start: iter(TEXTS[start:]), 100, Tokenizer(minilm), tmp_path / "s", max_tokens=64)
  np.testing.assert_array_equal(store[29], Tokenizer(minilm).encode([TEXTS[29]])[0])
  assert sorted(os.listdir(tmp_path / "s")) == ["offsets.npy", "store.json", "tokens.bin"]


@pytest.mark.parametrize("state", ["{", "[]", '{"rows": "x"}', '{"rows": 90, "tokens_bytes": 9000}'])
def test_unreadable_progress_begins_anew(minilm, tmp_path, state):
  (tmp_path / "s").mkdir()
  (tmp_path / "s" / "tokens.bin").write_bytes(b"rubbish")
  (tmp_path / "s" / "progress.json").write_text(state)
  store = _write(Tokenizer(minilm), tmp_path / "s")
  np.testing.assert_array_equal(store[29], Tokenizer(minilm).encode([TEXTS[29]])[0])


def test_finished_store_is_opened_and_too_few_texts_are_an_error(minilm, tmp_path):
  def never(start):
    raise AssertionError("read again")

  _write(Tokenizer(minilm), tmp_path / "s")
  assert len(write_token_store(never, 100, Tokenizer(minilm), tmp_path / "s", max_tokens=64)) == 100
  with pytest.raises(InputError, match="101 texts expected, 100 read"):
    write_token_store(lambda start: iter(TEXTS[start:]), 101, Tokenizer(minilm), tmp_path / "t", max_tokens=64)


@pytest.mark.parametrize("name", ["tokens.bin", "words.bin", "offsets.npy", "store.json"])
@pytest.mark.parametrize("damage", ["lost", "cut", "garbage"])
def test_damaged_file_is_named(minilm, tmp_path, name, damage):
  path = _write(Tokenizer(minilm), tmp_path / "s", words=True).path / name
  content = path.read_bytes()
  path.unlink() if damage == "lost" else path.write_bytes(content[:-2] if damage == "cut" else b"[]\n")
  with pytest.raises(InputError, match=name.replace(".", r"\.")):
    TokenStore(tmp_path / "s")


def test_texts_without_a_token(minilm, tmp_path):
  store = _write(Tokenizer(minilm), tmp_path / "s", texts=["", ""])
  tokens, lengths = store.batch(np.array([1]), 16)
  assert tokens[0, :3].tolist() == [101, 102, 0] and lengths.tolist() == [2]
