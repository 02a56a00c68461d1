"""Wrong types and wrong shapes are noticed anywhere in the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from persona_rlhf.common.files import slug
from persona_rlhf.training.losses import PairLogps, reward_margins
from tests.typechecker import _checked, checked

if TYPE_CHECKING:
    from tests.nowhere import Unread


def test_the_package_is_checked():
    with pytest.raises(TypeCheckError):
        slug(3)
    with pytest.raises(TypeCheckError):
        reward_margins(PairLogps(*torch.zeros(4, 3)), 0.1)


def test_types_of_arguments_and_of_the_answer():
    @_checked(typechecker=checked)
    def half(number: float, unread: Unread | None = None) -> int:
        return number / 2

    with pytest.raises(TypeCheckError):
        half("3")
    with pytest.raises(TypeCheckError):
        half(3)
    assert half.__annotations__ == {"number": "float", "unread": "Unread | None", "return": "int"}


@pytest.mark.parametrize("pair", [(2, 3), (3, 2)])
def test_a_name_of_a_shape_is_one_number_in_a_call(pair):
    @_checked(typechecker=checked)
    def both(one: Float[Tensor, "rows 1"], other: list[Float[Tensor, "rows 1"]]) -> None:
        pass

    one, other = (torch.zeros(rows, 1) for rows in pair)
    both(one, [one])
    with pytest.raises(TypeCheckError):
        both(one, [other])
