"""The one error that the cluster tool shows without a traceback."""


class ClusterError(Exception):
    """Something the reader can change; the text says what."""
