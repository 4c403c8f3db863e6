"""Everything a user can cause ends in one of these; the class decides the exit code of the command.

A message says what happened, what was found, what was expected, and the command or option that mends it.
"""


class DllmcError(Exception):
    """A failure with a message for the user; the base class itself is never raised."""

    exit_code = 1


class UsageFault(DllmcError):
    """A wrong option, recipe or `--set`, an output that exists, a prompt that is too long."""

    exit_code = 2


class WillNotFit(DllmcError):
    """Not enough memory or disk."""

    exit_code = 3


class InputRefused(DllmcError):
    """Something wrong or unsupported in a model, bundle or tokenizer folder."""

    exit_code = 4


class ValidationFailed(DllmcError):
    """The exported graph does not do what the model does, within the recipe's thresholds."""

    exit_code = 5


class BuildFailed(DllmcError):
    """An engine could not be built."""

    exit_code = 6


class HashMismatch(DllmcError):
    """A file of a bundle is not the file its manifest names."""

    exit_code = 7


class EnvironmentFault(DllmcError):
    """A missing package or library, a folder that cannot be written."""

    exit_code = 8
