"""One small model of every family of timm as a token model: all of them where time allows, else a few."""

import re

import pytest
import timm

from tests.models.families import FAMILIES, table, try_family
from tests.source_tree import REPOSITORY

# Sequences with and without class tokens, NCHW and NHWC maps, hybrids, and what is refused.
FEW = ("vision_transformer", "vision_transformer_relpos", "resnet", "convnext", "efficientnet", "maxxvit", "byobnet")
# Vision towers of language models: no classifier, and the smallest has 87 million parameters.
TOWERS = {"deepseek_vit", "gemma4_vit", "qwen3_vit"}
REFUSED = {"crossvit": "gives list, not one feature map", "pit": "1×1 tokens"}


@pytest.mark.parametrize("family", FEW)
def test_families_that_work(family):
    grid, reason = try_family(family)
    assert grid and not reason


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_families_that_are_refused_by_name(family):
    grid, reason = try_family(family)
    assert not grid
    assert REFUSED[family] in reason


def documented() -> list[str]:
    page = (REPOSITORY / "docs" / "your-model.md").read_text()
    return re.findall(r"^\| `\w+` \| `.*$", page, re.MULTILINE)


def test_the_documented_table_has_every_family():
    modules = {name for name in timm.list_modules() if timm.list_models(module=name, exclude_filters="fan_*")}
    assert {re.match(r"\| `(\w+)`", row)[1] for row in documented()} == FAMILIES.keys() == modules - TOWERS


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_documented_table_is_what_the_models_do():
    assert documented() == table(FAMILIES)[2:]
