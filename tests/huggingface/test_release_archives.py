from __future__ import annotations

from pathlib import Path

import pytest

from tests.huggingface.releases import place_in


@pytest.mark.parametrize("name", ["../up", "models/../../up", "/absolute"])
def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out of"):
        place_in(tmp_path, name)


def test_a_name_has_its_place_in_the_folder(tmp_path: Path) -> None:
    assert place_in(tmp_path, "models/bert/x..y.py") == tmp_path / "models" / "bert" / "x..y.py"
