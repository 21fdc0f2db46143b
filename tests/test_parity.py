# SPDX-License-Identifier: Apache-2.0
"""One test a recorded reference vector. `VTPRUNE_GOLDEN` names a folder of others of the same format."""

import os
from pathlib import Path

import pytest
from parity import Vector, handler_for

FOLDER = Path(os.environ.get("VTPRUNE_GOLDEN") or Path(__file__).parent / "golden")
VECTORS = sorted(FOLDER.glob("*.npz"))


def test_there_are_vectors():
    assert VECTORS, f"no .npz file in {FOLDER}"


@pytest.mark.parametrize("path", VECTORS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("one_thread")
def test_parity(path: Path):
    vector = Vector(path)
    handler = handler_for(vector.case)
    assert handler is not None, f"nothing here can check {path.name}"
    handler(vector)
