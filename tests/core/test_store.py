"""The store: keys, resuming, damage, locks, pruning."""

import logging
import multiprocessing
import time

import pytest

from dptdr_jax.core import files, preemption
from dptdr_jax.core.errors import DptdrError, InputError, RetryableError
from dptdr_jax.core.store import DamagedError, Inputs, Kind, Making, Ref, Store, neutral


class Words(Inputs):
  text: str
  size: int = neutral(1)


class Joined(Inputs):
  left: Ref
  right: Ref


made: list[str] = []


def build_words(inputs: Words, making: Making) -> None:
  made.append(inputs.text)
  (making.directory / "words.txt").write_text(inputs.text)


def build_joined(inputs: Joined, making: Making) -> None:
  made.append("joined")
  parts = [files.open_text(making.path(ref) / "words.txt").read() for ref in (inputs.left, inputs.right)]
  files.write_json(making.directory / "joined.json", parts)


WORDS = Kind("words", 1, build_words)
JOINED = Kind("joined", 1, build_joined)
CHOSEN = Kind("chosen", 1, build_words, chosen=True)


@pytest.fixture(autouse=True)
def forget_what_was_made():
  made.clear()


@pytest.fixture
def store(tmp_path):
  return Store(tmp_path / "store")


def joined(store: Store, left: str = "a", right: str = "b") -> Ref:
  return store.get(JOINED, Joined(left=store.get(WORDS, Words(text=left)), right=store.get(WORDS, Words(text=right))))


def test_same_inputs_are_built_once_and_format_and_upstream_change_the_key(store, tmp_path):
  first = joined(store)
  assert joined(Store(tmp_path / "store")) == first
  assert made == ["a", "b", "joined"]
  assert joined(store, right="c") != first
  assert made == ["a", "b", "joined", "c", "joined"]
  assert Kind("words", 2, build_words).ref(Words(text="a")) != WORDS.ref(Words(text="a"))


def test_artefact_lists_inputs_without_neutral_fields_and_checksums(store):
  assert WORDS.ref(Words(text="a", size=1)) == WORDS.ref(Words(text="a", size=2))
  about = store.about(store.get(WORDS, Words(text="a", size=2)))
  assert about["inputs"] == {"text": "a"} and about["format"] == 1 and about["kind"] == "words"
  assert about["files"] == {"words.txt": [1, files.sha256_of(b"a")]}


def test_undeclared_fields_and_artefacts_cannot_be_read(store):
  with pytest.raises(AttributeError, match="shape"):
    store.get(Kind("words", 1, lambda inputs, making: inputs.shape), Words(text="a"))
  other = store.get(WORDS, Words(text="other"))
  with pytest.raises(DptdrError, match="do not declare"):
    store.get(Kind("words", 2, lambda inputs, making: making.path(other)), Words(text="a"))


def test_interrupted_build_goes_on_with_what_it_left(store, tmp_path):
  def build(inputs, making):
    place = making.directory / "half.txt"
    if not place.exists():
      place.write_text("half")
      raise preemption.Preempted("here")
    (making.directory / "whole.txt").write_text(place.read_text())

  kind = Kind("words", 1, build)
  with pytest.raises(preemption.Preempted):
    store.get(kind, Words(text="a"))
  ref = Store(tmp_path / "store").get(kind, Words(text="a"))
  assert (store.path(ref) / "whole.txt").read_text() == "half"
  assert set(store.about(ref)["files"]) == {"half.txt", "whole.txt"}


@pytest.mark.parametrize(
  ("name", "content", "verify", "again"),
  [
    ("words.txt", None, False, True),
    ("words.txt", "a", False, True),
    ("words.txt", "abd", False, False),
    ("words.txt", "abd", True, True),
    ("artefact.json", None, False, True),
    ("artefact.json", "[]", False, True),
  ],
)
def test_damaged_artefact_is_made_again(store, tmp_path, name, content, verify, again):
  ref = store.get(WORDS, Words(text="abc"))
  path = store.path(ref) / name
  path.unlink()
  if content is not None:
    path.write_text(content)
  Store(tmp_path / "store", verify=verify).get(WORDS, Words(text="abc"))
  assert made == ["abc"] * (1 + again)
  assert not again or (store.path(ref) / "words.txt").read_text() == "abc"


def test_damage_to_what_training_chose_is_one_line(store, tmp_path):
  ref = store.get(CHOSEN, Words(text="abc"))
  (store.path(ref) / "words.txt").unlink()
  with pytest.raises(DamagedError, match=r"words.txt is lost.*Remove this directory"):
    Store(tmp_path / "store").get(CHOSEN, Words(text="abc"))
  (store.path(ref) / "artefact.json").unlink()
  with pytest.raises(DamagedError, match="artefact.json"):
    Store(tmp_path / "store").get(CHOSEN, Words(text="abc"))
  assert made == ["abc"]


def test_error_that_names_an_input_removes_it_if_it_is_damaged(store):
  left, right = (store.get(WORDS, Words(text=text)) for text in "ab")

  def build(inputs, making):
    raise InputError("cannot be read", path=making.path(inputs.left) / "words.txt")

  with pytest.raises(InputError, match="cannot be read"):
    store.get(Kind("joined", 2, build), Joined(left=left, right=right))
  assert store.path(left).exists()
  (store.path(left) / "words.txt").write_text("x")
  with pytest.raises(RetryableError, match="makes words/.* again"):
    store.get(Kind("joined", 2, build), Joined(left=left, right=right))
  assert not store.path(left).exists()


def test_foreign_directory_is_refused_untouched(tmp_path):
  (tmp_path / "thesis.tex").write_text("mine")
  with pytest.raises(InputError, match="not empty"):
    Store(tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_prune_keeps_what_other_runs_reach(store, tmp_path):
  ours, theirs, nobodys = (store.get(WORDS, Words(text=text)) for text in "abc")
  gone = store.get(WORDS, Words(text="d"))
  (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
  (store.root / "words" / "notes.txt").write_text("not an artefact")
  store.root_of("one", tmp_path / "one", [ours])
  store.root_of("two", tmp_path / "two", [theirs])
  store.root_of("three", tmp_path / "three", [gone])
  count, size = store.prune()
  assert count == 2 and size > 0
  assert [store.path(ref).exists() for ref in (ours, theirs, nobodys, gone)] == [True, True, False, False]
  assert (store.root / "words" / "notes.txt").exists()


def _slow(root, delay):
  def build(inputs, making):
    time.sleep(delay)
    build_words(inputs, making)
    with open(root / "builds.txt", "a") as stream:
      stream.write("x")

  Store(root / "store").get(Kind("words", 1, build), Words(text="a"))


def test_second_run_waits_for_an_unfinished_artefact(tmp_path, caplog):
  context = multiprocessing.get_context("fork")
  other = context.Process(target=_slow, args=(tmp_path, 1.0))
  other.start()
  while not list(tmp_path.glob("store/words/*.partial")):
    time.sleep(0.05)
  with caplog.at_level(logging.INFO):
    _slow(tmp_path, 0.0)
  other.join()
  assert (tmp_path / "builds.txt").read_text() == "x"
  assert f"made by process {other.pid}" in caplog.text
