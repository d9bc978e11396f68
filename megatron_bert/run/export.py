"""A run's model for Hugging Face's transformers, with what the run measured of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megatron_bert.checkpoint.huggingface_config import ExportDtype
from megatron_bert.checkpoint.huggingface_export import export_checkpoint
from megatron_bert.checkpoint.manifest import Manifest
from megatron_bert.checkpoint.new_directory import check_is_new
from megatron_bert.checkpoint.store import find_checkpoint
from megatron_bert.command_line.argument_checks import checked
from megatron_bert.command_line.arguments import argument
from megatron_bert.errors import UserError
from megatron_bert.files import StrPath
from megatron_bert.run.figures import run_figures

_LICENSE_ID = re.compile("[a-z0-9][a-z0-9.-]*")
_LANGUAGE = re.compile("[a-z]{2,3}")


@checked
def export_model(
    source: StrPath,
    output: StrPath,
    dtype: ExportDtype = "fp32",
    *,
    tokenizer: StrPath | None = None,
    license_id: str = "unknown",
    languages: Sequence[str] = (),
) -> Path:
    """Write a directory for `AutoModelForMaskedLM` and `AutoTokenizer`.

    Args:
        source: a checkpoint's folder, or a run directory, whose newest intact checkpoint is taken.
        output: the directory to make; it must not exist yet, or be empty.
        dtype: dtype of the written weights.
        tokenizer: the tokenizer's file; default: where the run found it.
        license_id: the licence of the weights, for the model card, by its name on the Hub.
        languages: of the training text, for the model card, as ISO 639 codes (`["ja", "en"]`).

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: an argument has a value that it cannot have.
        CheckpointError: there is no checkpoint, it is damaged, or `output` cannot be made.
        DataError: the tokenizer is missing or is not the one that the run was trained with.
    """
    if not _LICENSE_ID.fullmatch(license_id):
        raise UserError(
            f"{argument('license_id')} = {license_id!r}: no identifier of the Hub; give one, "
            "such as 'apache-2.0', 'cc-by-sa-4.0' or 'other'"
        )
    for code in languages:
        if not _LANGUAGE.fullmatch(code):
            raise UserError(
                f"{argument('languages')} = {code!r}: no code of a language; give those of "
                "ISO 639, two or three small letters each, such as 'ja'"
            )
    # Before the checkpoint is read, which takes minutes.
    check_is_new(Path(output))
    checkpoint = find_checkpoint(Path(source))
    export_checkpoint(
        checkpoint,
        Path(output),
        dtype,
        None if tokenizer is None else Path(tokenizer),
        figures=run_figures(checkpoint, Manifest.read(checkpoint).step),
        license_id=license_id,
        languages=languages,
        is_verified=True,
    )
    return checkpoint
