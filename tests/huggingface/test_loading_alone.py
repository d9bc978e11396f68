from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import transformers

from tests.deadlines import DEADLINE_SECONDS
from tests.huggingface.exported import write_exported

# Runs where the package cannot be imported.
LOAD = """
import sys
sys.modules["megatron_bert"] = None
sys.path.insert(0, sys.argv[1])
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer
assert transformers.__version__ == sys.argv[2], transformers.__version__
exported, saved = sys.argv[3:]
trusted = {"trust_remote_code": True}
tasks = ("MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
         "MultipleChoice")
ids = torch.arange(8, 20).view(2, 6)

def check(folder):
    config = AutoConfig.from_pretrained(folder, **trusted)
    assert config.model_type == "retrieva-bert"
    encoder = AutoModel.from_pretrained(folder, **trusted).eval()
    hidden = encoder(ids).last_hidden_state
    for task in tasks:
        auto = getattr(transformers, f"AutoModelFor{task}")
        model = auto.from_pretrained(folder, **trusted).eval()
        assert type(model).__name__ == f"RetrievaBertFor{task}"
        assert torch.equal(model.bert(ids).last_hidden_state, hidden), task
        rows = ids[:, None] if task == "MultipleChoice" else ids
        assert model(rows)[0].shape[0] == 2
    fresh = AutoModel.from_config(config, **trusted)
    assert fresh(ids).last_hidden_state.shape == hidden.shape
    return hidden

hidden = check(exported)
auto = transformers.AutoModelForMaskedLM
auto.from_pretrained(exported, **trusted).save_pretrained(saved)
AutoTokenizer.from_pretrained(exported).save_pretrained(saved)
assert torch.equal(check(saved), hidden)
assert "megatron_bert" not in {name for name, module in sys.modules.items() if module}
"""


def test_every_auto_class_loads_an_export_and_what_was_saved_again_without_the_package(
    tmp_path: Path,
) -> None:
    exported = write_exported(tmp_path / "exported")
    packages = Path(transformers.__file__).parents[1]
    command = [sys.executable, "-I", "-W", "error::DeprecationWarning:transformers_modules"]
    result = subprocess.run(
        [*command, "-c", LOAD, packages, transformers.__version__, exported, tmp_path / "saved"],
        env={**os.environ, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_SECONDS,
    )
    assert result.returncode == 0, result.stderr[-3000:]
