import pytest
import torch

from icrouting.fitting.pca import QKMoments, fit_pids

N_LAYERS, QUERY_WIDTH, KEY_WIDTH, RANK = 2, 11, 7, 3
LAYERS = (4, 6)


def sample(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(9, 0.1, QUERY_WIDTH)
    mix = torch.linalg.qr(torch.randn(QUERY_WIDTH, QUERY_WIDTH, generator=generator)).Q
    query = torch.randn(N_LAYERS, n, QUERY_WIDTH, generator=generator) * scales @ mix + 5
    key = torch.randn(N_LAYERS, n, KEY_WIDTH, generator=generator)
    key = key * torch.arange(1, KEY_WIDTH + 1) - 2
    return query, key


def moments_of(query, key, batch=8):
    moments = QKMoments(N_LAYERS, QUERY_WIDTH, KEY_WIDTH)
    for start in range(0, query.shape[1], batch):
        moments.update(query[:, start : start + batch], key[:, start : start + batch])
    return moments


def fit(moments, basis="pca", rank=RANK, seed=0):
    return fit_pids(moments, LAYERS, rank, basis, torch.Generator().manual_seed(seed))


def projector(columns):
    return columns @ columns.mT


def test_streamed_moments_equal_the_covariance_of_all_at_once():
    query, key = sample()
    moments = moments_of(query, key)
    for layer in range(N_LAYERS):
        expected = torch.cov(query[layer].double().T)
        assert torch.allclose(moments.covariance("query")[layer], expected, rtol=1e-10)


def test_a_large_mean_leaves_the_covariance_as_it_is():
    query, key = sample()
    near = moments_of(query, key)
    # A thousand deviations away, or more.
    far = moments_of(query.double() + 9e3, key.double() - 9e3)
    for side in ("query", "key"):
        expected = near.covariance(side)
        rounding = 1e-8 * expected.abs().max().item()
        assert torch.allclose(far.covariance(side), expected, rtol=0, atol=rounding)


def test_merged_moments_equal_one_stream():
    query, key = sample()
    whole = moments_of(query, key)
    part = moments_of(query[:, :23], key[:, :23])
    rest = moments_of(query[:, 23:], key[:, 23:])
    # Merging what has seen nothing changes nothing.
    part.merge(QKMoments(N_LAYERS, QUERY_WIDTH, KEY_WIDTH))
    part.merge(rest)
    assert part.count == whole.count
    for side in ("query", "key"):
        assert torch.allclose(part.covariance(side), whole.covariance(side), rtol=1e-10)


def test_moments_survive_saving():
    moments = moments_of(*sample())
    again = QKMoments.from_tensors(moments.tensors())
    again.merge(moments)
    assert again.count == 2 * moments.count
    with pytest.raises(ValueError, match=r"delete moments\.safetensors, and they are made anew"):
        QKMoments.from_tensors({"count": torch.tensor(3), "query_mean": torch.zeros(2)})


def test_pids_span_the_top_right_singular_vectors_of_the_centred_data():
    query, key = sample()
    pids = fit(moments_of(query, key))
    for columns, data in ((pids.query_pids, query), (pids.key_pids, key)):
        for layer in range(N_LAYERS):
            centred = data[layer] - data[layer].mean(0)
            top = torch.linalg.svd(centred.double()).Vh[:RANK].T
            difference = projector(columns[layer].double()) - projector(top)
            assert difference.abs().max() < 1e-6


@pytest.mark.parametrize("basis", ["pca", "whitened", "random"])
def test_pids_are_orthonormal_with_positive_largest_entry(basis):
    pids = fit(moments_of(*sample()), basis)
    eye = torch.eye(RANK).expand(N_LAYERS, -1, -1)
    for columns in (pids.query_pids, pids.key_pids):
        assert torch.allclose(columns.mT @ columns, eye, atol=1e-6)
        largest = columns.gather(1, columns.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_whitened_directions_give_projections_of_variance_one():
    query, key = sample()
    pids = fit(moments_of(query, key), "whitened")
    one = torch.ones(N_LAYERS, RANK)
    assert torch.allclose((query @ pids.query_directions()).var(1), one, atol=1e-4)
    assert torch.allclose((key @ pids.key_directions()).var(1), one, atol=1e-4)


def test_explained_variance_falls_and_stays_below_one():
    moments = moments_of(*sample())
    principal = fit(moments).query_explained
    random = fit(moments, "random").query_explained
    assert (principal.diff(dim=1) <= 0).all()
    assert (principal.sum(1) < 1).all()
    assert (principal.sum(1) > random.sum(1)).all()


def test_the_random_basis_is_drawn_from_its_generator():
    moments = moments_of(*sample())
    first, again, other = (fit(moments, "random", seed=seed).query_pids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_gaussian_basis_spans_what_the_random_one_does_and_is_of_length_one_on_average():
    moments = moments_of(*sample())
    random = fit(moments, "random")
    gaussian = fit(moments, "gaussian")
    for orthonormal, columns in (
        (random.query_pids, gaussian.query_pids),
        (random.key_pids, gaussian.key_pids),
    ):
        basis = torch.linalg.qr(columns.double()).Q
        for layer in range(N_LAYERS):
            difference = projector(basis[layer]) - projector(orthonormal[layer].double())
            assert difference.abs().max() < 1e-6
        assert (columns.norm(dim=1) - 1).abs().max() > 0.01, "and not orthonormal"
    squares = [fit(moments, "gaussian", seed=seed).query_pids.square().sum(1) for seed in range(40)]
    assert abs(float(torch.stack(squares).mean()) - 1) < 0.05


def test_learned_directions_start_where_pca_has_them():
    moments = moments_of(*sample())
    learned = fit(moments, "learned")
    assert learned.basis == "learned"
    assert torch.equal(learned.query_directions(), fit(moments, "pca").query_directions())


def test_too_few_prompts_and_too_wide_a_rank_are_refused():
    query, key = sample(3)
    with pytest.raises(ValueError, match="more than 3 prompts, got 3"):
        fit(moments_of(query, key))
    with pytest.raises(ValueError, match=r"1\.\.7 .* got 8"):
        fit(moments_of(*sample()), rank=8)


@pytest.mark.parametrize("n", [20, 500])
def test_a_layer_that_tells_no_prompts_apart_is_refused(n):
    moments = QKMoments(2, 6, 4)
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, n, width, generator=generator) for width in (6, 4))
    # As layer 0 has it, where all prompts end in one token: the same, but for what batches of other
    # shapes round.
    rounding = 1e-7 * torch.randn(n, 6, generator=generator)
    query[1] = query[1, :1] * (1 + rounding)
    for start in range(0, n, 7):
        moments.update(query[:, start : start + 7], key[:, start : start + 7])
    refusal = "the same queries or keys in all prompts: route from a later layer on"
    with pytest.raises(ValueError, match=refusal):
        fit_pids(moments, (0, 1), 2, "pca", torch.Generator())
