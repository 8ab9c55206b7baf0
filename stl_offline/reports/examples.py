"""Examples of a report: images that a run gets right and wrong, with what each run says of their tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stl_offline.reports.colors import class_marks
from stl_offline.reports.encode import jpeg_url
from stl_offline.reports.html import Article, Panel, class_rows, label_cells, page_data, say_shares, token_data
from stl_offline.reports.predictions import Predicted, choose_examples
from stl_offline.reports.runs import Run


@dataclass(frozen=True)
class NumberedArticle(Article):
    """An article with its number on the page."""

    number: int = 0


@dataclass(frozen=True)
class ExampleGroup:
    """Articles below one heading; class_names and marks are the page's."""

    title: str
    articles: tuple[NumberedArticle, ...]
    class_names: tuple[str, ...]
    marks: dict[int, str]

    def without_last(self) -> "ExampleGroup":
        """One example less."""
        return replace(self, articles=self.articles[:-1])


def example_groups(runs: Sequence[Run], predicted: Predicted, count: int, seed: int) -> list[ExampleGroup]:
    """Images that the first run gets right, then those that it gets wrong, with every run's tokens."""
    first = predicted.runs[0]
    right, wrong = choose_examples(first, count, seed)
    marks = _marks(predicted, right + wrong)
    score = f"{first.right.sum():,} of the {len(first.right):,} images looked at"
    groups = []
    for title, places in (
        (f"{runs[0].name} gets right ({score})", right),
        (f"{runs[0].name} gets wrong, those it is surest of", wrong),
    ):
        articles = tuple(_article(runs, predicted, place, marks) for place in places)
        groups.append(ExampleGroup(title, articles, first.class_names, marks))
    return [group for group in groups if group.articles]


def page_of(groups: Sequence[ExampleGroup]) -> str:
    """All groups' tokens as JSON, in the order of their articles' numbers."""
    articles = [article for group in groups for article in group.articles]
    if not articles:
        return page_data([], (), {})
    return page_data(articles, groups[0].class_names, groups[0].marks)


def numbered(groups: Sequence[ExampleGroup]) -> list[ExampleGroup]:
    """The same groups, their articles numbered in the page's order."""
    found, number = [], 0
    for group in groups:
        articles = []
        for article in group.articles:
            articles.append(replace(article, number=number))
            number += 1
        found.append(replace(group, articles=tuple(articles)))
    return found


def _marks(predicted: Predicted, places: Sequence[int]) -> dict[int, str]:
    counts: Counter[int] = Counter()
    for run in range(len(predicted.runs)):
        for place in places:
            tokens = predicted.tokens(run, place)
            counts += tokens.shares if tokens is not None else Counter()
    return class_marks(counts)


def _article(runs: Sequence[Run], predicted: Predicted, place: int, marks: dict[int, str]) -> NumberedArticle:
    key = predicted.beton.keys[int(predicted.sample_ids[place])]
    names = predicted.runs[0].class_names
    own = int(predicted.runs[0].truth[place])
    panels = [Panel("image", f"The image {key}, of the class {names[own]}", 1.0, pixels="image", grey=False)]
    maps, tokens, tables, tags = [], {}, {}, []
    for number, (run, predictions) in enumerate(zip(runs, predicted.runs, strict=True)):
        right = bool(predictions.right[place])
        said, sure = names[int(predictions.class_ids[place])], predictions.confidence[place]
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        tags.append((f"{prefix}{'✓' if right else '✗'} {said} {sure:.0%}", "right" if right else "wrong"))
        found = predicted.tokens(number, place)
        if found is None:
            continue
        name = f"run{number}"
        maps.append(found)
        tokens[name] = token_data(found)
        tables[name] = run.name
        panels.append(
            Panel(
                f"tokens of {run.name}",
                f"Tokens of {run.name} on {key}: {say_shares(found, names)}",
                1.0,
                pixels="image",
                cells=label_cells(found),
                tokens=name,
                letters="best",
                reach=True,
            )
        )
    return NumberedArticle(
        key=key,
        title=f"{key} ({names[own]})",
        note="",
        pixels={"image": jpeg_url(predicted.pixels(place))},
        panels=tuple(panels),
        rows=class_rows(maps, own, names, marks) if maps else (),
        tokens=tokens,
        own=own,
        tables=tables,
        tags=tuple(tags),
    )
