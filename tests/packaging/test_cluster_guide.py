"""What docs/clusters.md tells to copy and run, run where no cluster is."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from megatron_bert.config.load import load_config

CHECKOUT = Path(__file__).resolve().parents[2]
GUIDE = CHECKOUT / "docs" / "clusters.md"
EXAMPLE = CHECKOUT / "examples" / "retrievabert_1.3b.yaml"


def test_the_data_job_makes_the_datasets_that_the_example_names(
    tmp_path: Path, tiny_texts: list[str], tiny_tokenizer_path: Path
) -> None:
    config = load_config(EXAMPLE)
    (tmp_path / "tools").symlink_to(CHECKOUT / "tools")
    activate = tmp_path / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={Path(sys.executable).parent}:$PATH\n")
    text = tmp_path / "data" / "text" / "ja_cc"
    text.mkdir(parents=True)
    (tmp_path / config.data.tokenizer).write_bytes(tiny_tokenizer_path.read_bytes())
    for half in (0, 1):
        lines = [json.dumps({"text": document}) for document in tiny_texts[half::2]]
        with gzip.open(text / f"{half}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines))
    script = re.search(r"^cat > preprocess.sh <<'END'\n(.*?)^END$", GUIDE.read_text(), re.M | re.S)
    assert script is not None
    (tmp_path / "preprocess.sh").write_text(script[1])
    result = subprocess.run(
        ["bash", "preprocess.sh"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    made = sorted(path.name for path in (tmp_path / "data").glob("*.bin"))
    assert made == [
        f"{Path(data[0].prefix).name}.bin" for data in (config.data.train, config.data.valid)
    ]
