"""One tiny pipeline for all tests of this folder."""

import pytest

from tests.support import pipelines

pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def pipeline_dir(tmp_path_factory):
    """Not to be written to."""
    return pipelines.save_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Eight pictures with captions in text files."""
    return pipelines.save_pictures(tmp_path_factory.mktemp("pictures"))
