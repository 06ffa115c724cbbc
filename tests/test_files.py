from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from picture3d.errors import ConfigError, DataError
from picture3d.files import (
    LOCK_NAME,
    append_line,
    job_share,
    read_bounded,
    read_json_object,
    replacing,
    sole_writer,
    whole_file,
    write_json,
    write_text,
)


def test_a_file_appears_only_when_the_block_ends(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    with whole_file(path) as file:
        file.write(b"abc")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_and_fail() -> None:
        with whole_file(path) as file:
            file.write(b"new")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write_and_fail()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_what_a_killed_run_left_over_is_overwritten(tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(b"a longer left-over of an earlier run")
    with whole_file(tmp_path / "a.bin") as file:
        file.write(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    assert (tmp_path / "a.bin").read_bytes() == b"x"


def test_a_name_to_write_to_takes_its_place_and_a_name_that_was_not_written_is_an_error(tmp_path):
    path = tmp_path / "a.bin"
    with replacing(path) as temporary:
        temporary.write_bytes(b"abc")
        assert temporary.parent == tmp_path
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    with pytest.raises(DataError, match=r"a\.bin: cannot be written \(No such file"), replacing(path):
        pass
    assert path.read_bytes() == b"abc"


def test_a_file_that_another_writes_is_left_to_it(tmp_path):
    path = tmp_path / "a.bin"
    with whole_file(path) as file:
        file.write(b"first")
        with pytest.raises(DataError, match=r"a\.bin: another process is writing this file\. Wait"), whole_file(path) as second:
            second.write(b"second")
    assert path.read_bytes() == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_empty_file_that_was_meant_is_written_over_what_a_killed_run_left(tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(b"left over")
    with whole_file(tmp_path / "a.bin"):
        pass
    assert (tmp_path / "a.bin").read_bytes() == b""


def test_many_processes_that_write_one_file_leave_one_of_theirs(tmp_path):
    """Each writes its own number many times over, again and again; whatever is there at the end is one number alone."""
    path = tmp_path / "a.txt"
    code = (
        "import sys\nfrom pathlib import Path\nfrom picture3d.errors import DataError\nfrom picture3d.files import whole_file\n"
        "wrote = 0\n"
        "while wrote < 20:\n"
        "    try:\n"
        "        with whole_file(Path(sys.argv[1])) as file:\n"
        "            for _ in range(20):\n"
        "                file.write(sys.argv[2].encode() * 1000)\n"
        "                file.flush()\n"
        "        wrote += 1\n"
        "    except DataError as error:\n"
        "        assert 'another process' in str(error), error\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(number)]) for number in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    text = path.read_text()
    assert len(text) == 20_000
    assert len(set(text)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_text_is_utf8_and_lines_are_added_at_the_end(tmp_path):
    write_text(tmp_path / "a", "é\n")
    append_line(tmp_path / "a", "ü")
    assert (tmp_path / "a").read_bytes() == "é\nü\n".encode()
    with pytest.raises(DataError, match="absent/a: cannot be written"):
        append_line(tmp_path / "absent" / "a", "x")


def test_what_json_cannot_say_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/a\.json: cannot be written"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"])
def test_what_is_not_a_json_object_is_refused(tmp_path, content):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json"):
        read_json_object(path, max_bytes=1 << 20)


def test_more_bytes_than_allowed_are_not_read(tmp_path):
    (tmp_path / "a").write_bytes(bytes(101))
    with pytest.raises(DataError, match="more than the 100 bytes"):
        read_bounded(tmp_path / "a", max_bytes=100)
    with pytest.raises(DataError, match="no such file"):
        read_bounded(tmp_path / "b", max_bytes=100)


HOLD = """
import sys, time
from pathlib import Path
from picture3d.files import sole_writer
share = tuple(map(int, sys.argv[2:])) or (0, 1)
with sole_writer(Path(sys.argv[1]), share=share):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path, *share: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *map(str, share)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_writes(tmp_path):
    process = holder(tmp_path / "out")
    try:
        with (
            pytest.raises(DataError, match=rf"another process writes here: process {process.pid} on .*, since 20"),
            sole_writer(tmp_path / "out"),
        ):
            pytest.fail("two writers")
        with sole_writer(tmp_path / "other"):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_lock_ends_with_its_holder_and_leaves_nothing(tmp_path):
    process = holder(tmp_path / "out")
    process.kill()
    process.wait()
    assert (tmp_path / "out" / LOCK_NAME).exists(), "a killed process cannot clean up"
    with sole_writer(tmp_path / "out"):
        assert str(os.getpid()) in (tmp_path / "out" / LOCK_NAME).read_text()
    assert list((tmp_path / "out").iterdir()) == []


def test_the_processes_of_one_job_write_side_by_side_and_no_second_job(tmp_path):
    folder = tmp_path / "out"
    first = holder(folder, 0, 3)
    try:
        with sole_writer(folder, share=(1, 3)):
            assert sorted(path.name for path in folder.iterdir()) == [LOCK_NAME, f"{LOCK_NAME}.0", f"{LOCK_NAME}.1"]
        for other in ((0, 1), (0, 3), (1, 2)):  # one alone, the same part again, a job of another size
            with (
                pytest.raises(DataError, match=rf"another process writes here: process {first.pid} on"),
                sole_writer(folder, share=other),
            ):
                pytest.fail("two writers")
    finally:
        first.kill()
        first.wait()
    with sole_writer(folder, share=(1, 2)):  # the dead are no hindrance
        pass
    with sole_writer(folder):
        pass
    assert list(folder.iterdir()) == [], "that of the rank that was killed is gone too"


def test_a_process_alone_keeps_the_parts_of_a_job_out(tmp_path):
    process = holder(tmp_path)
    try:
        with pytest.raises(DataError, match="another process writes here"), sole_writer(tmp_path, share=(1, 2)):
            pytest.fail("two writers")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("environment", "share"),
    [({}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "4"}, (2, 4)), ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1))],
)
def test_the_environment_says_which_part_of_a_job_a_process_has(environment, share):
    assert job_share(environment) == share


@pytest.mark.parametrize(
    "environment", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "-1", "WORLD_SIZE": "2"}]
)
def test_an_environment_that_names_no_part_is_refused(environment):
    with pytest.raises(ConfigError, match="RANK"):
        job_share(environment)


def test_the_same_process_may_ask_again(tmp_path):
    with sole_writer(tmp_path):
        with sole_writer(tmp_path / "." / ""):
            pass
        assert (tmp_path / LOCK_NAME).exists(), "the outer block still writes"
    assert not (tmp_path / LOCK_NAME).exists()


def test_an_error_in_the_block_frees_the_folder(tmp_path):
    with pytest.raises(ValueError, match="inside"), sole_writer(tmp_path):
        raise ValueError("inside")
    with sole_writer(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"), sole_writer(tmp_path / "file" / "out"):
        pass
