from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from picture3d.config import FrozenConfig, nearest
from picture3d.errors import ConfigError, DataError


class Optim(FrozenConfig):
    peak_lr: float = Field(default=1e-3, gt=0)
    kind: Literal["adamw", "sgd"] = "adamw"


class Extra(FrozenConfig):
    translation: float = 0.0


class Whole(FrozenConfig):
    name: str = "a"
    steps: int | None = 3
    sizes: tuple[int, int] = (1, 2)
    optim: Optim = Optim()
    extra: Extra | None = None

    @model_validator(mode="after")
    def _check(self) -> Whole:
        if self.sizes[0] > self.sizes[1]:
            raise ValueError("sizes must not fall")
        return self


def test_values_cannot_be_changed():
    config = Whole()
    with pytest.raises(ValidationError):
        config.name = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        config.optim.peak_lr = 1.0  # type: ignore[misc]


def test_overrides_reach_nested_keys_and_leave_the_original_alone():
    config = Whole()
    changed = config.with_overrides(["optim.peak_lr=0.5", "steps=null", "sizes=[3, 4]", "name=x=y", "optim.kind=sgd"])
    assert changed == Whole(name="x=y", steps=None, sizes=(3, 4), optim=Optim(peak_lr=0.5, kind="sgd"))
    assert config == Whole()


def test_the_last_of_two_overrides_counts():
    assert Whole().with_overrides(["steps=4", "steps=5"]).steps == 5


def test_a_whole_section_can_be_given_as_json():
    assert Whole().with_overrides(['extra={"translation": 2}']).extra == Extra(translation=2.0)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("optim.peek_lr=1", "unknown key 'optim.peek_lr'. Did you mean 'optim.peak_lr'?"),
        ("peak_lr=1", "Did you mean 'optim.peak_lr'?"),
        ("name.deeper=1", "unknown key 'name.deeper'"),
        ("zzzzzz=1", "Choose one of extra"),
        ("steps", "not of the form key=value"),
        ("steps=many", "steps: .*integer.*'many'"),
        ("optim.peak_lr=-1", r"optim\.peak_lr: .*greater than 0 \(got -1\)"),
        ("optim.peak_lr=NaN", r"optim\.peak_lr: "),
        ("optim.kind=lion", r"optim\.kind: .*'adamw' or 'sgd'"),
        ("sizes=[1]", r"sizes\.1: "),
        ('extra={"translatoin": 2}', r"unknown key 'extra\.translatoin'. Did you mean 'translation'\?"),
        ("sizes=[2, 1]", "config: settings: sizes must not fall. Correct it there"),
    ],
)
def test_a_wrong_override_is_said_in_one_line(assignment, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Whole().with_overrides([assignment])
    assert "\n" not in str(caught.value)


def test_a_saved_config_comes_back_equal(tmp_path):
    config = Whole(optim=Optim(peak_lr=0.1 + 0.2))
    config.save(tmp_path / "config.json")
    assert Whole.load(tmp_path / "config.json") == config


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"null"])
def test_what_is_no_config_is_refused_by_name(tmp_path: Path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json: (not a JSON|a config file holds one JSON object)"):
        Whole.load(path)
    with pytest.raises(ConfigError, match="no such config file"):
        Whole.load(tmp_path / "other.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Whole.load(tmp_path)


def test_a_config_that_cannot_be_saved_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/config\.json: cannot be written"):
        Whole().save(tmp_path / "file" / "config.json")


def test_a_file_with_an_unknown_key_names_file_key_and_nearest(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"stesp": 3, "optim": {"peak": 1}}))
    with pytest.raises(ConfigError) as caught:
        Whole.load(path)
    text = str(caught.value)
    assert str(path) in text
    assert "'stesp'. Did you mean 'steps'?" in text
    assert "'optim.peak'. Did you mean 'peak_lr'?" in text


def test_nearest_finds_a_leaf_under_another_parent_and_nothing_for_noise():
    assert nearest("batch", ["training.batch_size", "data.root"]) == "training.batch_size"
    assert nearest("qqq", ["training.batch_size"]) is None
    assert nearest("a", []) is None
