"""Optional packages' kernels on the model's own parameters, here by stand-ins for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_bert.errors import ConfigError
from megatron_bert.model import kernels
from megatron_bert.model.bert import BertForPretraining
from megatron_bert.model.build import build_model
from tests.distributed_harness import run_ranks
from tests.small_model import VOCABULARY, cpu_topology, packed_inputs, small_config, small_model
from tests.stand_ins import install

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}


class _EngineProduct(torch.autograd.Function):
    """Reads weight and bias forward; backward only what it has saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, grad.sum(0) if ctx.needs_input_grad[2] else None


class _Engine:
    """What the stand-ins for Transformer Engine were asked."""

    def __init__(self) -> None:
        self.products: list[tuple[tuple[int, ...], tuple[int, ...], bool, object]] = []
        self.recipe: object = None

    @contextmanager
    def autocast(self, enabled: bool, recipe: object) -> Iterator[None]:
        assert enabled
        self.recipe = recipe
        yield
        self.recipe = None

    def install(self, patch: pytest.MonkeyPatch, *, autocast: str = "autocast") -> None:
        told = self

        class Linear(nn.Module):
            def __init__(
                self, inputs: int, outputs: int, *, bias: bool, params_dtype: Any, device: str
            ) -> None:
                super().__init__()
                assert device == "meta"
                options = {"dtype": params_dtype, "device": device}
                self.use_bias = bias
                self.weight = nn.Parameter(torch.empty(outputs, inputs, **options))
                # Without a bias there is an empty tensor of that name.
                self.bias = nn.Parameter(torch.empty(outputs, **options)) if bias else Tensor()

            def forward(self, x: Tensor) -> Tensor:
                for parameter in self.parameters():
                    assert (parameter.dtype, parameter.device) == (x.dtype, x.device)
                shape = tuple(self.weight.shape)
                told.products.append((tuple(x.shape), shape, self.use_bias, told.recipe))
                return _EngineProduct.apply(x, self.weight, self.bias if self.use_bias else None)

        def enter(enabled: bool, **recipe: object) -> Any:
            return told.autocast(enabled, *recipe.values())

        install(
            patch,
            "transformer_engine.pytorch",
            Linear=Linear,
            **{autocast: enter},
        )
        install(
            patch,
            "transformer_engine.common.recipe",
            Float8CurrentScaling=lambda: "current scaling",
        )
        patch.setattr(kernels, "_check_device", lambda *_, **__: None)


def _install_apex(patch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def norm(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float) -> Tensor:
        calls.append(1)
        return F.layer_norm(x, shape, weight, bias, eps)

    install(patch, "apex.normalization.fused_layer_norm", fused_layer_norm_affine=norm)
    patch.setattr(kernels, "_check_device", lambda *_, **__: None)
    return calls


def _train(
    name: str, tensor: int, sequence: bool, compiled: bool, recompute: str
) -> dict[str, Tensor]:
    """The loss and all gradients of a step of two micro-batches."""
    config = small_config(
        kernels=name, model=DROPOUT, compile={"enabled": compiled}, recompute=recompute
    )
    compile_block = nn.Module.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Module,
            "compile",
            lambda block, **options: compile_block(block, backend="aot_eager", **options),
        )
        engine = _Engine()
        engine.install(patch)
        norms = _install_apex(patch)
        topology = cpu_topology(tensor=tensor, sequence_parallel=sequence)
        model = small_model(config, topology)
        batches = [packed_inputs(2), packed_inputs(2, first_row=2)]
        loss = model.runner.train(batches, torch.tensor(7.0))
        model.sum_shared_gradients()
        # Two layers of seven linear layers and two norms each, final norm and head's norm.
        passes = 2 if recompute == "full" else 1
        assert len(engine.products) == (2 * 2 * 7 * passes if name == "te" else 0)
        assert len(norms) == (2 * (2 * 2 * passes + 2) if name == "apex" else 0)
    gradients = {f"{n}.grad": p.grad for n, p in model.named_parameters().items()}
    return {
        "loss": loss,
        **{n: g.to_local() if hasattr(g, "to_local") else g for n, g in gradients.items()},
    }


def _check_training(tensor: int, sequence: bool, compiled: bool, recompute: str) -> None:
    expected = _train("torch", tensor, sequence, compiled, recompute)
    for name in ("te", "apex"):
        found = _train(name, tensor, sequence, compiled, recompute)
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize(
    ("tensor", "sequence", "compiled", "recompute"),
    [
        (1, False, False, "full"),
        (2, False, False, "selective"),
        (2, True, False, "none"),
        (1, False, True, "none"),
        (1, False, True, "full"),
    ],
)
def test_a_package_s_kernels_give_the_losses_and_gradients_of_pytorch_under_the_same_names(
    tensor: int, sequence: bool, compiled: bool, recompute: str
) -> None:
    arguments = (tensor, sequence, compiled, recompute)
    run_ranks(tensor, _check_training, *arguments)


def _products(tensor: int, autocast: str, fp8: str) -> list[Any]:
    config = small_config(
        kernels="te", precision={"compute": "fp32", "fp8": fp8}, model={"num_layers": 1}
    )
    with pytest.MonkeyPatch.context() as patch:
        engine = _Engine()
        engine.install(patch, autocast=autocast)
        model = small_model(config, cpu_topology(tensor=tensor))
        model.runner.train([packed_inputs(2)], torch.tensor(7.0))
        return engine.products


