"""Labels of the data become outputs of the model by name, or the difference is named."""

from __future__ import annotations

import pytest

from tuning.errors import UserError
from tuning.judging.class_maps import outputs_for


def test_the_same_in_another_order_and_a_part_of_them() -> None:
    assert outputs_for(("emu", "cat", "dog"), ("cat", "dog", "emu"), "the data").tolist() == [2, 0, 1]
    assert outputs_for(("dog",), ("cat", "dog", "emu"), "the data").tolist() == [1]


def test_names_that_the_model_lacks_are_refused() -> None:
    with pytest.raises(UserError) as caught:
        outputs_for(("cat", "dogs", "yak"), ("cat", "dog", "emu"), "--data zoo")
    for part in ("--data zoo has", "'dogs', 'yak'", "Perhaps you meant 'dog'", "data lacks: 'dog', 'emu'"):
        assert part in str(caught.value)
    many = [f"x{number}" for number in range(30)]
    with pytest.raises(UserError, match=r"'x7' and 22 more\..* lacks: 'cat'\."):
        outputs_for(many, ("cat",), "the data")
