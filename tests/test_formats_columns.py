"""Lists as Arrow columns hold what the same lists hold as slates."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from peftrank.formats._columns import rounded

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats | floats.map(lambda x: x / 2**20), max_size=20))
def test_values_are_rounded_as_single_numbers_are(values):
    column = np.array(values, np.float32)
    assert rounded(column).tolist() == [round(value, 6) for value in column.tolist()]
