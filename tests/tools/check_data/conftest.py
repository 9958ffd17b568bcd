"""The corpus that tests break."""

import pytest

from tests.tools.check_data.support import Corpus


@pytest.fixture
def corpus(tmp_path, world) -> Corpus:
    return Corpus(tmp_path, world)
