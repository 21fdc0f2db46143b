# SPDX-License-Identifier: Apache-2.0
"""Settings and their links."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtprune.demo.setting import Setting
from vtprune.errors import ConfigError

settings = st.builds(
    Setting,
    question=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip),
    methods=st.lists(st.sampled_from(["auto", "fastv", "mmtok"]), unique=True).map(tuple),
    keep_ratio=st.floats(0.001, 1),
    chosen=st.none() | st.sets(st.integers(0, 60), max_size=40).map(lambda tokens: tuple(sorted(tokens))),
    example=st.none() | st.integers(0, 299),
)


@given(settings)
def test_a_link_gives_its_setting_back(setting):
    assert Setting.of_query(setting.query()) == setting


def test_a_link_is_short():
    setting = Setting("How many?", ("auto",), 0.25, chosen=(0, 1, 2, 5, 7, 8), example=3)
    assert setting.query() == "question=How+many%3F&method=auto&keep_ratio=0.25&example=3&tokens=0-2.5.7-8"


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("keep_ratio=1", "question of 1 to"),
        ("question=a", "no number as 'keep_ratio': ''"),
        ("question=a&keep_ratio=nan", "expected more than 0"),
        ("question=a&keep_ratio=0", "expected more than 0"),
        ("question=a&keep_ratio=1.5", "at most 1"),
        ("question=a&question=b&keep_ratio=1", "'question' twice"),
        ("question=a&keep_ratio=1&file=/etc/passwd", "unknown part 'file'"),
        ("question=a&keep_ratio=1&method=fastw", "did you mean fastv"),
        ("question=a&keep_ratio=1&method=fastv&method=fastv", "given twice"),
        ("question=a&keep_ratio=1&method=fastv&method=auto&method=mmtok&method=dart", "at most 3 methods, not 4"),
        ("question=a&keep_ratio=1&example=-1", "no whole number as 'example'"),
        ("question=a&keep_ratio=1&example=300", "expected 0 to 299"),
        ("question=a&keep_ratio=1&tokens=1-99999999", "no tokens '1-99999999'"),
        ("question=a&keep_ratio=1&tokens=5-3", "no tokens '5-3'"),
        ("question=a&keep_ratio=1&tokens=x", "no whole number as 'tokens'"),
        ("question=" + "a" * 2001 + "&keep_ratio=1", "1 to 2000 characters"),
    ],
)
def test_a_link_that_somebody_wrote_is_checked(query, says):
    with pytest.raises(ConfigError) as refused:
        Setting.of_query(query)
    assert says in str(refused.value)
