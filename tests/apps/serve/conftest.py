"""Models that are served on a thread."""

import pytest
from serve_cases import serving

import tarflowlm


def fixture_of(model: str):
    @pytest.fixture(scope="session")
    def made():
        with serving(tarflowlm.load(model), model) as served:
            yield served

    return made


twin = fixture_of("english-mini-ar")
flow = fixture_of("english-mini")
passes = fixture_of("english-passes")
pieces = fixture_of("stories-ar")  # its tokens hold the space before a word
