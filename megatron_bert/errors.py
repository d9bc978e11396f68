"""Errors that a user can fix."""

from __future__ import annotations


class UserError(Exception):
    """The user's input cannot be used; the message names the input, its value and the remedy."""


class ConfigError(UserError):
    """A configuration key is unknown, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A dataset, text file or tokenizer is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged or belongs to another run."""


class RunError(Exception):
    """Something ended a valid run; the message says what it was and how to continue.

    Notes (`add_note`) are details for whoever looks for the cause.
    """


def details_of(error: BaseException) -> list[str]:
    """The notes of an error; without any, the exception lacks the attribute."""
    return list(getattr(error, "__notes__", ()))
