from __future__ import annotations

import re
from pathlib import Path

import megatron_bert
from megatron_bert.config import run_paths
from megatron_bert.config.run_paths import RunPaths
from tests.small_model import small_config


def test_a_configuration_knows_what_stands_where_in_its_run_directory() -> None:
    paths = small_config(run={"dir": "runs/small"}).run.paths
    assert paths == RunPaths(Path("runs/small"))
    assert paths.checkpoints == Path("runs/small/checkpoints")
    assert RunPaths.around(paths.checkpoints / "step_00000005").metrics == paths.metrics.absolute()


def test_no_other_file_spells_the_names_in_a_run_directory() -> None:
    home, package = Path(run_paths.__file__), Path(megatron_bert.__file__).parent
    joined = re.findall(r'/ ("[\w.]+")', home.read_text())
    assert len(joined) == 8
    spelt = re.compile("/ (" + "|".join(map(re.escape, joined)) + ")")
    others = (path for path in package.rglob("*.py") if path != home)
    assert [str(path) for path in others if spelt.search(path.read_text("utf-8"))] == []
