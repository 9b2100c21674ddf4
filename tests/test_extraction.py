import pytest
import torch

from icrouting.decoder.sites import Dims
from icrouting.fitting import extraction
from icrouting.fitting.extraction import Extraction
from icrouting.fitting.pca import QKMoments
from icrouting.runtime.storage import load_tensors

DIMS = Dims(n_layers=5, n_heads=3, n_kv_heads=1, head_dim=2)
N_ROUTED, QUERY_WIDTH, KEY_WIDTH = 2, 6, 2


def batches(seed, n_batches=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(N_ROUTED, n_prompts, QUERY_WIDTH, generator=generator),
            torch.randn(N_ROUTED, n_prompts, KEY_WIDTH, generator=generator),
        )
        for n_prompts in range(1, 1 + n_batches)
    ]


def assert_moments_of(moments, all_batches):
    expected = QKMoments(N_ROUTED, QUERY_WIDTH, KEY_WIDTH)
    for query, key in all_batches:
        expected.update(query, key)
    assert moments.tensors().keys() == expected.tensors().keys()
    for name, value in moments.tensors().items():
        torch.testing.assert_close(value, expected.tensors()[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_held_back", [1, 3, 100])
def test_batches_that_are_held_back_are_seen_all_the_same(n_held_back, monkeypatch):
    monkeypatch.setattr(extraction, "HELD", n_held_back)
    whole = Extraction(N_ROUTED, DIMS, None)
    whole.add(batches(0))
    whole.add(batches(1))
    assert_moments_of(whole.whole(), batches(0) + batches(1))


def test_a_saved_extraction_goes_on_where_it_was_left(tmp_path):
    file = tmp_path / extraction.MOMENTS_FILE
    first = Extraction(N_ROUTED, DIMS, file)
    first.load()
    first.add(batches(0))
    first.n_done = 10
    first.save()
    _, metadata = load_tensors(file)
    assert metadata == {"n_done": "10"}
    second = Extraction(N_ROUTED, DIMS, file)
    second.load()
    assert second.n_done == 10
    second.add(batches(1))
    assert_moments_of(second.whole(), batches(0) + batches(1))


def test_it_is_due_when_the_time_is_up(monkeypatch):
    now = 0.0
    monkeypatch.setattr(extraction.time, "monotonic", lambda: now)
    clocked = Extraction(N_ROUTED, DIMS, None)
    assert not clocked.is_due()
    now = extraction.SAVE_EVERY_SECONDS + 1
    assert clocked.is_due()


def test_the_first_time_it_is_due_early(monkeypatch):
    now = 0.0
    monkeypatch.setattr(extraction.time, "monotonic", lambda: now)
    clocked = Extraction(N_ROUTED, DIMS, None)
    now = extraction.FIRST_SAVE_SECONDS + 0.1
    assert clocked.is_due()
    assert extraction.FIRST_SAVE_SECONDS <= 5


@pytest.mark.parametrize("is_kept", [True, False])
def test_having_saved_it_waits_anew(is_kept, tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(extraction.time, "monotonic", lambda: now)
    file = tmp_path / extraction.MOMENTS_FILE if is_kept else None
    clocked = Extraction(N_ROUTED, DIMS, file)
    now = extraction.SAVE_EVERY_SECONDS + 1
    clocked.save()
    assert not clocked.is_due()
