# SPDX-License-Identifier: Apache-2.0
"""The files of a run: a torn, damaged or unfinished one is picked up again."""

import pytest

from vtprune.eval.results.records import CellFile, CellPart, cell_path, part_path
from vtprune.eval.results.status import Refusal

BATCHES = [range(0, 3), range(3, 6), range(6, 7)]
RECORDS = [{"index": index, "prediction": "é\n" * index, "score": index / 7} for index in range(7)]
ENDING = {"status": "under its floor", "reason": "too small", "floor": 0.2}


def fill(path, process=0):
    """Everything that is left to do, by one process."""
    file = CellFile(path, BATCHES)
    part = CellPart(path, process)
    for batch in file.remaining:
        part.append([RECORDS[index] for index in batch])
    file.finish([part])
    return file


def half_done(path, batches, process=0):
    part = CellPart(path, process)
    for batch in batches:
        part.append([RECORDS[index] for index in batch])
    return part_path(path, process)


@pytest.fixture
def path(tmp_path):
    return cell_path(tmp_path, "fastv-0.5", "0123")


@pytest.fixture
def whole(tmp_path):
    other = cell_path(tmp_path / "elsewhere", "fastv-0.5", "0123")
    assert fill(other).records == RECORDS
    return other.read_bytes()


def test_cut_at_any_byte_the_file_is_filled_up_to_the_same_content(path, whole):
    CellFile(path, BATCHES)
    part = half_done(path, BATCHES)
    content = part.read_bytes()
    ends = [index for index in range(len(content) + 1) if content[index : index + 3] in (b"\x1f\x8b\x08", b"")]
    assert len(ends) == 4
    for cut in range(len(content) + 1):
        path.unlink(missing_ok=True)
        part.write_bytes(content[:cut])
        file = CellFile(path, BATCHES)
        whole_batches = sum(end <= cut for end in ends) - 1
        assert file.remaining == BATCHES[whole_batches:]
        assert file.complete == path.exists() == (cut == len(content))
        assert fill(path).records == RECORDS
        assert path.read_bytes() == whole
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("finished", [False, True])
def test_what_is_damaged_is_run_again(path, whole, finished):
    CellFile(path, BATCHES)
    damaged = path if finished else half_done(path, BATCHES)
    content = bytearray(whole)
    second = whole.index(b"\x1f\x8b\x08", 1)
    content[second + 20] ^= 1
    damaged.write_bytes(content)
    assert CellFile(path, BATCHES).remaining == BATCHES[1:]
    fill(path)
    assert path.read_bytes() == whole


def test_parts_of_several_processes_become_one_file_in_order(path, whole):
    CellFile(path, BATCHES)
    half_done(path, [BATCHES[2]], process=1)
    half_done(path, [BATCHES[0], BATCHES[2]], process=3)
    file = CellFile(path, BATCHES)
    assert file.remaining == [BATCHES[1]]
    assert file.records == [*RECORDS[:3], RECORDS[6]]
    assert list(path.parent.iterdir()) == [part_path(path, 0)]
    assert fill(path, process=1).complete
    assert path.read_bytes() == whole
    assert list(path.parent.iterdir()) == [path]


def test_an_ended_cell_stays_ended(path):
    file = CellFile(path, BATCHES)
    half_done(path, BATCHES[:1])
    parts = [CellPart(path, 0), CellPart(path, 1)]
    parts[1].end(Refusal(**ENDING))
    file.finish(parts)
    again = CellFile(path, BATCHES)
    assert (again.complete, again.remaining, again.ending, again.records) == (True, [], ENDING, [])
    assert list(path.parent.iterdir()) == [path]


def test_another_cells_parts_are_left_alone(tmp_path, path):
    other = cell_path(tmp_path, "fastv-0.5", "01234")
    CellFile(path, BATCHES)
    part = half_done(other, BATCHES[:1])
    assert fill(path).records == RECORDS
    assert part.exists()
    assert CellFile(other, BATCHES).remaining == BATCHES[1:]
