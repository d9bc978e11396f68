"""On one GPU: the same numbers as on the CPU, NCCL's groups of one rank, and no graph break."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_bert.config.load import dump_config
from megatron_bert.config.schema import CompileConfig, Config
from megatron_bert.parallel import recorded_passes
from megatron_bert.parallel.gradient_sums import embedding_gradient, weight_gradients
from megatron_bert.parallel.recorded_passes import Recorder
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


_BF16 = {"compute": "bf16"}
_HAS_FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
    reason="no FP8 products",
)


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"kernels": kernels, "recompute": recompute, "precision": _BF16}
            for kernels in ("torch", "fused")
            for recompute in ("none", "full")
        ),
        # Heads of a size that attention's kernels take, and positions that are rotary.
        {"model": {"num_attention_heads": 2}, "precision": _BF16},
        {
            "model": {
                "architecture": "modernbert",
                "num_attention_heads": 2,
                "num_query_groups": 2,
            },
            "precision": _BF16,
        },
        # Scores are held, and computed again.
        {"recompute": "selective"},
        {"run": {"deterministic": True}, "optimizer": {"name": "muon"}, "precision": _BF16},
        {"profile": {"steps": "2:3"}},
        pytest.param({"precision": {"compute": "bf16", "fp8": "current"}}, marks=_HAS_FP8),
    ],
    ids=str,
)
def test_recorded_passes_give_the_same_losses_as_launched_ones(
    tiny_data: Path,
    tmp_path: Path,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Three micro-batches a step, rows of two lengths, evaluations in between.
    recordings = []
    record = recorded_passes.CudaGraphs.__call__

    def counted(graphs: recorded_passes.CudaGraphs) -> AbstractContextManager[Recorder]:
        recordings.append(graphs)
        return record(graphs)

    monkeypatch.setattr(recorded_passes.CudaGraphs, "__call__", counted)
    losses = {}
    for cuda_graphs in (False, "auto"):
        recordings.clear()
        config = run_config(
            tiny_data,
            tmp_path / str(cuda_graphs),
            **{**changes, "run": {"device": "cuda", **changes.get("run", {})}},
            compile={"cuda_graphs": cuda_graphs},
        )
        losses[cuda_graphs] = _losses(config, tmp_path / f"{cuda_graphs}-config")
        # One for each length.
        assert len(recordings) == (0 if cuda_graphs is False else 2)
    assert losses["auto"] == pytest.approx(losses[False], rel=1e-3)


@_HAS_FP8
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


def test_products_and_looked_up_rows_add_to_sums_what_they_should() -> None:
    random = torch.Generator("cuda").manual_seed(0)

    def drawn(*size: int) -> Tensor:
        x = torch.randn(size, generator=random, device="cuda")
        return x.to(torch.bfloat16)

    memory = torch.zeros(448, 256, device="cuda")
    weights = [nn.Parameter(drawn(rows, 256)) for rows in (320, 64, 64)]
    table = nn.Parameter(drawn(5000, 256))
    for weight, part in zip(weights, memory.split([320, 64, 64]), strict=True):
        weight.grad_dtype, weight.grad = torch.float32, part
    table.grad_dtype, table.grad = torch.float32, torch.zeros(5000, 256, device="cuda")
    products, rows = memory.double(), table.grad.double()
    for _ in range(3):
        x, y_grad = drawn(1024, 256), drawn(1024, 448)
        assert weight_gradients(y_grad, x, weights) == [None] * 3
        products += y_grad.double().T @ x.double()
        ids = torch.randint(3000, (1024,), generator=random, device="cuda")
        assert embedding_gradient(x, ids, table) is None
        rows.index_add_(0, ids, x.double())
    assert (memory.double() - products).norm() < 1e-5 * products.norm()
    # Rows that occur more than once are rounded to BF16 before they are added.
    assert (table.grad.double() - rows).norm() < 3e-3 * rows.norm()
