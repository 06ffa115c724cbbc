"""What a user reads when something is wrong: one line that says what, where and how to mend it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from picture3d import errors
from picture3d.cli import main

PACKAGE = Path(errors.__file__).parent
CLASSES = {name for name, thing in vars(errors).items() if isinstance(thing, type) and name != "Picture3dError"}
# Messages of one part only say what and where. They may become fewer, not more.
MOST_WITHOUT_A_SECOND_PART = 228


def messages() -> list[tuple[str, str]]:
    """(place in the code, message with {} for what is filled in) of each error that is raised with its text."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)):
                continue
            if node.exc.func.id not in CLASSES:
                continue
            assert node.exc.args, f"{path}:{node.lineno}: an error without a message"
            text = node.exc.args[0]
            if isinstance(text, ast.Constant):
                found.append((f"{path.name}:{node.lineno}", str(text.value)))
            elif isinstance(text, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "{}" for part in text.values]
                found.append((f"{path.name}:{node.lineno}", "".join(parts)))
    return found


def test_every_message_is_one_line_of_words():
    found = messages()
    assert len(found) > 400, "the walk finds the errors"
    composed = {"{}: {}", "{}: {}{}"}  # their words were chosen before
    assert [place for place, text in found if text not in composed and len(text.replace("{}", "").split()) < 2] == []
    assert [place for place, text in found if "\n" in text] == []


def test_messages_without_a_part_that_mends_become_fewer():
    one_part = [place for place, text in messages() if ". " not in text and ";" not in text]
    assert len(one_part) <= MOST_WITHOUT_A_SECOND_PART, one_part


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is printed on standard error by a command that has to fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["picture3d", *words])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what", "mend"),
    [
        (["data", "info", "{}/absent"], "absent", "picture3d prepare"),
        (["pretrain", "--out", "{}/run"], "which prepared frames", "--data FOLDER"),
        (["weights", "show", "{}/junk.safetensors"], "junk.safetensors", ""),
    ],
    ids=["DataError", "ConfigError", "CheckpointError"],
)
def test_a_real_mistake_prints_one_line(tmp_path, capsys, words, what, mend):
    (tmp_path / "junk.safetensors").write_bytes(bytes(range(100)))
    text = said([word.format(tmp_path) for word in words], capsys)
    assert len(text.strip().splitlines()) == 1, text
    assert text.startswith("error: ")
    assert what in text
    assert mend in text


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_class_ends_in_one_line_and_status_two(monkeypatch, capsys, name):
    def fail() -> None:
        raise getattr(errors, name)("frame 3: a thing is wrong. Do this.")

    monkeypatch.setattr("picture3d.cli.app", fail)
    assert said([], capsys) == "error: frame 3: a thing is wrong. Do this.\n"
