from __future__ import annotations

import pytest

from picture3d.errors import DataError
from picture3d.files import append_line, read_bounded, read_json_object, replacing, whole_file, write_json, write_text


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
