from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.benchmark.gemm import seconds_of
from megatron_bert.benchmark.kernels import attention as attention_pieces
from megatron_bert.benchmark.kernels import fused as fused_pieces
from megatron_bert.benchmark.kernels import linear as linear_pieces
from megatron_bert.benchmark.kernels import pieces as kernel_pieces
from megatron_bert.benchmark.kernels.command import measure_command
from megatron_bert.benchmark.kernels.measure import KernelFigures, Piece, measure_kernels
from megatron_bert.benchmark.kernels.table import kernels_table
from megatron_bert.benchmark.kernels.work import KernelWork
from megatron_bert.benchmark.step.alone import time_attention
from megatron_bert.errors import ConfigError
from megatron_bert.optim import update_rules
from tests.benchmark.device_clock import DeviceClock
from tests.benchmark.test_benchmark_tool import run_tool
from tests.benchmark.test_step import MODEL
from tests.small_model import packed_inputs, small_config
from tests.stand_ins import FusedAdam, install
from tools import benchmark as tool

LINEARS = [
    "linear (query, output)",
    "linear (key, value)",
    "linear (gate, up)",
    "linear (down)",
]
PIECES = [
    "attention",
    *LINEARS,
    "norm",
    "activation",
    "activation and projection",
    "bias, dropout, residual",
    "dropout, residual, norm",
    "projection and cross-entropy",
    "AdamW",
]

# Written out and by SDPA, in FP8 too, in chunks and plain, by the hash and by a generator.
TIMED_TWICE = (
    "attention",
    *LINEARS,
    "bias, dropout, residual",
    "projection and cross-entropy",
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"{MODEL.rstrip()}\nrun: {{device: cpu}}\n")
    return path


def test_every_piece_is_timed_by_what_is_here_and_the_rest_has_its_reason(
    config: Path, tmp_path: Path
) -> None:
    arguments = ("model.vocab_size=512", "--config", config, "--json", "--lengths", 32, 64)
    done = run_tool("kernels", *arguments, "--dropout", 0.1, 0, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["device"] == "cpu"
    assert document["compute"] == "fp32"
    assert document["versions"]["torch"] == torch.__version__
    assert document["hardware"]["cores"] >= 1
    shapes = [piece["shape"] for piece in document["pieces"] if piece["piece"] == "attention"]
    assert [shape.partition(",")[0] for shape in shapes] == ["4 rows of 32"] * 2 + [
        "2 rows of 64"
    ] * 2
    assert list(dict.fromkeys(piece["piece"] for piece in document["pieces"])) == PIECES
    for piece in document["pieces"]:
        assert len(piece["times"]) == (2 if piece["piece"] in TIMED_TWICE else 1)
        for time in piece["times"]:
            assert time["forward_microseconds"] > 0
            assert (time["both_microseconds"] is None) == (piece["piece"] == "AdamW")
            assert (time["tflops"] is None) != (time["gb_per_second"] is None)
            assert (time["difference"] or 0) < (0.1 if "fp8" in time["name"] else 1e-5)
        assert all(piece["absent"].values())
    assert "projection and cross-entropy, 18 x 32 x 512" in done.stderr


def test_wrong_options_are_refused_as_for_steps(config: Path) -> None:
    with pytest.raises(ConfigError, match="--lengths 65: longer than"):
        tool.main(["kernels", "--config", str(config), "--lengths", "65"])


def test_several_ranks_are_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="with 2 ranks: they are measured on one"):
        tool.main(["kernels", "--config", str(config)])


def _measure(config: Path, *arguments: str) -> KernelFigures:
    options = ["kernels", *arguments, "--config", str(config), "--quick", "--lengths", "64"]
    given = tool._parser().parse_args(options)
    return measure_command(given, lambda _: None)


