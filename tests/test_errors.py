"""Errors: one printable line each, whatever text of others they quote."""

import pickle

import pytest

from stl_offline.errors import FormatError, JoinError, StlError, UnknownKeyError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("n01440764/Tänzer 犬.jpg", "n01440764/Tänzer 犬.jpg"),
        ("\x1b]0;title\x07red\x1b[31m", "\\x1b]0;title\\x07red\\x1b[31m"),
        ("two\nlines\r\tand a tab", "two\\nlines\\r\\tand a tab"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        ("\u2066isolated\u2069 \u200b\u2028", "\\u2066isolated\\u2069 \\u200b\\u2028"),
        ("a lone surrogate \ud800", "a lone surrogate \\ud800"),
        ("C1 \x9b", "C1 \\x9b"),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text).isprintable()


def test_every_error_is_one_printable_line():
    error = FormatError("the shard \x1b[2J\u202ebad\n  has more\r\nlines")
    assert str(error) == "the shard \\x1b[2J\\u202ebad has more lines"


def test_a_message_has_at_most_4000_characters():
    for text in ("a" * 9000, "\x1b" * 6000, "\x1b" * 3000):
        assert len(str(FormatError(text))) <= 4000
    assert str(FormatError("a" * 4000)) == "a" * 4000


def test_an_unknown_key_is_a_key_error_without_quotes():
    error = UnknownKeyError("no label for the key 'a'")
    assert isinstance(error, JoinError) and isinstance(error, KeyError) and isinstance(error, StlError)
    assert str(error) == "no label for the key 'a'"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
