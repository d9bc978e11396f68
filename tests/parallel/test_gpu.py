"""On one GPU: the same numbers as on the CPU, NCCL's groups of one rank, and no graph break."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import CompileConfig, Config
from megatron_bert.run.metrics import read
from megatron_bert.training.main import main
from tests.training.runs import run_config, steps_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _losses(config: Config, folder: Path) -> list[float]:
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(dump_config(config))
    assert main(["--config", str(file)]) == 0
    lines = steps_of(read(config.run.directory / "metrics.jsonl"))
    return [line["loss"] for line in lines.values()]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_gpu_trains_as_the_cpu_does(tiny_data: Path, tmp_path: Path, recompute: str) -> None:
    model = {"attention_dropout": 0.0}
    losses = {
        device: _losses(
            run_config(
                tiny_data,
                tmp_path / device,
                run={"device": device},
                model=model,
                recompute=recompute,
                parallel={"sequence": True},
            ),
            tmp_path / f"{device}-config",
        )
        for device in ("cpu", "cuda")
    }
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)


# A compiler's advice (TF32 for fp32 products), and what Dynamo can hide only where warnings are no
# errors (that it looks at an activation's `.grad`).
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_train_in_bf16_on_a_gpu(tiny_data: Path, tmp_path: Path) -> None:
    config = run_config(
        tiny_data,
        tmp_path / "run",
        run={"device": "cuda"},
        precision={"compute": "bf16"},
        kernels="torch",
    )
    plain = _losses(config, tmp_path / "plain-config")
    compiled = config.model_copy(
        update={
            "compile": CompileConfig(enabled=True),
            "run": config.run.model_copy(update={"dir": str(tmp_path / "compiled")}),
        }
    )
    assert _losses(compiled, tmp_path / "compiled-config") == pytest.approx(plain, rel=5e-3)


@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_cuda_graphs_give_the_same_losses_as_launches(
    tiny_data: Path, tmp_path: Path, kernels: str
) -> None:
    # Two micro-batches a step, rows of two lengths, evaluations in between.
    config = run_config(
        tiny_data,
        tmp_path / "launched",
        run={"device": "cuda"},
        precision={"compute": "bf16"},
        kernels=kernels,
    )
    recorded = config.model_copy(
        update={
            "compile": CompileConfig(cuda_graphs=True),
            "run": config.run.model_copy(update={"dir": str(tmp_path / "recorded")}),
        }
    )
    losses = _losses(config, tmp_path / "launched-config")
    assert _losses(recorded, tmp_path / "recorded-config") == pytest.approx(losses, rel=1e-3)


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="no FP8 products",
)
def test_fp8_beside_fused_kernels_trains_as_bf16_does(tiny_data: Path, tmp_path: Path) -> None:
    losses = {
        fp8: _losses(
            run_config(
                tiny_data,
                tmp_path / fp8,
                run={"device": "cuda"},
                precision={"compute": "bf16", "fp8": fp8},
                kernels="fused",
            ),
            tmp_path / f"{fp8}-config",
        )
        for fp8 in ("none", "current")
    }
    assert losses["current"] != losses["none"]
    assert losses["current"] == pytest.approx(losses["none"], rel=2e-2)