def test_the_engine_s_products_have_the_shapes_of_a_rank_s_part() -> None:
    products = [product[:3] for product in run_ranks(2, _products, 2, "autocast", "none")[1]]
    tokens = 2 * 32
    assert products == [
        ((tokens, 32), (16, 32), True),  # query
        ((tokens, 32), (8, 32), True),  # key, replicated
        ((tokens, 32), (8, 32), True),  # value
        ((tokens, 16), (32, 16), False),  # output: its bias is added after the sum over ranks
        ((tokens, 32), (24, 32), True),  # gate
        ((tokens, 32), (24, 32), True),  # up
        ((tokens, 24), (32, 24), False),  # down
    ]


@pytest.mark.parametrize("autocast", ["autocast", "fp8_autocast"])
def test_fp8_is_asked_for_around_each_product_by_the_recipe_without_a_history(
    autocast: str,
) -> None:
    products = run_ranks(1, _products, 1, autocast, "current")[0]
    assert {product[3] for product in products} == {"current scaling"}
    products = run_ranks(1, _products, 1, autocast, "none")[0]
    assert {product[3] for product in products} == {None}


def _modules_of(name: str) -> tuple[list[str], list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        _Engine().install(patch)
        _install_apex(patch)
        (model,) = small_model(small_config(kernels=name), cpu_topology()).chunks
        assert isinstance(model, BertForPretraining)
        return [n for n, _ in model.named_modules()], list(model.state_dict())


@pytest.mark.parametrize("name", ["te", "apex"])
def test_nothing_of_a_package_is_part_of_the_model(name: str) -> None:
    assert run_ranks(1, _modules_of, name) == run_ranks(1, _modules_of, "torch")


def _refusal(name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        build_model(small_config(kernels=name), VOCABULARY, cpu_topology())
    return str(refused.value)


@pytest.mark.parametrize("name", ["te", "apex"])
def test_a_machine_without_cuda_is_refused_when_the_model_is_built(name: str) -> None:
    assert f"kernels = {name}: it computes on CUDA only" in run_ranks(1, _refusal, name)[0]


def test_a_gpu_without_fp8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A100")
    device = torch.device("cuda", 0)
    for name in ("te", "torch"):
        with pytest.raises(ConfigError, match="an A100 has no FP8 products"):
            kernels.use_kernels(nn.Linear(2, 2), name, device, torch.bfloat16, fp8=True)


def test_a_gpu_that_is_too_old_for_fused_kernels_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a T4")
    device = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"a T4 has compute capability 7\.5, and 8\.0 is needed"):
        kernels.use_kernels(nn.Linear(2, 2), "fused", device, torch.bfloat16, fp8=False)


def _import_error(folder: Path) -> str:
    package = folder / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('built for CUDA 99')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setattr(kernels, "_check_device", lambda *_, **__: None)
        return _refusal("te")


def test_a_package_that_cannot_be_imported_is_refused_with_its_own_words(tmp_path: Path) -> None:
    message = run_ranks(1, _import_error, tmp_path)[0]
    assert "cannot be imported (RuntimeError: built for CUDA 99)" in message
    assert "use kernels=torch" in message


GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize(
    ("name", "module", "fp8", "tolerance"),
    [
        pytest.param("te", "transformer_engine.pytorch", "none", 1e-2, marks=GPU),
        pytest.param("te", "transformer_engine.pytorch", "current", 5e-2, marks=GPU),
        pytest.param("torch", "torch", "current", 5e-2, marks=GPU),
        pytest.param("apex", "apex.normalization", "none", 1e-2, marks=GPU),
    ],
)
def test_on_a_gpu_a_package_gives_the_losses_of_pytorch(
    name: str, module: str, fp8: str, tolerance: float, tiny_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip(module, reason=f"{module} is not installed")
    from tests.parallel.test_gpu import _losses
    from tests.training.runs import run_config

    losses = {
        (kernel, precision): _losses(
            run_config(
                tiny_data,
                tmp_path / f"{kernel}-{precision}",
                run={"device": "cuda"},
                precision={"compute": "bf16", "fp8": precision},
                model={"hidden_size": 64},
                kernels=kernel,
            ),
            tmp_path / f"{kernel}-{precision}-config",
        )
        for kernel, precision in (("torch", "none"), (name, fp8))
    }
    assert losses[name, fp8] == pytest.approx(losses["torch", "none"], rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize(
    "model", [{"hidden_size": 96}, {"architecture": "modernbert", "num_query_groups": 4}]
)
def test_on_a_gpu_fused_kernels_give_the_losses_of_pytorch(
    model: dict[str, Any], recompute: str, tiny_data: Path, tmp_path: Path
) -> None:
    from tests.parallel.test_gpu import _losses
    from tests.training.runs import run_config

    losses = {
        name: _losses(
            run_config(
                tiny_data,
                tmp_path / name,
                run={"device": "cuda"},
                precision={"compute": "bf16"},
                model={"hidden_size": 64, **model},
                recompute=recompute,
                kernels=name,
            ),
            tmp_path / f"{name}-config",
        )
        for name in ("torch", "fused")
    }
    assert losses["fused"] == pytest.approx(losses["torch"], rel=1e-2)
