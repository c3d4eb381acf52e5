"""Captions: variants, what is kept in them, and that the step takes each in turn."""

import pytest
from diffusion_trainer.utils.captions import UnusableCaption, decode, variants
from diffusion_trainer.utils.dataset_settings import parse_dataset_settings
from hypothesis import given
from hypothesis import strategies as st


def options(**values):
    return parse_dataset_settings({"directory": [{"path": "/d", **values}]}).directory[0]


def test_prefix_and_trigger_word():
    assert variants("a cat", options(caption_prefix="photo: ", trigger_word="sks")) == ("photo: sks, a cat",)
    assert variants("a sks cat", options(trigger_word="sks")) == ("a sks cat",)
    assert variants("a category", options(trigger_word="cat")) == ("cat, a category",)
    assert variants("", options(trigger_word="sks")) == ("sks",)


tags = st.lists(st.text("abcdefgh", min_size=1, max_size=4), min_size=1, max_size=8)


@given(tags, st.integers(1, 6), st.integers(0, 9))
def test_shuffling_keeps_tags_and_the_first_in_place(words, count, kept):
    found = variants(", ".join(words), options(cache_shuffle_num=count, keep_tokens=kept))
    assert 1 <= len(found) <= count
    for text in found:
        assert sorted(text.split(", ")) == sorted(words)
        assert text.split(", ")[:kept] == words[:kept]
    assert found == variants(", ".join(words), options(cache_shuffle_num=count, keep_tokens=kept))


@given(tags, st.floats(0.01, 0.99), st.integers(0, 3))
def test_dropping_tags_never_drops_all_nor_the_kept(words, share, kept):
    for text in variants(", ".join(words), options(tag_dropout=share, keep_tokens=kept)):
        left = text.split(", ")
        assert left and set(left) <= set(words) and left[: min(kept, len(words))] == words[:kept]


def test_legacy_shuffle_is_one_variant():
    assert len(variants("a, b, c, d, e, f", options(shuffle_tags=True))) == 1


def test_wildcards_all_ways_where_few():
    wild = options(caption_wildcards=True)
    assert set(variants("{red|blue} {cat|dog}", wild)) == {"red cat", "red dog", "blue cat", "blue dog"}
    assert set(variants("a{| big} cat", wild)) == {"a cat", "a big cat"}
    many = variants("{1|2|3|4} {1|2|3|4} {1|2|3|4}", wild)
    assert 1 < len(many) <= 8 and all("{" not in text for text in many)
    assert variants("{red|blue}", options()) == ("{red|blue}",)
    assert variants('{"json": 1}', wild) == ('{"json": 1}',)


def test_what_cannot_be_a_caption():
    assert decode("\ufeffgrün \n".encode(), "a.txt") == "grün"
    with pytest.raises(UnusableCaption, match="not UTF-8"):
        decode(b"caf\xe9", "a.txt")
    with pytest.raises(UnusableCaption, match="characters"):
        decode(b"x" * 200_000, "a.txt")
