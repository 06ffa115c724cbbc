"""What a user reads when something is wrong: one line that says what, where and how to mend it.

Every place in the package that makes an error a user can meet is found in the syntax trees, its message put together as far as
it is written in the source, and read. What counts as complete:

- After its first clause the message has another one that begins with what to do: a verb of `ADVICE` in the imperative.
  Clauses end at a full stop, semicolon, colon or question mark, or begin in brackets.
- A message that passes on the words of an error of ours (``except DataError as error: ... {error}``) is as good as those are.
- Texts that a reader hands to the code it shares (`mend`, `absent` of a `FramedKind`) are read as messages of their own.
- Arguments that only a programmer can get wrong raise ValueError or TypeError. In `ops` and `models` these give advice too,
  or say by one of the words of `EXPECTATION` what was expected.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from picture3d import errors
from picture3d.cli import main
from picture3d.formats.framed_file import FramedKind

PACKAGE = Path(errors.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
CLASSES = {name for name, thing in vars(errors).items() if isinstance(thing, type)}

ADVICE = {
    kind: verbs.split()
    for kind, verbs in {
        "get": "bring copy download fetch install unpack upload",
        "do again": "convert fine-tune go make pre-train prepare repeat run save score start store train try write",
        "choose": "add allow ask build choose compare give hand keep leave lower mix name pass put raise set state switch take "
        "use",
        "mend": "change check clip correct crop delete drop free look map mend move remove rename sort wait",
    }.items()
}
VERBS = {verb: kind for kind, verbs in ADVICE.items() for verb in verbs}
EXPECTATION = re.compile(r"\b(must|needs?|expected|belongs?|at least|at most|only|neither|cannot|do not|names)\b")
PASSED_ON = "<the words of another error>"
TOLD_BY_THE_KIND = "<what a FramedKind says>"
# Errors that hand on a whole text, which is read where it is made: by rank 0, and by `Watch.report`.
WORDS_OF_OTHERS = {("training/distributed.py", "rank 0 refused: {}"), ("training/distributed.py", "{}")}


class Messages(ast.NodeVisitor):
    """(place in the code, message) of each error made in one file; ``{}`` stands for what is filled in later."""

    def __init__(self, path: Path, classes: set[str]) -> None:
        self.path, self.classes = path, classes
        self.module = self._module()
        self.found: list[tuple[str, str]] = []
        self.caught: list[str] = []  # names bound by the `except` clauses around, of our errors alone
        self.functions: list[ast.AST] = []
        self.looked_up: list[str] = []  # so that a text made of itself ends
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.visit(self.tree)

    def _module(self) -> ModuleType:
        if self.path.is_relative_to(PACKAGE):
            return importlib.import_module(".".join(("picture3d", *self.path.relative_to(PACKAGE).with_suffix("").parts)))
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.functions.append(node)
        self.generic_visit(node)
        self.functions.pop()

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        ours = node.name is not None and all(isinstance(kind, ast.Name) and kind.id in CLASSES for kind in kinds)
        self.caught.append(str(node.name) if ours else "")
        self.generic_visit(node)
        self.caught.pop()

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in self.classes:
            inside = self.path.relative_to(PACKAGE) if self.path.is_relative_to(PACKAGE) else self.path.name
            place = f"{inside}:{node.lineno}"
            assert node.args or node.func.id not in CLASSES, f"{place}: an error without a message"
            for argument in node.args[:1]:
                self.found += [(place, text) for text in sorted(set(self.texts(argument)))]
        self.generic_visit(node)

    def texts(self, node: ast.expr) -> list[str]:
        """Every text that an expression can be, as far as it is written here."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr():
                return ["".join(parts) for parts in itertools.product(*(self.texts(part) for part in node.values))]
            case ast.FormattedValue():
                return self.texts(node.value)
            case ast.BinOp(op=ast.Add()):
                return [one + two for one in self.texts(node.left) for two in self.texts(node.right)]
            case ast.IfExp():
                return self.texts(node.body) + self.texts(node.orelse)
            case ast.BoolOp():
                return [text for value in node.values for text in self.texts(value)]
            case ast.Name() if node.id in self.caught:
                return [PASSED_ON]
            case ast.Attribute(attr="mend" | "absent"):
                return [TOLD_BY_THE_KIND]
            case ast.Name():
                known = getattr(self.module, node.id, None)
                return [known] if isinstance(known, str) else self.assigned(node.id)
            case ast.Call(func=ast.Name(id="str"), args=[argument]):
                return self.texts(argument)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(value=ast.Name(id="self"), attr=name)):
                return self.returned(name)
        return ["{}"]

    def assigned(self, name: str) -> list[str]:
        """The texts that the function around gives to a variable."""
        if name in self.looked_up:
            return ["{}"]
        self.looked_up.append(name)
        given = [
            text
            for node in ast.walk(self.functions[-1] if self.functions else ast.Module([], []))
            if isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
            if isinstance(node.value, ast.Constant | ast.JoinedStr | ast.IfExp)
            for text in self.texts(node.value)
        ]
        self.looked_up.pop()
        return given or ["{}"]

    def returned(self, name: str) -> list[str]:
        """The texts that a function or method of the same file returns."""
        texts: list[str] = []
        for function in ast.walk(self.tree):
            if isinstance(function, ast.FunctionDef) and function.name == name and name not in self.looked_up:
                self.functions.append(function)
                self.looked_up.append(name)
                for node in ast.walk(function):
                    if isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | ast.JoinedStr | ast.BinOp):
                        texts += self.texts(node.value)
                self.looked_up.pop()
                self.functions.pop()
        return texts or ["{}"]


