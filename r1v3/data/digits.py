"""Handwritten digit scans and the split that every composed picture respects.

The scans are the 1,797 real 8 x 8 digits bundled with scikit-learn (the test part of the UCI
"Optical Recognition of Handwritten Digits" set: 13 writers' forms, 17 gray levels). They are split
before anything is composed, so that no scan of a training picture is ever seen in validation or
test.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

SPLITS = ("train", "rl", "validation", "test")
SPLIT_FRACTIONS = (0.50, 0.15, 0.10, 0.25)
_SPLIT_SEED = 20250711


@dataclass(frozen=True)
class Scans:
    """`pixels` uint8 [N, 8, 8] (ink 0 to 255), `labels` int64 [N], `split` name -> scan ids."""

    pixels: np.ndarray
    labels: np.ndarray
    split: dict[str, np.ndarray]

    def ids(self, split: str, digit: int) -> np.ndarray:
        """Scan ids of one digit in one split."""
        if split not in self.split:
            raise ValueError(f"scan split {split!r} is unknown; it is one of {', '.join(SPLITS)}")
        members = self.split[split]
        return members[self.labels[members] == digit]


@cache
def scans() -> Scans:
    """Load the bundled scans and split them, stratified by digit, always the same way.

    `train` serves pre-training and SFT, `rl` is seen by GRPO alone (so that rewards are earned on
    handwriting that SFT could not memorize), `validation` chooses, `test` only scores.
    """
    bundled = load_digits()
    labels = np.asarray(bundled.target, dtype=np.int64)
    pixels = np.round(np.asarray(bundled.images) * (255 / 16)).astype(np.uint8)
    rng = np.random.default_rng(_SPLIT_SEED)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for digit in range(10):
        ids = rng.permutation(np.flatnonzero(labels == digit))
        edges = np.round(np.cumsum(SPLIT_FRACTIONS) * len(ids)).astype(int)
        for name, part in zip(SPLITS, np.split(ids, edges[:-1]), strict=True):
            parts[name].append(part)
    return Scans(pixels, labels, {k: np.sort(np.concatenate(v)) for k, v in parts.items()})


def _reader(strength: float) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=400))


@cache
def reading_probabilities(strength: float) -> np.ndarray:
    """Digit probabilities [N, 10] of every scan, as a real, imperfect reader sees it.

    A logistic regression of the given inverse regularization, fitted on the `train` scans. Its
    opinion of a train scan is out-of-fold (5 folds), so that its doubts are genuine everywhere.
    """
    data = scans()
    x = data.pixels.reshape(len(data.pixels), -1).astype(np.float64)
    train = data.split["train"]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    result = np.zeros((len(x), 10))
    result[train] = cross_val_predict(
        _reader(strength), x[train], data.labels[train], cv=folds, method="predict_proba"
    )
    rest = np.setdiff1d(np.arange(len(x)), train)
    result[rest] = _reader(strength).fit(x[train], data.labels[train]).predict_proba(x[rest])
    return result
