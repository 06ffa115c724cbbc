from __future__ import annotations

import pytest

from tests.commands.made_place import Place, made_place


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return made_place(tmp_path_factory.mktemp("place"))