def messages(classes: set[str] = CLASSES, sources: list[Path] = SOURCES) -> list[tuple[str, str]]:
    return [found for path in sources for found in Messages(path, classes).found]


def advice(text: str) -> str | None:
    """Which kind of advice a message gives, or None."""
    if PASSED_ON in text or TOLD_BY_THE_KIND in text:
        return "told elsewhere"
    for clause in re.split(r"[.;:?!)]\s+|\s\(", text)[1:]:
        words = re.findall(r"[a-z-]+", clause.lower())
        if words and words[0] in VERBS:
            return VERBS[words[0]]
        if words[:3] == ["did", "you", "mean"]:
            return "choose"
    return None


@pytest.fixture(scope="module")
def all_messages() -> list[tuple[str, str]]:
    return messages()


def test_every_message_is_one_line_of_words(all_messages):
    assert len(all_messages) > 550, "the walk finds the errors"
    composed = {"{}", f"{{}}: {PASSED_ON}", f"{{}}, {{}}: {PASSED_ON}"}  # their words are read where they are made
    assert [place for place, text in all_messages if text not in composed and len(text.replace("{}", "").split()) < 3] == []
    assert [place for place, text in all_messages if "\n" in text or re.search(r"\{[A-Z_]+\}", text)] == []


def test_every_message_says_how_to_mend_what_is_wrong(all_messages):
    silent = [(place, text) for place, text in all_messages if advice(text) is None]
    assert [found for found in silent if (found[0].partition(":")[0], found[1]) not in WORDS_OF_OTHERS] == []
    counts = Counter(advice(text) for _, text in all_messages)
    assert min(counts[kind] for kind in ADVICE) > 50, f"advice of every kind is given: {counts}"


def test_texts_that_shared_readers_are_handed_say_how_to_mend():
    kinds = {
        f"{path.name} {name}": thing
        for path in SOURCES
        if "FramedKind(" in path.read_text(encoding="utf-8")
        for name, thing in vars(Messages(path, CLASSES).module).items()
        if isinstance(thing, FramedKind)
    }
    assert len(kinds) >= 3
    assert [
        name for name, kind in kinds.items() for text in (kind.mend, kind.absent) if text and not advice(f"it: {text}")
    ] == []


def test_the_report_on_a_broken_job_says_what_to_do():
    told = Messages(PACKAGE / "training/watch.py", CLASSES).returned("report")
    assert told
    assert all(advice(text) for text in told)


@pytest.mark.parametrize("room", ["ops", "models"])
def test_wrong_arguments_are_named_with_what_was_expected(room):
    found = messages({"ValueError", "TypeError"}, sorted((PACKAGE / room).glob("*.py")))
    assert found
    assert [(place, text) for place, text in found if not (EXPECTATION.search(text) or advice(text))] == []


@pytest.mark.parametrize(
    ("body", "complete"),
    [
        ('raise DataError(f"{path}: holds nothing.")', False),
        ('raise DataError(f"{path}: holds nothing; it is cut off.")', False),
        ('raise DataError(f"{path}: holds nothing. Copy it again.")', True),
        ('raise DataError(f"{path}: holds nothing. {FETCH_AGAIN}")', True),
        ('hint = "Use another." if path else "It is odd."\n    raise DataError(f"{path}: no. {hint}")', False),
        ('hint = "Use another." if path else "Mend it."\n    raise DataError(f"{path}: no. {hint}")', True),
        ('try:\n        pass\n    except DataError as error:\n        raise DataError(f"{path}: {error}")', True),
        ('try:\n        pass\n    except ValueError as error:\n        raise DataError(f"{path}: {error}")', False),
        ('return DataError("a thing: is wrong")', False),
    ],
)
def test_a_new_message_without_advice_is_found_out(tmp_path, body, complete):
    path = tmp_path / "new_reader.py"
    source = f"from picture3d.errors import FETCH_AGAIN, DataError\n\n\ndef read(path):\n    {body}\n"
    path.write_text(source, encoding="utf-8")
    found = messages(sources=[path])
    assert found
    assert all(advice(text) for _, text in found) is complete


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
