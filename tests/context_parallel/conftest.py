import pytest
from gang import Gang


@pytest.fixture(scope="session")
def gang(tmp_path_factory):
    gang = Gang(tmp_path_factory.mktemp("gang"))
    yield gang
    gang.close()
