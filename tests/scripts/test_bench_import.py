# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the import measures in interpreters of its own."""

import re

SCRIPT = "bench_import"


def test_it_prints_the_median(script, capsys):
    script.main(rounds=1)
    seconds = float(re.match(r"from vtprune import prune: (\d\.\d{3}) s", capsys.readouterr().out)[1])
    assert 0 < seconds < 60
