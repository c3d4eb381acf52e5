"""Settings tables: messages for people, and TOML that comes back as it went."""

import os
from pathlib import Path

import pytest
from diffusion_trainer.utils.config import SettingsError, Table, option, read_toml, validate, write_toml, write_whole
from hypothesis import given, settings
from hypothesis import strategies as st


class Inner(Table):
    rank: int = option(4, "Rank.", ge=1, le=8)
    names: list[str] | None = option(None, "Names.")


class Outer(Table):
    output_dir: str = option(..., "Folder.")
    kind: str = option("a", "Kind.")
    rate: float = option(1.0, "Rate.", gt=0)
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"output_dirr": "x"}, "output_dirr: unknown option; did you mean 'output_dir'?"),
        ({"output_dir": "x", "zzz": 1}, "zzz: unknown option; known are inner, kind, output_dir, rate"),
        ({}, "output_dir: required, but not given"),
        ({"output_dir": "x", "inner": {"rank": 0}}, "inner.rank: must be at least 1, got 0"),
        ({"output_dir": "x", "inner": {"rank": 9}}, "inner.rank: must be at most 8, got 9"),
        ({"output_dir": "x", "rate": 0}, "rate: must be more than 0.0, got 0"),
        ({"output_dir": "x", "inner": {"rnk": 2}}, "inner.rnk: unknown option; did you mean 'rank'?"),
        ({"output_dir": ["x"]}, "output_dir: input should be a valid string, got ['x']"),
        ({"output_dir": "x", "inner": {"names": ["a", 3]}}, "inner.names[1]: input should be a valid string, got 3"),
        ({"output_dir": "x", "rate": "fast"}, "rate: input should be a valid number"),
    ],
)
def test_messages_name_the_place_and_the_remedy(values, message):
    with pytest.raises(SettingsError) as caught:
        validate(Outer, values)
    assert message in str(caught.value).splitlines() or message in str(caught.value)


def test_all_problems_at_once_below_a_prefix():
    with pytest.raises(SettingsError) as caught:
        validate(Inner, {"rank": 0, "x": 1}, "adapter")
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["adapter.rank", "adapter.x"]


HARD = ["it's", 'say "so"', "C:\\new\\table", "猫 🐈", "line\nbreak", "tab\t'''\"\"\"", "\\", "# no comment", ""]


@pytest.mark.parametrize("text", HARD)
def test_toml_keeps_every_text(tmp_path, text):
    path = tmp_path / "it's 猫.toml"
    values = {"path": text, "table": {"list": [text, text], "key " + text: 1}, "rows": [{"path": text}]}
    write_toml(path, values)
    assert read_toml(path) == values


texts = st.text(st.characters(exclude_categories=["Cs"]))
trees = st.recursive(
    texts | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(texts, trees, max_size=4))
def test_whatever_is_written_reads_back_equal(values):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_toml(Path(folder) / "a.toml", values)
        assert read_toml(Path(folder) / "a.toml") == values


def test_none_is_left_out(tmp_path):
    write_toml(tmp_path / "a.toml", {"a": None, "b": {"c": None, "d": 1}, "e": [{"f": None}]})
    assert read_toml(tmp_path / "a.toml") == {"b": {"d": 1}, "e": [{}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"a = ", "not valid TOML"),
        (b"a = '\xff'", "not valid TOML"),
        (b"a=1\na=2", "not valid TOML"),
    ],
)
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "broken.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=message) as caught:
        read_toml(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    assert read_toml(tmp_path / "a.toml") == {"a": 1}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.toml"
    write_whole(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
