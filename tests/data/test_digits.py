"""Real scans and their split: what trains must never be scored."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from r1v3.data.digits import SPLIT_FRACTIONS, SPLITS, reading_probabilities, scans


def test_every_scan_is_in_exactly_one_split() -> None:
    parts = [scans().split[name] for name in SPLITS]
    assert sorted(np.concatenate(parts)) == list(range(len(scans().labels)))


def test_scans_are_the_real_ones_and_not_reordered_against_their_labels() -> None:
    bundled = load_digits()
    assert np.array_equal(scans().labels, bundled.target)
    assert np.abs(scans().pixels / 255 - bundled.images / 16).max() < 0.5 / 255 + 1e-9


def test_every_split_holds_its_fraction_of_every_digit() -> None:
    for name, fraction in zip(SPLITS, SPLIT_FRACTIONS, strict=True):
        for digit in range(10):
            total = int((scans().labels == digit).sum())
            ids = scans().ids(name, digit)
            assert (scans().labels[ids] == digit).all()
            assert abs(len(ids) - fraction * total) <= 1


def test_identical_scans_in_two_splits_are_few() -> None:
    """A scan that occurs twice in the bundled set could leak across; the set has no such pair."""
    where: dict[bytes, set[str]] = {}
    for name in SPLITS:
        for scan in scans().split[name]:
            where.setdefault(scans().pixels[scan].tobytes(), set()).add(name)
    assert sum(len(names) > 1 for names in where.values()) == 0


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match="'dev' is unknown; it is one of train, rl"):
        scans().ids("dev", 3)


def test_readers_are_imperfect_and_the_careful_one_is_better() -> None:
    """A perfect glance would leave the teacher nothing to doubt."""
    labels = scans().labels
    weak, careful = reading_probabilities(0.1), reading_probabilities(1.0)
    for probabilities in (weak, careful):
        assert np.allclose(probabilities.sum(1), 1)
        for name in SPLITS:
            ids = scans().split[name]
            right = (probabilities[ids].argmax(1) == labels[ids]).mean()
            assert 0.85 < right < 1.0, name
    confidence = [p[np.arange(len(labels)), labels].mean() for p in (weak, careful)]
    assert confidence[0] < confidence[1]


def test_a_train_scan_is_judged_by_a_reader_that_did_not_see_it() -> None:
    """Fitted and judged on the same scans, the reader would be sure of every one of them."""
    labels, weak = scans().labels, reading_probabilities(0.1)
    sure = {
        name: weak[scans().split[name], labels[scans().split[name]]].mean()
        for name in ("train", "test")
    }
    assert abs(sure["train"] - sure["test"]) < 0.03
