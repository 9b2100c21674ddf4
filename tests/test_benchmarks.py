import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import choose_defaults
import leave_one_out

CANDIDATES = {
    (module.__name__, name): config
    for module in (choose_defaults, leave_one_out)
    for name, config in module.CANDIDATES.items()
}


@pytest.mark.parametrize("key", CANDIDATES, ids=" | ".join)
def test_a_candidate_is_what_its_name_says(key):
    (_, name), config = key, CANDIDATES[key]
    is_paper = name.startswith("paper")
    basis = next((word for word in ("whitened", "random") if word in name), "pca")
    lr = 3e-4 if "3e-4" in name else 1e-4 if is_paper or "1e-4" in name or basis == "random" else 1e-3
    scope = "vocabulary" if is_paper or "vocabulary" in name else "options"
    assert (config.basis, config.lr, config.ce_scope) == (basis, lr, scope)
    assert f"{config.epochs} epoch" in name
