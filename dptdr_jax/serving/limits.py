"""What the engine refuses, and the errors that say so. Each error is one HTTP status."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dptdr_jax.core.errors import DptdrError, InputError


class UnknownTask(DptdrError):
  """There is no task of this name (404)."""


class TooLarge(DptdrError):
  """A text or a list is larger than the engine accepts (413)."""


class Overloaded(DptdrError):
  """Too many tokens are waiting (429).

  Attributes:
    retry_after: seconds until the waiting tokens are encoded, at the present speed.
  """

  def __init__(self, waiting: int, retry_after: float):
    super().__init__(f"{waiting} tokens are waiting. Try again in {retry_after:.0f} s")
    self.retry_after = retry_after


class Unavailable(DptdrError):
  """The engine is starting or stopping (503)."""


class DeadlineExceeded(DptdrError):
  """The deadline passed before the vectors were computed (504)."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """The largest request, and how much may wait. Tokens include special tokens."""

  texts: int = 1024  # of a request
  characters: int = 2_000_000  # of a request; checked before the tokenizer reads it
  tokens: int = 131_072  # of a request
  queued_tokens: int = 524_288  # of all requests that wait

  def __post_init__(self):
    if min(dataclasses.astuple(self)) < 1:
      raise InputError("every limit must be positive", value=dataclasses.astuple(self))
    if self.queued_tokens < self.tokens:
      raise InputError(
        f"no request of {self.tokens} tokens could ever wait", value=self.queued_tokens,
        fix="Set queued_tokens to tokens or more",
      )  # fmt: skip

  def check_texts(self, texts: Sequence[str]) -> None:
    """Raises TooLarge if a request has too many texts or characters."""
    if len(texts) > self.texts:
      raise TooLarge(f"{len(texts)} texts in one request; at most {self.texts} are accepted")
    if (characters := sum(map(len, texts))) > self.characters:
      raise TooLarge(f"{characters} characters in one request; at most {self.characters} are accepted")

  def check_tokens(self, tokens: int) -> None:
    """Raises TooLarge if a request has too many tokens."""
    if tokens > self.tokens:
      raise TooLarge(f"{tokens} tokens in one request; at most {self.tokens} are accepted")
