"""A user's mistake: the message is one line that says what is wrong, where, and what to do. Exit status 2."""


class UserError(ValueError):
    """A mistake in what the user gave. `cli.run_main` prints only the message and exits with this status."""

    exit_status = 2


class RecordError(UserError):
    """A record, or a file of records, that cannot be used."""


class RunError(UserError):
    """An output folder, or an argument, that cannot be used."""


class ModelError(UserError):
    """A model that cannot be used."""


def require(holds, message):
    """Raise RecordError(message) unless `holds`. A message is `what is wrong: what to do`."""
    if not holds:
        raise RecordError(message)
