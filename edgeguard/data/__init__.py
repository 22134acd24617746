"""Labelled images: the data sets users name with --data, behind one interface. Needs no torch."""

from edgeguard.data.batches import batches
from edgeguard.data.dataset import Dataset, check_labels, from_arrays, holdout
from edgeguard.data.load import SPECS, has_splits, load_dataset, load_splits

__all__ = [
    "SPECS",
    "Dataset",
    "batches",
    "check_labels",
    "from_arrays",
    "has_splits",
    "holdout",
    "load_dataset",
    "load_splits",
]
