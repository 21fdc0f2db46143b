# SPDX-License-Identifier: Apache-2.0
"""The index of the operations names every module, and nothing else."""

import re
from pathlib import Path

from vtprune import ops


def test_the_index_names_every_module_once():
    named = re.findall(r"^    (\w+): ", ops.__doc__, re.MULTILINE)
    modules = {path.stem for path in Path(ops.__file__).parent.glob("*.py")} - {"__init__"}
    assert sorted(named) == sorted(modules)
