import copy

import pytest
from support.squares import make_splits, train_model


@pytest.fixture(scope="session")
def splits():
    """Four classes of noisy 5×5 images."""
    return make_splits()


@pytest.fixture(scope="session")
def trained(splits):
    return train_model(splits)


@pytest.fixture
def model(trained):
    """A classifier with BatchNorm that knows all four classes."""
    return copy.deepcopy(trained)
