"""One undisturbed run for all tests of faults: what they end with must be what it ends with."""

import pytest
from support.attacked import Attacked
from support.once import once


@pytest.fixture(scope="session")
def attacked(tmp_path_factory) -> Attacked:
  return Attacked(once(tmp_path_factory, "attacked", lambda directory: Attacked(directory).make()))
