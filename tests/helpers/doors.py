"""The places that read questions, compared by what they say of a file that cannot be read."""

from __future__ import annotations

import pytest

from qcat.errors import DataError


def messages(*doors):
    """What each of some functions raises, without repeats."""
    said = set()
    for door in doors:
        with pytest.raises(DataError) as caught:
            door()
        said.add(str(caught.value))
    return said
