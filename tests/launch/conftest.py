import pytest
from support.fakes import Fakes


@pytest.fixture
def fakes(tmp_path):
  return Fakes(tmp_path / "fakes")
