"""The one family of errors that a user can cause.

Every message names what is wrong (the file or the key), why, and the way out. Each class is also
the standard exception that a caller would expect, so `except ValueError` keeps working. Whatever
is not in this family is a defect of ours and shows its traceback; `Interrupted` alone is neither.
"""

EXIT_AGAIN = 75  # stopped on request, and to be started again: EX_TEMPFAIL of sysexits.h


class MegatronExtError(Exception):
    """Base of the family; `megatron-ext` prints its message without a traceback and exits 2."""


class ConfigError(MegatronExtError, ValueError):
    """A recipe, an override or a plan that cannot be right."""


class DataError(MegatronExtError, ValueError):
    """Text, shards, tokenizers or mixtures that cannot be used."""


class CheckpointError(MegatronExtError, RuntimeError):
    """A checkpoint that is missing, altered, refused, or does not fit."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what its manifest says: a file missing, cut short, changed. An older one may be whole."""


class RunError(MegatronExtError, RuntimeError):
    """A run folder that cannot be used: another recipe, another owner, unfinished parents."""


class LaunchError(MegatronExtError, RuntimeError):
    """A stage that could not be started, or failed."""


class TrainingError(MegatronExtError, RuntimeError):
    """Training that must stop: a loss or gradient that is not finite, an impossible setting."""


class Interrupted(SystemExit):
    """The work was asked to stop and has, with exit code `EXIT_AGAIN`; started again, it goes on.

    Nothing is amiss, so it is not of the family, and no `except Exception` on its way holds it up.
    """

    def __init__(self, words: str) -> None:
        super().__init__(EXIT_AGAIN)
        self.words = words

    def __str__(self) -> str:
        return self.words
