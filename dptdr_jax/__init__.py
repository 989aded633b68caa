"""Deep prompt tuning for dense retrieval in JAX: one frozen backbone, a few megabytes of prompts a task.

`from dptdr_jax import Backbone, CrossEncoder, Retriever` imports jax only when one of the names is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from dptdr_jax.reranker import CrossEncoder
  from dptdr_jax.retriever import Backbone, Retriever

__all__ = ["Backbone", "CrossEncoder", "Retriever"]


def __getattr__(name: str):
  if name == "CrossEncoder":
    from dptdr_jax import reranker

    return reranker.CrossEncoder
  if name in __all__:
    from dptdr_jax import retriever

    return getattr(retriever, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
