"""In tests every array that an annotation names is checked on every call."""

import pytest
import torch
from jaxtyping import TypeCheckError

from icrouting.routing.attention import project
from icrouting.routing.router import Routing


def test_a_wrong_shape_is_an_error_in_tests():
    with pytest.raises(TypeCheckError):
        project(torch.zeros(2, 3), torch.zeros(3, 4))
    with pytest.raises(TypeCheckError):
        project(torch.zeros(1, 2, 3), torch.zeros(5, 4))


def test_a_wrong_shape_of_a_field_is_an_error_in_tests():
    with pytest.raises(TypeCheckError):
        Routing(torch.zeros(1, 2), torch.zeros(1, 2, 3))
