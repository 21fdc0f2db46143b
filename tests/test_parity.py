# SPDX-License-Identifier: Apache-2.0
"""One test a recorded reference vector. `VTPRUNE_GOLDEN` names a folder of others of the same format."""

import os
from pathlib import Path

import pytest
from parity import HANDLERS, Vector, handler_for

FOLDER = Path(os.environ.get("VTPRUNE_GOLDEN") or Path(__file__).parent / "golden")
VECTORS = sorted(FOLDER.glob("*.npz"))

# Methods whose vectors are recorded but which are not built yet.
NOT_YET = ("auroracap", "tca")


def test_there_are_vectors():
    assert VECTORS, f"no .npz file in {FOLDER}"


def test_no_handler_for_what_is_not_built():
    assert not [pattern for pattern in HANDLERS if pattern.partition("_")[0] in NOT_YET]


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("one_thread")
def test_parity(path: Path):
    method = path.stem.partition("_")[0]
    if method in NOT_YET:
        pytest.xfail(f"{method} is not built yet")
    vector = Vector(path)
    handler = handler_for(vector.case)
    assert handler is not None, f"nothing here can check {path.name}"
    handler(vector)
