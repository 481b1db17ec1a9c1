"""Errors that a user can act on. Each message is one line: what was expected, what was found, where, and the remedy."""

DISTRIBUTION = "baton-ppo"  # what is installed; another project has the name baton there


def installed_by(extra: str) -> str:
    """The command that installs what an extra of pyproject.toml names."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class BatonError(Exception):
    """Base of all; the command line prints the message and exits with 1."""


class ConfigError(BatonError):
    """Settings, inputs or arguments cannot be used; the command line exits with 2."""


class TableError(BatonError):
    """A table does not have the columns, types or lengths it must have."""


class StoreError(BatonError):
    """What is in the store is missing or not what was written, or the store cannot be read or written."""


class TransientError(BatonError):
    """A server or a network did not answer; the same may work a little later."""


class UnreachableStoreError(StoreError, TransientError):
    """The store did not answer."""


class DamageError(StoreError):
    """A file of the store is not what it must be: which file, what of it, what was expected, what was found, the remedy."""

    def __init__(self, file: str, field: str, expected: object, found: object, hint: str) -> None:
        super().__init__(f"{file}: {field}: expected {expected}, found {found}; {hint}")
        self.file, self.field, self.expected, self.found, self.hint = file, field, str(expected), str(found), hint


class DroppedError(StoreError):
    """A part of a checkpoint that was not written, or is not kept."""


class ReplayError(StoreError):
    """Weights that were not kept cannot be made again here."""


class SupersededError(StoreError):
    """Another process committed an artifact first, with other bytes than those that this process went on with."""


class NonFiniteError(BatonError):
    """A number that must be finite is NaN or infinite."""


class RewardError(BatonError):
    """A reward source failed, or did not give one number per response."""


class StoppedError(BatonError):
    """A stage in a thread of its own was ended, since its process is to end."""


class TrackingError(BatonError):
    """MLflow could not be brought up to date with the store."""


class PrefectError(BatonError):
    """Prefect's server could not be reached, refused a request, or ended."""


class EnvironmentFailure(BatonError):  # noqa: N818 - an EnvironmentError is Python's OSError
    """An environment raised, hung, or gave what is not a finite number."""


def error_named(name: str, message: str) -> BatonError:
    """An error that another process has raised, by the name of its class: one that the command line treats alike."""
    kinds = {"DamageError": StoreError} | {kind.__name__: kind for kind in _kinds(BatonError) if kind is not DamageError}
    return kinds.get(name, BatonError)(message)


def _kinds(kind: type[BatonError]) -> list[type[BatonError]]:
    """The class and all that derive from it."""
    return [kind, *(below for each in kind.__subclasses__() for below in _kinds(each))]
