"""The errors a user can meet. Each message says what is wrong, where (file, frame, key) and how to mend it."""


class Picture3dError(Exception):
    """Base of every error this package raises on purpose; the command line prints it in one line and exits with 2."""


class DataError(Picture3dError):
    """A file is missing, damaged, not what its name says, or cannot be written."""


class ConfigError(Picture3dError):
    """A setting is unknown, of the wrong type, or contradicts another."""


class CheckpointError(Picture3dError):
    """A checkpoint is damaged, or does not fit the network it is loaded into."""


class TrainingError(Picture3dError):
    """A run cannot go on, for example because a loss is not finite."""


# What several readers advise about a damaged file: one that somebody publishes, and one that the user or a tool wrote.
FETCH_AGAIN = "Copy or download the file again."
WRITE_AGAIN = "Write the file again, or copy it whole."
