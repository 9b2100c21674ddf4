"""A run that is killed five times ends with the records and the table of one that was not."""

import time

import numpy as np
import pytest

from children import finish, kill, start_evaluation
from runs_alike import assert_same_records, cut_short, n_lines, table

pytestmark = [pytest.mark.processes, pytest.mark.slow]


def test_five_kills_change_nothing(alone, tmp_path):
    whole = alone / "run"
    cut = tmp_path / "cut"
    total = n_lines(whole)
    rng = np.random.default_rng(4)
    for share in sorted(rng.uniform(0.05, 0.9, 5)):
        (process,) = start_evaluation(alone / "world", cut, 1)
        while process.is_alive() and n_lines(cut) < share * total:
            time.sleep(0.002)
        assert kill(process), "the run was over before it could be killed"
        cut_short(cut / "records.jsonl")
    assert 0 < n_lines(cut) < total
    assert finish(start_evaluation(alone / "world", cut, 1)) == [0]
    assert_same_records(cut, whole)
    assert table(cut) == table(whole)
