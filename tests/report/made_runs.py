"""Run directories as training leaves them, with numbers that were never trained."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_bert.config.yaml_text import format_document
from megatron_bert.data.token_kinds import TOKEN_KINDS
from megatron_bert.run.metrics import MetricsFile
from megatron_bert.training.scores import REPLACEMENTS

STAGES = (128, 256, 512, 2048)
ROWS = 1024


def make_run(
    folder: Path,
    steps: int = 400,
    *,
    seed: int = 0,
    texts: Sequence[str] = ("wiki",),
    evaluations: int = 20,
    skipped: Sequence[int] = (),
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run of four stages and three jobs on four GPUs.

    Args:
        folder: the run directory, made.
        steps: training lines.
        seed: of the noise.
        texts: what it is evaluated on.
        evaluations: how often; at most after every step.
        skipped: steps whose loss is no number.
        settings: its configuration.
    """
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    file = MetricsFile(folder / "metrics.jsonl")
    tokens = 0
    for step in range(1, steps + 1):
        stage = min(3, 4 * step // steps)
        tokens += ROWS * STAGES[stage]
        loss = 2.0 + 8.8 * math.exp(-9 * step / steps) + 0.3 * stage / 3 + draw.gauss(0, 0.04)
        seconds = STAGES[stage] / 900 * draw.uniform(0.98, 1.1)
        line = {
            "step": step,
            "stage": stage,
            "seq_length": STAGES[stage],
            "loss": math.nan if step in skipped else loss,
            "lr": 1e-4 * min(1.0, 20 * step / steps) * (1 - step / (steps + 1)),
            "grad_norm": 0.4 * math.exp(draw.gauss(0, 0.2)) + 6 / step,
            "skipped": step in skipped,
            "masked_tokens": ROWS * STAGES[stage] // 7,
            "consumed_rows": step * ROWS,
            "batch_hash": f"{step:016x}",
            "tokens": tokens,
            "tokens_per_second": ROWS * STAGES[stage] / seconds,
            "step_seconds": seconds,
            "data_seconds": 1e-4 * draw.uniform(0.5, 2.0),
            "model_seconds": 0.9 * seconds,
            "optimizer_seconds": 0.02,
            "tflops_per_gpu": 410 / seconds * STAGES[stage] / 1000,
            "mfu": 0.41 / seconds * STAGES[stage] / 1000,
            "peak_memory_gb": 40.0 + 8 * stage,
        }
        if step in skipped:
            line["rows"] = [(step - 1) * ROWS, step * ROWS - 1]
        elif step == steps // 2:
            line |= {"rows": [(step - 1) * ROWS, step * ROWS - 1], "spike_limit": loss - 0.1}
        file.write(line)
        if step % max(1, steps // evaluations) == 0:
            file.write(_evaluation(step, stage, loss, texts))
    file.close()
    jobs = [
        {"job": str(71 + n), "step": n * steps // 3, "ranks": 4, "nodes": 1, "time": "2026-01-01"}
        for n in range(3)
    ]
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    (folder / "config.yaml").write_text(format_document(dict(settings or {})))
    (folder / "FINISHED").write_text(json.dumps({"step": steps}))
    return folder


def _evaluation(step: int, stage: int, loss: float, texts: Sequence[str]) -> dict[str, Any]:
    scores = {
        text: {
            "loss": loss + 0.2 * number,
            "accuracy": 1 / (loss + 0.2 * number),
            "fixed_loss": loss + 0.1 + 0.2 * number,
            "fixed_accuracy": 1 / (loss + 0.1 + 0.2 * number),
            "accuracy_by_replacement": {
                kind: (1 + place) / (9 * (loss + number)) for place, kind in enumerate(REPLACEMENTS)
            },
            # As many as a Japanese text has at the most: one more than there are colours.
            "accuracy_by_characters": {
                kind: (1 + place) / (9 * (loss + number))
                for place, kind in enumerate(TOKEN_KINDS)
                if kind != "latin"
            },
        }
        for number, text in enumerate(texts)
    }
    return {
        "step": step,
        "stage": stage,
        "valid_loss": loss + 0.1 * (len(texts) - 1),
        "valid_accuracy": 1 / (loss + 0.1 * (len(texts) - 1)),
        "valid_seq_length": STAGES[stage],
        "fixed_seq_length": 512,
        "valid": scores,
        "evaluation_seconds": 3.0 + stage,
    }
