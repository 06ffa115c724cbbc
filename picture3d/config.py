"""The one config mechanism: frozen pydantic models, JSON on disk, ``--set a.b=c`` on the command line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from picture3d.errors import ConfigError
from picture3d.files import write_json

_MAX_BYTES = 1 << 24


class FrozenConfig(BaseModel):
    """Base of every config: values cannot change after construction and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def with_overrides(self, assignments: Iterable[str]) -> Self:
        """A copy with ``"a.b=c"`` assignments applied; values are read as JSON, and as plain text where they are not JSON.

        Raises:
            ConfigError: for an assignment without ``=``, an unknown key (the nearest key is named) or an invalid value.
        """
        tree = self.model_dump(mode="json")
        for assignment in assignments:
            dotted, equals, text = assignment.partition("=")
            if not equals:
                raise ConfigError(
                    f"--set {assignment}: not of the form key=value. Write for example --set training.batch_size=4"
                )
            _assign(tree, dotted.strip(), _parse(text), known=sorted(_leaf_paths(self.model_dump(mode="json"))))
        return type(self).from_tree(tree)

    @classmethod
    def from_tree(cls, tree: dict[str, Any], *, source: str = "config") -> Self:
        """Validates a plain tree, as read from JSON.

        Raises:
            ConfigError: naming every wrong key by its dotted path.
        """
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError(_explain(cls, error, source)) from None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a config saved by :meth:`save`."""
        return cls.from_tree(read_config_tree(path), source=str(path))

    def save(self, path: Path) -> None:
        """Writes the whole resolved config as JSON.

        Raises:
            DataError: if the file cannot be written.
        """
        write_json(path, self.model_dump(mode="json"))


def read_config_tree(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, not yet validated.

    Raises:
        ConfigError: if the file is missing or is not a JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ConfigError(f"{path}: more than the {_MAX_BYTES} bytes a config may have. Check that this is the right file.")
        tree = json.loads(data)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file. Check the name.") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: this config file cannot be read ({error.strerror or error}). Look at its permissions and the disk."
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: not a JSON config file ({error}). Write it as `picture3d recipes NAME` prints one."
        ) from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: a config file holds one JSON object, found {type(tree).__name__}. Write it as `picture3d recipes NAME` "
            "prints one."
        )
    return tree


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if nothing is alike."""
    known = list(known)
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    if found:
        return found[0]
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in known}
    leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_leaf), n=1, cutoff=0.6)
    return by_leaf[leaf[0]] if leaf else None


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _leaf_paths(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        yield path
        if isinstance(value, dict):
            yield from _leaf_paths(value, path + ".")


def _assign(tree: dict[str, Any], dotted: str, value: Any, known: list[str]) -> None:
    *parents, leaf = dotted.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        guess = nearest(dotted, known)
        hint = f" Did you mean '{guess}'?" if guess else f" Choose one of {', '.join(known[:12])}, ..."
        raise ConfigError(f"unknown key '{dotted}'.{hint}")
    node[leaf] = value


def _explain(cls: type[BaseModel], error: ValidationError, source: str) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            guess = nearest(str(item["loc"][-1]), _field_names(cls))
            lines.append(f"unknown key '{path}'." + (f" Did you mean '{guess}'?" if guess else ""))
        else:
            # A check over a whole section is given all of it, which would bury the words.
            given = item.get("input")
            got = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
            lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')}{got}")
    told = "; ".join(lines)
    return f"{source}: {told}{'' if told.endswith('?') else '.'} Correct it there, or with --set KEY=VALUE."


def _field_names(cls: type[BaseModel]) -> set[str]:
    names: set[str] = set()
    for name, field in cls.model_fields.items():
        names.add(name)
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names |= _field_names(kind)
    return names
