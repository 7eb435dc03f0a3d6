"""A pair's models and inputs, for the tests of conformance."""

import pytest
from families import FAMILIES, attach, first_head, inputs
from support import METHODS, disturb


@pytest.fixture
def make(family, method, lora):
    """Builds the pair's model with an adapter of its own, moved off the identity."""

    def build(name="default", model=None, **fields):
        return disturb(attach(family, lora=lora, model=model, name=name, **{**METHODS[method], **fields}))

    return build


@pytest.fixture
def plain(family):
    """Builds the pair's model without adapter."""
    return lambda: FAMILIES[family].build(first_head(family))


@pytest.fixture
def batch(family):
    return inputs(family, first_head(family))
