"""From settings to steps: seeds share a compiled step, and wrong settings are named."""

import jax
import pytest
from training.common import ENCODER, backbone, mesh_of

from dptdr_jax.core.errors import InputError
from dptdr_jax.settings import Prompt, Train, Vector
from dptdr_jax.training import steps
from dptdr_jax.training.state import init_state


def test_equal_settings_share_the_program_and_not_the_seed():
  made = []
  for seed, clip in ((0, 1.0), (7, 1.0), (7, 2.0)):
    train = Train(steps=10, clip=clip)
    model = steps.bi_encoder(ENCODER, Prompt(length=4), Vector(), train, dropout=-1, compute_dtype="float32")
    updates = steps.optimizer(train, train.steps)
    state = jax.eval_shape(lambda: init_state(model.init_trainable(jax.random.key(0)), updates))  # noqa: B023
    made.append(
      steps.train_step(model, updates, state, backbone(), train=train, temperature=1.0, seed=seed, mesh=mesh_of(8))[0]
    )
  assert made[0].func is made[1].func and made[0].func is not made[2].func
  assert [step.args for step in made] == [(0,), (7,), (7,)]


@pytest.mark.parametrize(
  ("prompt", "shift"),
  [(Prompt(length=5), 5), (Prompt(length=5, position_shift=0), 0), (Prompt(kind="shallow", length=5), 0)],
)
def test_the_position_shift_is_the_length_of_a_deep_prompt_unless_given(prompt, shift):
  spec = steps.prompt_spec(prompt)
  assert (spec.kind, spec.length, spec.position_shift, spec.projection_size) == (prompt.kind, 5, shift, 0)


@pytest.mark.parametrize(
  ("field", "words"),
  [
    ("train.query_chunk", "query"),
    ("train.passage_chunk", "passage"),
    ("cross.chunk", "pair"),
    ("pretrain.chunk", "span"),
  ],
)
def test_a_chunk_that_does_not_divide_names_its_field(field, words):
  with pytest.raises(InputError, match=rf"{field}: a {words} chunk of 3 .* 4 rows .*1, 2, 4; or 0: all at once"):
    steps.check_chunk(field, 3, 30)
  steps.check_chunk(field, 0, 30)


def test_a_warmup_in_steps_needs_their_number():
  with pytest.raises(InputError, match="warmup in steps needs the number of steps"):
    steps.check_optimizer(Train(warmup=100))
  steps.check_optimizer(Train(warmup=100, steps=100))
  with pytest.raises(InputError, match="100 steps does not fit a training of 99"):
    steps.check_optimizer(Train(warmup=100, steps=99))
