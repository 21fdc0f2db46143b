# SPDX-License-Identifier: Apache-2.0
"""With this file here, tests of the folders below can import the helper modules beside it, e.g. `tiny_eval`."""

import pytest


@pytest.fixture(scope="module")
def lmms_folder(tmp_path_factory):
    """Holds local tasks for lmms-eval in `tasks`, and everything that lmms-eval stores."""
    import local_lmms  # imports lmms-eval, which takes seconds

    folder = tmp_path_factory.mktemp("lmms")
    local_lmms.write(folder / "tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        yield folder
