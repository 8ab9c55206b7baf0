"""What the report says of a run's token labels."""

from types import SimpleNamespace

import pytest

from stl_offline.reports.report import _labels


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        ("labeler", {}, "its tokens through their mean"),
        ("labeler", {"token_pool": "lme"}, "its tokens through the log of their mean exponential"),
        ("labeler", {"token_weight": 0}, "its tokens not at all"),
        ("student", {}, "the token head was not trained"),
        ("segmenter", {}, "fine-tuned on masks or boxes"),
        ("detector", {}, "fine-tuned on masks or boxes"),
    ],
)
def test_runs_without_token_labels(stage, settings, words):
    assert words in _labels(SimpleNamespace(stage=stage, settings=settings, data={}), [])["labels"]