def _varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Attention of segments one by one, as packages take them."""
    assert ends.dtype == torch.int32
    assert ends[0] == 0
    assert ends[-1] == len(q)
    assert longest == ends.diff().max()
    out = []
    for begin, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        segment = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        out.append(F.scaled_dot_product_attention(*segment, enable_gqa=True).transpose(0, 1))
    return torch.cat(out)


class _DotProductAttention(nn.Module):
    def __init__(self, heads: int, size: int, **options: Any) -> None:
        super().__init__()
        assert (heads, size) == (2, 16)
        assert options == {
            "num_gqa_groups": 1,
            "attention_dropout": 0.0,
            "qkv_format": "thd",
            "attn_mask_type": "padding",
        }

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **segments: Any) -> Tensor:
        assert segments["cu_seqlens_kv"] is segments["cu_seqlens_q"]
        assert segments["max_seqlen_kv"] == segments["max_seqlen_q"]
        return _varlen(q, k, v, segments["cu_seqlens_q"], segments["max_seqlen_q"]).flatten(1)


class _Autocast:
    """Whether products are in FP8, and by which recipe."""

    entered: ClassVar[list[tuple[bool, object]]] = []

    def __init__(self, enabled: bool, recipe: object) -> None:
        self.entered.append((enabled, recipe))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, *, params_dtype: Any, **options: Any) -> None:
        super().__init__(inputs, outputs, dtype=params_dtype, **options)


class _LayerNorm(nn.LayerNorm):
    """Transformer Engine's, as far as it reads its weight: forward and, again, backward."""

    def forward(self, x: Tensor) -> Tensor:
        y, weight = super().forward(x), self.weight

        def read_again(_: Tensor) -> None:
            assert self.weight is weight

        if y.requires_grad:
            y.register_hook(read_again)
        return y


