"""Keys of clients: some may read (search, vectors), some may administer (tasks, documents) as well."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable

from fastapi import Request

from dptdr_jax.core import files
from dptdr_jax.core.errors import InputError
from dptdr_jax.serving.errors import Refused

_SHORTEST = 16  # characters of a key


class Keys:
  """The keys of a file; without one everything is allowed."""

  def __init__(self, path: files.Path | None = None):
    """Reads lines 'read: KEY' and 'admin: KEY', any number of each; '#' begins a comment.

    Raises:
      InputError: another line, a short key, or no key for administration.
    """
    self._hashes: dict[str, list[bytes]] = {"read": [], "admin": []}
    self.required = path is not None
    for number, line in enumerate(_lines(path) if path else (), 1):
      role, colon, key = (part.strip() for part in line.partition(":"))
      if not line.strip() or line.lstrip().startswith("#"):
        continue
      if not colon or role not in self._hashes or len(key) < _SHORTEST or not key.isascii():
        raise InputError(f"not 'read: KEY' or 'admin: KEY' with a key of {_SHORTEST} characters or more", path=path,
                         line=number)  # fmt: skip
      self._hashes[role].append(_hash(key))
    if self.required and not self._hashes["admin"]:
      raise InputError("no key for administration", path=path, fix="Add a line admin: KEY")

  def role(self, header: str) -> str:
    """'admin', 'read' or '', for a header Authorization; takes the same time for every key."""
    if not self.required:
      return "admin"
    scheme, _, key = header.partition(" ")
    given = _hash(key.strip())
    has = {role: sum(hmac.compare_digest(given, one) for one in known) for role, known in self._hashes.items()}
    if scheme.lower() != "bearer":
      return ""
    return next((role for role in ("admin", "read") if has[role]), "")


def _lines(path: files.Path) -> list[str]:
  with files.open_text(path) as stream:
    return stream.read().splitlines()


def _hash(key: str) -> bytes:
  return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def needs(role: str) -> Callable[[Request], Awaitable[None]]:
  """A dependency that refuses requests without a key of this role: 'read' or 'admin'."""

  # No plain function: FastAPI calls those in a thread, whose library may be imported by the first request at the very
  # moment when another thread imports grain, which replaces Python's import meanwhile.
  async def check(request: Request) -> None:
    given = request.app.state.keys.role(request.headers.get("authorization", ""))
    if not given:
      raise Refused(401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key")
    if role == "admin" and given != "admin":
      raise Refused(403, "this key may only read", "permission_denied")

  return check
