import pytest
import torch

import tiny

# Tiny models gain nothing from threads, and lose much where tests share a machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    return tiny.encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()
