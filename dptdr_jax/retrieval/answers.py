"""Does a passage contain an answer? Open-domain question answering's relevance, after DPR's definition.

DPR (Karpukhin et al., EMNLP 2020), after DrQA: answer and passage are brought to NFD, cut into runs of letters, digits
and marks or else single characters, lower-cased; an answer matches where its tokens stand in the passage in a row. So
"the US" is found in "(The US)" but not in "the USA", "1,200" is three tokens, and accents count ("café" ≠ "cafe").
"""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import multiprocessing
import unicodedata
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import regex

from dptdr_jax.core import progress
from dptdr_jax.retrieval.runs import Run

# DrQA's SimpleTokenizer: letters, numbers and marks together; any other character that is neither space nor control.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")
_BETWEEN = "\0"  # a control character: in no token, so that a match between two of them is one of whole tokens


def tokens(text: str) -> list[str]:
  """Cuts a text into DPR's lower-cased tokens."""
  return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def contains_answer(text: str, answers: Sequence[str]) -> bool:
  """Whether a text contains one of the answers, token by token. An answer without a token is in no text."""
  return _contains(_joined(text), [_joined(answer) for answer in answers])


def match_run(
  run: Run,
  answers: Sequence[Sequence[str]],
  texts: Callable[[np.ndarray], Sequence[str]],
  *,
  depth: int = 100,
  workers: int = 0,
) -> np.ndarray:
  """Marks the passages of a run that contain an answer of their query.

  Args:
    run: Q queries.
    answers: Q lists of answers.
    texts: texts(passage rows) → as many texts. DPR matches in the text without its title.
    depth: the ranks to look at.
    workers: processes; 0 works in this one. At most 2 blocks of 64 queries' texts a worker are in flight.

  Returns:
    bool [Q, min(depth, K)]; a fill is no hit.
  """
  if len(answers) != len(run):
    raise ValueError(f"answers to {len(answers)} questions, run of {len(run)} queries")
  rows = run.rows[:, :depth]
  hits = np.zeros(rows.shape, bool)

  def blocks() -> Iterator[tuple[range, list[tuple[list[str], list[str]]]]]:
    for start in range(0, len(rows), 64):
      block = range(start, min(len(rows), start + 64))
      found = [rows[query][rows[query] >= 0] for query in block]
      wanted, place = np.unique(np.concatenate(found), return_inverse=True)
      read = texts(wanted)
      ends = np.cumsum([len(part) for part in found])
      parts = np.split(place, ends[:-1])
      yield block, [(list(answers[q]), [read[at] for at in part]) for q, part in zip(block, parts, strict=True)]

  with progress.bar("match answers", len(rows), "query") as shown:
    for block, found in _spread(blocks(), workers):
      for query, matches in zip(block, found, strict=True):
        hits[query, : len(matches)] = matches
      shown.advance(len(block))
  return hits


def _spread(blocks: Iterator[tuple[range, list]], workers: int) -> Iterator[tuple[range, list[list[bool]]]]:
  if not workers:
    yield from ((block, _match_block(work)) for block, work in blocks)
    return
  # spawn: a fork of a process that runs jax's threads can hang.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
    waiting: collections.deque = collections.deque()
    for block, work in blocks:
      waiting.append((block, pool.submit(_match_block, work)))
      if len(waiting) >= 2 * workers:
        block, future = waiting.popleft()
        yield block, future.result()
    for block, future in waiting:
      yield block, future.result()


def _match_block(work: list[tuple[list[str], list[str]]]) -> list[list[bool]]:
  found = []
  for answers, texts in work:
    needles = [_joined(answer) for answer in answers]
    found.append([_contains(_joined(text), needles) for text in texts])
  return found


@functools.lru_cache(maxsize=20_000)  # the same passage is found for many queries
def _joined(text: str) -> str:
  return _BETWEEN + "".join(token + _BETWEEN for token in tokens(text))


def _contains(haystack: str, needles: Sequence[str]) -> bool:
  return any(needle in haystack for needle in needles if needle != _BETWEEN)
