"""What figures are told to have been measured with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert.benchmark.machine import describe_versions


def test_versions_of_optional_packages_and_cuda_are_told_where_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not {"transformer-engine", "cuda"} & describe_versions().keys()
    about = tmp_path / "transformer_engine-9.8.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: transformer_engine\nVersion: 9.8\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    versions = describe_versions()
    assert versions["transformer-engine"] == "9.8"
    assert versions["cuda"] == "12.9"
