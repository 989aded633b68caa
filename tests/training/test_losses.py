"""The contrastive loss against a plain loop and against matrices small enough to do by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dptdr_jax.training.losses import contrastive_loss


def oracle(queries, passages, targets, blocked, repeated, temperature, both_directions):
  """The definition, pair by pair, in float64."""
  queries, passages = queries.astype(np.float64), passages.astype(np.float64)
  forward, backward, hits = [], [], []
  for i, target in enumerate(targets):
    seen = [j for j in range(len(passages)) if not blocked[i, j] and (j == target or not repeated[j])]
    scores = {j: queries[i] @ passages[j] / temperature for j in seen}
    forward.append(-scores[target] + np.log(sum(np.exp(s) for s in scores.values())))
    hits.append(all(s < scores[target] for j, s in scores.items() if j != target))
    scores = {k: queries[k] @ passages[target] / temperature for k in range(len(queries)) if not blocked[k, target]}
    backward.append(-scores[i] + np.log(sum(np.exp(s) for s in scores.values())))
  loss = (np.mean(forward) + np.mean(backward)) / 2 if both_directions else np.mean(forward)
  return loss, np.mean(hits)


@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_equals_the_plain_loop(both_directions, temperature):
  rng = np.random.default_rng(3)
  queries, passages = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=(15, 4)).astype(np.float32)
  targets = np.array([0, 3, 7, 9, 14])
  blocked = rng.random((5, 15)) < 0.3
  blocked[np.arange(5), targets] = False
  again = rng.random(15) < 0.3
  assert again[targets].any()
  options = {"temperature": temperature, "both_directions": both_directions}
  loss, metrics = contrastive_loss(queries, passages, targets, blocked, again, **options)
  expected, accuracy = oracle(queries, passages, targets, blocked, again, temperature, both_directions)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=2e-6)
  np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
  np.testing.assert_allclose(metrics["positive_score"], np.mean(np.sum(queries * passages[targets], axis=1)), rtol=1e-5)


# Scores of three queries (rows) and three passages: the identity as passages makes the queries the scores.
SCORES = np.log(np.array([[2, 1, 1], [3, 1, 4], [1, 1, 6]], np.float32))


@pytest.mark.parametrize(
  ("blocked", "probabilities", "accuracy"),
  [
    ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], [2 / 4, 1 / 8, 6 / 8], 2 / 3),
    ([[0, 0, 0], [1, 0, 0], [0, 0, 0]], [2 / 4, 1 / 5, 6 / 8], 2 / 3),
    ([[0, 0, 0], [1, 0, 1], [0, 0, 0]], [2 / 4, 1, 6 / 8], 1),
    ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], [1, 1, 1], 1),
  ],
)
def test_three_by_three_by_hand(blocked, probabilities, accuracy):
  loss, metrics = contrastive_loss(SCORES, np.eye(3), np.arange(3), np.array(blocked, bool), temperature=1.0)
  np.testing.assert_allclose(loss, -np.mean(np.log(probabilities)), rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)


def test_ties_are_no_hits():
  _, metrics = contrastive_loss(np.ones((2, 1)), np.ones((2, 1)), np.arange(2), np.zeros((2, 2), bool), temperature=1.0)
  assert metrics["accuracy"] == 0


def test_blocked_pairs_get_no_gradient():
  blocked = np.zeros((2, 3), bool)
  blocked[:, 2] = True

  def loss(passages):
    return contrastive_loss(SCORES[:2], passages, np.arange(2), blocked, temperature=0.05)[0]

  gradient = np.asarray(jax.grad(loss)(jnp.eye(3) * 100))
  assert np.isfinite(gradient).all() and not gradient[2].any() and gradient[:2].any()
