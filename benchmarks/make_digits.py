"""Write edgeguard/data/digits.npz from scikit-learn's copy of the handwritten digits; equal input gives equal bytes.

    python benchmarks/make_digits.py [DEST]

The images are the test part of the "Optical Recognition of Handwritten Digits" set (E. Alpaydin and C. Kaynak, 1998,
UCI Machine Learning Repository, doi:10.24432/C50P49, CC BY 4.0). Needs scikit-learn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]

DEST = Path(__file__).resolve().parents[1] / "edgeguard" / "data" / "digits.npz"


def main() -> None:
    dest = Path(sys.argv[1]) if len(sys.argv) > 1 else DEST
    digits = load_digits()
    images = digits.images.astype(np.uint8)  # (1797, 8, 8), 0 to 16
    if not (images == digits.images).all():
        raise SystemExit("the digits are no longer whole numbers between 0 and 255")
    np.savez_compressed(dest, images=images, labels=digits.target.astype(np.uint8))
    print(dest, images.shape, f"{dest.stat().st_size} bytes")


if __name__ == "__main__":
    main()
