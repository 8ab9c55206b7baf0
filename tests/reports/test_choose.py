"""Choosing labels: what is drawn, what patterns fit, and that no more shards are read than that takes."""

import pytest

from stl_offline.errors import InputError, JoinError
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.reports.choose import Place, choose_labels


@pytest.fixture
def reads(monkeypatch):
    """Which shards were read: ("labels" or "index", shard)."""
    found = []
    for name, what in (("read_bytes", "labels"), ("read_index", "index")):
        original = getattr(LabelSet, name)

        def counted(self, index, *arguments, original=original, what=what, **options):
            found.append((what, index))
            return original(self, index, *arguments, **options)

        monkeypatch.setattr(LabelSet, name, counted)
    return found


def test_samples_touch_no_shard(label_set, reads):
    choice = choose_labels(label_set, (), 5, 0)
    assert len(set(choice.places)) == 5
    assert choice.places == tuple(sorted(choice.places))
    assert choice.found == len(label_set)
    assert choice_again(label_set) == choice
    assert choose_labels(label_set, (), 5, 1) != choice
    assert reads == []


def choice_again(label_set):
    return choose_labels(label_set, (), 5, 0)


def test_every_label_is_drawn_at_last(label_set):
    everything = choose_labels(label_set, (), 1000, 0)
    rows = [Place(shard, row) for shard, record in enumerate(label_set.shards) for row in range(record.samples)]
    assert list(everything.places) == rows


def test_a_key_is_found_without_reading_on(label_set, reads):
    shards = [label_set.read_index(shard).keys for shard in label_set.present]
    reads.clear()
    choice = choose_labels(label_set, (shards[2][1],), 5, 0)
    assert choice.places == (Place(2, 1),)
    assert choice.shards == (2,)
    assert reads == [("index", 0), ("index", 1), ("index", 2)]


def test_patterns_are_sampled_and_named_keys_are_not(label_set):
    keys = list(label_set)
    hearts = [key for key in keys if key.startswith("heart")]
    named = next(key for key in keys if key.startswith("drop"))
    choice = choose_labels(label_set, ("heart*", named), 2, 0)
    chosen = [keys[sum(label_set.shards[s].samples for s in range(place.shard)) + place.row] for place in choice.places]
    assert named in chosen
    assert len(chosen) == 2
    assert set(chosen) - {named} <= set(hearts)
    assert choice.found == len(hearts) + 1


def test_a_key_with_brackets_is_itself_first(make_labels, label_set):
    # "[" would start a set of characters in a pattern.
    choice = choose_labels(label_set, (list(label_set)[4],), 1, 0)
    assert len(choice.places) == 1


@pytest.mark.parametrize("key", ["heart*", "nowhere", "no[wv]here*"])
def test_what_fits_nothing_is_named(label_set, key):
    asked = (next(iter(label_set)), key)
    if key == "heart*":
        assert len(choose_labels(label_set, asked, 4, 0).places) > 1
        return
    with pytest.raises(JoinError, match="1 of the keys"):
        choose_labels(label_set, asked, 4, 0)


def test_no_samples_are_refused(label_set):
    with pytest.raises(InputError, match="at least 1"):
        choose_labels(label_set, (), 0, 0)


def test_of_a_set_that_was_pulled_in_part_only_that_is_chosen(labels):
    whole = open_label_set(labels)
    part = LabelSet(whole.storage, whole.manifest, (1, 4))
    assert choose_labels(part, (), 1000, 0).shards == (1, 4)
