"""Mixtures: which source a sample comes from is a pure function of (seed, i), in exact shares."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_runs import write_prepared

from fastlm.data.files import Data, open_data
from fastlm.data.loader import TrainLoader
from fastlm.data.mixture import BLOCK, Mixture, MixtureSampler, _shares, short_names, split_weights
from fastlm.data.tokenizer import train_tokenizer
from fastlm.errors import DataError

SIZES, WEIGHTS, T = (4000, 900, 300), (0.6, 0.3, 0.1), 16


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, name in enumerate("ab"):  # no token is in both
        np.save(tmp_path / f"{name}.npy", np.arange(2000, dtype=np.uint16) + 2000 * index)
    return tmp_path


@pytest.mark.parametrize("seed", [0, 7])
def test_shares_are_exact_and_no_sample_of_a_source_is_left_out(seed):
    sampler = MixtureSampler(SIZES, WEIGHTS, T, seed)
    source, number = sampler.places(0, 2 * BLOCK)
    for index, weight in enumerate(WEIGHTS):
        own = number[source == index]
        assert abs(len(own) - 2 * weight * BLOCK) < 2
        assert sorted(own) == list(range(len(own)))  # block by block, each once
        first = (source[:BLOCK] == index).sum()
        assert set(number[:BLOCK][source[:BLOCK] == index]) == set(range(first))
    # In no pattern: 1,000 samples in a row have nearly these shares wherever they begin.
    for begin in range(0, BLOCK - 1000, 500):
        shares = np.bincount(source[begin : begin + 1000], minlength=3) / 1000
        assert np.abs(shares - WEIGHTS).max() < 0.08


def test_a_sample_is_the_same_however_it_is_asked_for():
    sampler = MixtureSampler(SIZES, WEIGHTS, T, 3)
    first, count = BLOCK - 100, 200  # across two blocks
    whole = sampler.starts(first, count)
    again = MixtureSampler(SIZES, WEIGHTS, T, 3)
    for size in (1, 7, 50):
        parts = [
            again.starts(i, min(size, first + count - i)) for i in range(first, first + count, size)
        ]
        assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(MixtureSampler(SIZES, WEIGHTS, T, 4).starts(first, count), whole)
    far = sampler.starts(2**61, 4)  # no smaller position is gone through
    assert np.array_equal(far, again.starts(2**61, 4))


def test_windows_stay_inside_their_source():
    bounds = np.cumsum([0, *SIZES])
    arrays = [np.full(size, index, np.uint16) for index, size in enumerate(SIZES)]
    mixture = Mixture(
        [
            (str(i), Data.of(a, a).train, w)
            for i, (a, w) in enumerate(zip(arrays, WEIGHTS, strict=True))
        ]
    )
    starts = MixtureSampler(SIZES, WEIGHTS, T, 0).starts(0, 5000)
    inside = [(starts >= low) & (starts + T < high) for low, high in itertools.pairwise(bounds)]
    assert np.any(inside, axis=0).all()
    loader = TrainLoader(mixture, 512, T, seed=0)
    x, y = loader.batch(0)
    assert (x == x[:, :1]).all() and (y == x[:, :1]).all()
    assert np.abs(np.bincount(x[:, 0].numpy()) / 512 - WEIGHTS).max() < 0.08


def test_any_number_of_ranks_reads_the_same_samples():
    arrays = [np.arange(size, dtype=np.uint16) for size in SIZES]
    mixture = Mixture([(str(i), Data.of(a, a).train, 1.0) for i, a in enumerate(arrays)])
    alone = TrainLoader(mixture, 12, T, seed=5).batch(24)[0]
    ranks = [TrainLoader(mixture, 4, T, seed=5).batch(24 + 4 * rank)[0] for rank in range(3)]
    assert (alone == np.concatenate(ranks)).all()


@settings(max_examples=100)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=40))
def test_every_source_has_a_share(weights):
    shares = _shares(weights)
    assert shares.sum() == BLOCK and shares.min() >= 1
    exact = np.array(weights) / sum(weights) * BLOCK
    assert np.abs(shares - exact).max() <= 1 + len(weights)


def test_opened_by_weights(place):
    data = open_data(["a.npy:3", "b.npy:1e0"], val_fraction=0.1)
    assert [(s.name, s.weight, len(s.dataset)) for s in data.train.sources] == [
        ("a.npy", 0.75, 1800),
        ("b.npy", 0.25, 1800),
    ]
    # What each source holds out is a validation set under its name.
    assert {name: len(part) for name, part in data.val_sets.items()} == {"a.npy": 200, "b.npy": 200}
    assert len(data.val) == 400 and data.val_bytes is None
    assert data.train.locate(1800 + 5) == ("b.npy", 5)
    others = [
        open_data(["a.npy:1", "b.npy:1"], val_fraction=0.1),
        open_data(["b.npy:3", "a.npy:1"], val_fraction=0.1),
        open_data(["a.npy:3", "b.npy:1"], ["b.npy"]),
        open_data(["a.npy", "b.npy"], val_fraction=0.1),
    ]
    assert len({other.fingerprint for other in [data, *others]}) == 5
    same = open_data(["a.npy:0.75", "b.npy:0.25"], val_fraction=0.1)
    assert same.fingerprint == data.fingerprint
    assert others[2].val_sets == {} and len(others[2].val) == 2000


def test_a_path_that_looks_weighted_is_a_path_where_it_exists(place):
    (place / "a.npy").rename("c.npy:0.5")
    assert split_weights(["c.npy:0.5"]) is None
    assert split_weights(["c.npy:0.5:2"]) == [("c.npy:0.5", 2.0)]
    with pytest.raises(DataError, match="no such token file"):
        open_data(["nowhere.npy:1"])
    assert short_names(["x/a", "y/b/"]) == ["a", "b"]
    assert short_names(["x/a", "y/a"]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    "paths, val_paths, message",
    [
        (["a.npy:0.7", "b.npy"], [], "b.npy has no weight, and others have; write PATH:WEIGHT"),
        (["a.npy:0", "b.npy:1"], [], "a.npy:0: a weight must be positive and finite"),
        (["a.npy:-1", "b.npy:1"], [], "a.npy:-1: a weight must be positive"),
        (["a.npy:1.2.3", "b.npy:1"], [], "a.npy:1.2.3: 1.2.3 is no weight"),
        (["a.npy:1", "wide.npy:1"], [], "must have one dtype, got uint16 and uint32"),
        (["a.npy:1", "nowhere.npy:1"], [], "nowhere.npy: no such token file"),
        (["a.npy"], ["x=b.npy", "b.npy"], "b.npy has no name, and others have; write NAME=PATH"),
        (["a.npy"], ["x=nowhere.npy"], "nowhere.npy: no such token file"),
        (["p", "a.npy"], [], "give one directory, or files; or several with weights"),
    ],
)
def test_mistakes_are_named(place, paths, val_paths, message):
    np.save("wide.npy", np.arange(2000, dtype=np.uint32))
    (place / "p").mkdir()
    with pytest.raises(DataError) as error:
        open_data(paths, val_paths)
    assert message in str(error.value)


def test_each_part_is_checked_by_name(place):
    data = open_data(["a.npy:1", "b.npy:1"], ["one=a.npy", "two=b.npy", "two=a.npy"])
    assert [len(part) for part in data.val_sets.values()] == [2000, 4000]
    data.check(16, 4000)
    with pytest.raises(DataError, match=r"b\.npy: token id 3000 at offset 1000"):
        data.check(16, 3000)
    np.save("short.npy", np.arange(10, dtype=np.uint16))
    with pytest.raises(DataError, match=r"training set short\.npy data .*holds 10 tokens"):
        open_data(["a.npy:1", "short.npy:1"], ["a.npy"]).check(16, 4000)
    with pytest.raises(DataError, match=r"validation set few .*holds 10 tokens"):
        open_data(["a.npy"], ["few=short.npy", "many=a.npy"]).check(16, 4000)


def test_prepared_directories(place):
    write_prepared(place / "one")
    write_prepared(place / "two")
    data = open_data(["one:1", "two:3"])
    assert data.manifest is not None and data.tokenizer_json
    assert set(data.val_sets) == set(data.val_set_bytes) == {"one", "two"}
    assert all(data.val_set_bytes.values())
    named = open_data(["a.npy"], ["code=two"])
    assert named.manifest is None and list(named.val_sets) == ["code"]
    assert named.val_set_bytes["code"] == data.val_set_bytes["two"]
    # Ids mean nothing in another vocabulary.
    other = train_tokenizer(["other text " * 50], 265)
    other.save(str(place / "two" / "tokenizer.json"))
    from prepared_data import seal

    from fastlm.data.manifest import Manifest

    seal(place / "two", Manifest.load(place / "two"))
    for arguments in ((["one:1", "two:3"],), (["one"], ["code=two"])):
        with pytest.raises(DataError, match="was prepared with another tokenizer"):
            open_data(*arguments)
