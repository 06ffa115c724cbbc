"""Walking a JSON file that is too large to be decoded at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from picture3d.errors import DataError

_CHUNK = 1 << 20  # characters read at a time
_MAX_VALUE = 1 << 28  # characters one value may take


class NestedObject:
    """A JSON object that holds a large object under one key.

    A plain decoder would hold all of it; here the text of one entry is held at a time.
    """

    def __init__(self, file: TextIO, path: Path, large: str) -> None:
        """`file` is open at its start; `path` is for messages; `large` is the key whose object is walked."""
        self._file, self._path, self._large = file, path, large
        self._text, self._at, self._passed = "", 0, 0
        self._decoder = json.JSONDecoder()

    def entries(self) -> Iterator[tuple[tuple[str, ...], Any]]:
        """((key,), value) of every plain entry, ((large, key), value) inside the large one, then ((large,), None).

        Raises:
            DataError: if the text is not such an object, is cut off, or goes on after its end.
        """
        for key in self._keys():
            if key != self._large:
                yield (key,), self._value()
                continue
            for token in self._keys():
                yield (key, token), self._value()
            yield (key,), None
        if self._peek():
            raise self._damaged("text after the end of the object")

    def _keys(self) -> Iterator[str]:
        self._expect("{")
        if self._peek() == "}":
            self._at += 1
            return
        while True:
            key = self._value()
            if not isinstance(key, str):
                raise self._damaged("a key is not a string")
            self._expect(":")
            yield key
            if self._peek() == "}":
                self._at += 1
                return
            self._expect(",")

    def _value(self) -> Any:
        self._peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number may go on in the next chunk; everything else ends with a character of its own.
                if end < len(self._text) or not self._more():
                    self._at = end
                    return value
            except ValueError as error:
                if len(self._text) - self._at > _MAX_VALUE or not self._more():
                    raise self._damaged(str(error)) from None
            except RecursionError:
                raise self._damaged("nested too deep") from None

    def _expect(self, sign: str) -> None:
        if self._peek() != sign:
            raise self._damaged(f"expected {sign!r}, found {self._peek()!r}")
        self._at += 1

    def _peek(self) -> str:
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _more(self) -> bool:
        # At least doubles what is held, so a long value is not decoded again for every chunk.
        chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def _damaged(self, why: str) -> DataError:
        return DataError(
            f"{self._path}: not JSON near character {self._passed + self._at} ({why}). Damaged or cut off; write it again."
        )
