"""The error that the user can mend."""


class DataError(Exception):
    """A data set is missing or malformed; the message says which file, and where to get it."""
