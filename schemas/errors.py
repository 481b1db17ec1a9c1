"""What can go wrong in ways that a person can act on. Each message is one line that says what, where and what to do."""


class BatonError(Exception):
    """Base of all; the command line prints the message and exits with 1."""


class ConfigError(BatonError):
    """Settings, inputs or arguments cannot be used; the command line exits with 2."""


class TableError(BatonError):
    """A table does not have the columns, types or lengths it must have."""


class StoreError(BatonError):
    """What is in the store is missing or not what was written."""


class NonFiniteError(BatonError):
    """A number that must be finite is NaN or infinite."""


class RewardError(BatonError):
    """A reward source failed, or did not give one number per response."""


class EnvironmentFailure(BatonError):  # noqa: N818 - an EnvironmentError is Python's OSError
    """An environment raised, hung, or gave what is not a finite number."""