def test_optional_packages_are_given_the_same_work(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_3(q: Tensor, k: Tensor, v: Tensor, *segments: Any) -> tuple[Tensor, None]:
        assert segments[0] is segments[1]
        return _varlen(q, k, v, segments[0], segments[2]), None

    install(monkeypatch, "flash_attn_interface", flash_attn_varlen_func=flash_3)
    install(
        monkeypatch,
        "transformer_engine.pytorch",
        DotProductAttention=_DotProductAttention,
        LayerNorm=_LayerNorm,
        Linear=_Linear,
        autocast=_Autocast,
    )
    install(
        monkeypatch,
        "transformer_engine.common.recipe",
        Float8CurrentScaling=lambda: "current scaling",
    )
    install(monkeypatch, "apex.optimizers", FusedAdam=FusedAdam)
    install(
        monkeypatch,
        "apex.normalization.fused_layer_norm",
        fused_layer_norm_affine=lambda x, w, b, shape, eps: F.layer_norm(x, shape, w, b, eps),
    )
    monkeypatch.setattr(kernel_pieces, "has_nvidias_apex", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    figures = _measure(config, "compile.enabled=true", "model.vocab_size=512", "--dropout", "0")
    times = {piece.piece: {time.name: time for time in piece.times} for piece in figures.pieces}
    assert {"flash-attn 3", "transformer engine"} <= set(times["attention"])
    assert set(times["norm"]) == {"eager", "compiled", "transformer engine", "apex"}
    assert set(times["activation"]) == {"eager", "compiled"}
    assert set(times["AdamW"]) == {"fused (ours)", "apex"}
    for piece in ("attention", "norm"):
        assert all((time.difference or 0) < 1e-5 for time in times[piece].values())
    for piece in LINEARS:
        own = {"eager", "fp8 (ours)", "fp8 (ours), compiled"}
        assert set(times[piece]) == {*own, "transformer engine", "transformer engine, fp8"}
        assert 0 < (times[piece]["fp8 (ours)"].difference or 0) < 0.1
        assert times[piece]["transformer engine"].difference == 0
    assert set(_Autocast.entered) == {(False, "current scaling"), (True, "current scaling")}
    table = "\n".join(kernels_table(figures))
    assert "not measured: takes CUDA" in table
    assert "  flash-attn 3 " in table


def test_packages_that_cannot_be_imported_are_listed_and_the_others_are_measured(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built_for = "RuntimeError: built for CUDA 99"

    def fail(_: str) -> None:
        raise RuntimeError("built for CUDA 99")

    for name in ("flash_attn_interface", "transformer_engine"):
        install(monkeypatch, name)
    for module in (attention_pieces, kernel_pieces, linear_pieces, update_rules):
        monkeypatch.setattr(module, "import_module", fail)
    monkeypatch.setattr(kernel_pieces, "has_nvidias_apex", lambda: True)
    figures = _measure(config, "model.vocab_size=512", "--dropout", "0")
    assert all(piece.times for piece in figures.pieces)
    absent = {piece.piece: piece.absent for piece in figures.pieces}
    assert absent["attention"]["flash-attn 3"] == built_for
    assert absent["attention"]["transformer engine"] == built_for
    assert absent["norm"] == {
        "compiled": "compile.enabled=false",
        "transformer engine": built_for,
        "apex": built_for,
    }
    assert "built for CUDA 99; build https" in absent["AdamW"]["apex"]


def test_a_step_s_attention_is_timed_without_a_look_at_other_packages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(_: str) -> None:
        raise AssertionError("looked for a package")

    monkeypatch.setattr(attention_pieces, "find_spec", look)
    monkeypatch.setattr(attention_pieces, "import_module", look)
    batch: Any = SimpleNamespace(positions_BS=packed_inputs(2).positions)
    device = torch.device("cpu")
    assert time_attention(small_config().model, batch, torch.float32, device) > 0


@pytest.mark.parametrize(
    ("biases", "dropout", "passes"), [(1, 0.1, 5), (1, 0.0, 4), (0, 0.1, 5), (0, 0.0, 3)]
)
def test_a_residual_without_dropout_has_no_gradient_of_its_own_to_write(
    biases: int, dropout: float, passes: int
) -> None:
    architecture = "retrievabert" if biases else "modernbert"
    model = {"architecture": architecture, "num_query_groups": 4}
    config = small_config(model=model)
    device = torch.device("cpu")
    work = KernelWork(config, 128, None, [32], [64], [None], device)  # type: ignore[arg-type]
    piece = kernel_pieces._residual_piece(work, 64, dropout)
    assert piece.moved == (3 * 64 * 32 * 4, passes * 64 * 32 * 4)


@pytest.mark.peers
@pytest.mark.parametrize("architecture", ["retrievabert", "modernbert"])
def test_fused_kernels_compute_the_pieces_that_they_are_timed_at(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="needs Triton (tests/run.sh --peers installs it)")

    def add(_: object, fused: Any, alternatives: dict[str, Any], __: object) -> None:
        alternatives["fused (ours)"] = fused

    for module in (kernel_pieces, fused_pieces):
        monkeypatch.setattr(module, "add_fused", add)
    config = small_config(model={"architecture": architecture})
    device = torch.device("cpu")
    work = KernelWork(config, 128, None, [32], [64], [None], device)  # type: ignore[arg-type]
    pieces = [
        kernel_pieces._residual_piece(work, 16, 0.0),
        fused_pieces.residual_norm_piece(work, 16, 0.1),
        fused_pieces.activation_product_piece(work, 16),
    ]
    figures = measure_kernels(iter(pieces), device, "fp32", True, lambda _: None)
    for piece in figures.pieces:
        times = {time.name: time for time in piece.times}
        assert times["fused (ours)"].difference < 1e-5, piece.absent


@pytest.mark.parametrize(("taken", "most_calls"), [(1e-5, 3000), (0.02, 20)])
def test_short_work_on_a_gpu_is_timed_over_many_calls_and_long_work_over_one(
    taken: float, most_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, calls = DeviceClock(monkeypatch), []

    def work() -> None:
        calls.append(1)
        clock.seconds += taken

    assert seconds_of(work, torch.device("cuda", 0)) == pytest.approx(taken, rel=0.01)
    assert len(calls) <= most_calls


def test_what_refuses_is_listed_with_its_own_words_and_the_others_are_measured() -> None:
    x = torch.ones(8, 8, requires_grad=True)

    def refuse() -> Tensor:
        raise RuntimeError("no kernel for this shape\nat some place")

    piece = Piece("product", "8 x 8", (x,), {"refuses": refuse, "computes": lambda: x @ x}, {})
    figures = measure_kernels(iter([piece]), torch.device("cpu"), "fp32", False, lambda _: None)
    assert [time.name for time in figures.pieces[0].times] == ["computes"]
    assert figures.pieces[0].absent == {"refuses": "RuntimeError: no kernel for this shape"}
    assert figures.pieces[0].times[0].difference == 0
