"""Examples of a report: images that a run gets right and wrong, with every run's predictions for their tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stl_offline.errors import printable
from stl_offline.palette import class_marks
from stl_offline.reports.html import Article, class_rows, page_data, token_data
from stl_offline.reports.names import display_names
from stl_offline.reports.panels import IMAGE, Panel, describe_shares, label_panel
from stl_offline.reports.predictions import Predicted, choose_examples
from stl_offline.reports.runs import Run


@dataclass(frozen=True)
class ExampleGroup:
    """Articles below one heading."""

    title: str
    articles: tuple[Article, ...]


@dataclass(frozen=True)
class Examples:
    """All groups, and the class names and letters that their articles share."""

    groups: tuple[ExampleGroup, ...] = ()
    class_names: tuple[str, ...] = ()
    marks: dict[int, str] = field(default_factory=dict)

    @property
    def articles(self) -> list[Article]:
        """All articles, in the page's order."""
        return [article for group in self.groups for article in group.articles]

    @property
    def data(self) -> str:
        """All articles' tokens as JSON."""
        return page_data(self.articles, self.class_names, self.marks)

    def shorter(self) -> "Examples":
        """Without the last article of each group."""
        groups = (replace(group, articles=group.articles[:-1]) for group in self.groups)
        return replace(self, groups=tuple(group for group in groups if group.articles))


def make_examples(runs: Sequence[Run], predicted: Predicted, count: int, seed: int) -> Examples:
    """Images that the first run gets right, then those that it gets wrong, with every run's tokens."""
    first = predicted.runs[0]
    right, wrong = choose_examples(first, count, seed)
    marks = _marks(predicted, right + wrong)
    names = display_names(first.class_names)
    score = f"{first.right.sum():,} of the {len(first.right):,} images scored"
    name = runs[0].name
    groups = (
        ExampleGroup(title, tuple(_article(runs, predicted, place, names, marks) for place in places))
        for title, places in (
            (f"Images that {name} gets right ({score})", right),
            (f"Images that {name} gets wrong, most confident first", wrong),
        )
    )
    return Examples(tuple(group for group in groups if group.articles), names, marks)


def _marks(predicted: Predicted, places: Sequence[int]) -> dict[int, str]:
    counts: Counter[int] = Counter()
    for run in range(len(predicted.runs)):
        for place in places:
            tokens = predicted.tokens(run, place)
            counts += tokens.shares if tokens is not None else Counter()
    return class_marks(counts)


def _article(
    runs: Sequence[Run], predicted: Predicted, place: int, names: Sequence[str], marks: dict[int, str]
) -> Article:
    key = printable(predicted.beton.keys[int(predicted.sample_ids[place])])
    own = int(predicted.runs[0].truth[place])
    pixels = predicted.pixels(place)
    panels = [Panel(IMAGE, f"The image {key} of the class {names[own]}", 1.0, pixels, source="image", grey=False)]
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
        found = replace(found, pixels=pixels)
        maps.append(found)
        tokens[name] = token_data(found)
        tables[name] = run.name
        alt = f"Tokens of {run.name} on {key}: {describe_shares(found, names)}"
        panels.append(label_panel(f"tokens of {run.name}", alt, found, name, "image"))
    return Article(
        key=key,
        title=f"{key} ({names[own]})",
        panels=tuple(panels),
        rows=class_rows(maps, own, names, marks) if maps else (),
        tokens=tokens,
        own=own,
        tables=tables,
        tags=tuple(tags),
    )
