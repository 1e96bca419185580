"""Which rows are seen, pair by pair by natten's rules: an oracle for the ranges that processes exchange."""

from tiny_models import sees


def rows_that_are_seen(first, end, length, window, stride, dilation):
    """All rows that a query of rows first to end - 1 sees."""
    return {key for key in range(length) for query in range(first, end)
            if sees(query, key, length, window, stride, dilation)}  # fmt: skip
