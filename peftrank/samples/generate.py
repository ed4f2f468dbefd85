"""Simulates the embedded sample data: four small domains with tastes one can read in the text.

    python -m peftrank.samples.generate --check    # are the files what this seed generates?
    python -m peftrank.samples.generate --write    # write them

The world: an item belongs to a topic (a member of the social network to one or two); a user has
one to three topics of interest with an affinity each. A list mixes one to three candidates of the
user's interests with others. A candidate is clicked with

    probability = examination(position) * (noise + (1 - noise) * affinity * appeal)

so shown positions and appealing items are clicked more often than taste alone explains. A fifth of
the items is released after training: they appear only in the test part. Topics are never written
to the files; only the text tells. This file knows no model, no tokenizer and no tensor.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product

from peftrank.samples import PARTS, sample_path, samples
from peftrank.samples._ecommerce import BRANDS
from peftrank.samples._ecommerce import TOPICS as _ECOMMERCE
from peftrank.samples._news import TOPICS as _NEWS
from peftrank.samples._social import ASIDES, JOBS, NAMES
from peftrank.samples._social import TOPICS as _SOCIAL
from peftrank.samples._video import TOPICS as _VIDEO

SEED = 20250303
START = 1740960000
"""First second of the simulated log: 2025-03-03 00:00 UTC."""

_TOPICS = {"ecommerce": _ECOMMERCE, "news": _NEWS, "social": _SOCIAL, "video": _VIDEO}
_DAY = 86400
_ITEMS_PER_TOPIC = 25
_COLD_PER_TOPIC = 5
_TRAIN_USERS, _TRAIN_SLATES_EACH = 300, 4
_VALID_USERS = 200
_TEST_KNOWN_USERS, _TEST_NEW_USERS, _TEST_NEW_SLATES_EACH = 240, 80, 2
_AFFINITIES = (1.0, 0.75, 0.5)
_NOISE = 0.01
_HISTORY_NOISE = 0.12
_COLD_CANDIDATES = 0.35
_MAX_HISTORY = 10
_ALTERNATIVES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class SimulatedItem:
    """An item with what only the simulation knows about it."""

    item_id: str
    fields: Mapping[str, str]
    topics: Mapping[str, float]
    """Topic -> how much of it, in (0, 1]."""
    appeal: float
    """In (0, 1]: how often someone who likes the topic clicks it."""
    cold: bool
    """Released after training: appears in the test part only."""


@dataclass(frozen=True)
class Menu:
    """Items to draw from, with their cumulated weights."""

    items: list[SimulatedItem]
    cumulated: list[float]


@dataclass
class SimulatedUser:
    """A user, their tastes, and the history that grows from list to list."""

    user_id: str
    affinities: Mapping[str, float]
    history: list[SimulatedItem] = field(default_factory=list)
    feedback: list[int] = field(default_factory=list)
    menus: dict[tuple[bool, bool], Menu] = field(default_factory=dict)
    """(liked, cold) -> what such a place in a list is filled from."""

    def affinity(self, item: SimulatedItem) -> float:
        """Returns how much the user likes the item's topics, in [0, 1]."""
        return max(self.affinities.get(topic, 0.0) * part for topic, part in item.topics.items())

    def remember(self, item: SimulatedItem, feedback: int) -> None:
        """Appends an item the user clicked; the oldest is forgotten."""
        self.history = [*self.history, item][-_MAX_HISTORY:]
        self.feedback = [*self.feedback, feedback][-_MAX_HISTORY:]


@dataclass(frozen=True)
class SimulatedSlate:
    """A list as shown, with who saw it; `affinities` is what an oracle would score."""

    slate_id: str
    user_id: str
    history: tuple[SimulatedItem, ...]
    feedback: tuple[int, ...]
    candidates: tuple[SimulatedItem, ...]
    affinities: tuple[float, ...]
    labels: tuple[int, ...]
    timestamp: int


def simulate(
    domain: str, seed: int = SEED
) -> tuple[list[SimulatedItem], dict[str, list[SimulatedSlate]]]:
    """Returns the items of a domain and its slates by part; the same for the same seed."""
    rng = random.Random(f"{domain}-{seed}")
    items = _catalogue(domain, rng)
    world = _World(domain, items, rng)
    known = [world.user() for _ in range(_TRAIN_USERS)]
    train = world.sessions("train", known, _TRAIN_SLATES_EACH, START, 20 * _DAY)
    valid_users = rng.sample(known, _VALID_USERS)
    valid = world.sessions("valid", valid_users, 1, START + 21 * _DAY, 3 * _DAY)
    returning = [(user, 1) for user in rng.sample(known, _TEST_KNOWN_USERS)]
    visits = returning + [(world.user(), _TEST_NEW_SLATES_EACH) for _ in range(_TEST_NEW_USERS)]
    rng.shuffle(visits)
    begin, gap = START + 25 * _DAY, 6 * _DAY // len(visits)
    test: list[SimulatedSlate] = []
    for place, (user, lists) in enumerate(visits):
        test += world.session("test", user, lists, begin + place * gap, len(test))
    return items, {"train": train, "valid": valid, "test": test}


def render(domain: str, seed: int = SEED) -> dict[str, str]:
    """Returns the content of each file of a domain: `items` and one per part."""
    items, parts = simulate(domain, seed)
    rows = {"items": [{"item_id": item.item_id, "fields": dict(item.fields)} for item in items]}
    content = {"items": _lines(rows["items"])}
    for part in PARTS:
        content[part] = _lines(_row(domain, slate) for slate in parts[part])
    return content


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks or writes the files; returns the exit code (1: a file differs)."""
    parser = argparse.ArgumentParser(prog="python -m peftrank.samples.generate")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare the files with this seed's")
    action.add_argument("--write", action="store_true", help="write the files")
    write = parser.parse_args(arguments).write
    differing = []
    for domain in samples():
        for part, text in render(domain).items():
            path = sample_path(domain, part)
            if write:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(text.encode())
            elif not path.is_file() or path.read_bytes() != text.encode():
                differing.append(path)
    for path in differing:
        sys.stderr.write(f"{path} differs from what the generator writes; run with --write\n")
    return 1 if differing else 0


class _World:
    """The items of one domain and the random stream that moves everything in it."""

    def __init__(self, domain: str, items: Sequence[SimulatedItem], rng: random.Random):
        self.domain, self.items, self.rng = domain, items, rng
        self.users = 0
        topics = list(_TOPICS[domain])
        rng.shuffle(topics)
        # Some topics have more followers than others: part of what makes an item popular.
        self.followers = {topic: 1 / (3 + rank) for rank, topic in enumerate(topics)}

    def user(self) -> SimulatedUser:
        rng, tastes = self.rng, {}
        remaining = dict(self.followers)
        for affinity in _AFFINITIES[: rng.choices((1, 2, 3), (4, 4, 2))[0]]:
            topic = rng.choices(list(remaining), list(remaining.values()))[0]
            del remaining[topic]
            tastes[topic] = affinity
        self.users += 1
        user = SimulatedUser(f"u{self.users}", tastes)
        for liked, cold in product((True, False), repeat=2):
            user.menus[liked, cold] = self._menu(user, liked, cold)
        for _ in range(rng.randint(4, 6)):
            noisy = rng.random() < _HISTORY_NOISE
            item = self._pick(user, user.history, liked=not noisy, cold=False)
            user.remember(item, self._label(user, item))
        return user

    def sessions(
        self, part: str, users: Sequence[SimulatedUser], lists: int, begin: int, length: int
    ) -> list[SimulatedSlate]:
        slates: list[SimulatedSlate] = []
        for place, user in enumerate(users):
            start = begin + place * (length // len(users))
            slates += self.session(part, user, lists, start, len(slates))
        return slates

    def session(
        self, part: str, user: SimulatedUser, lists: int, start: int, number: int
    ) -> list[SimulatedSlate]:
        """Returns successive lists of one visit; clicks of a list join the next one's history."""
        slates, time = [], start
        for offset in range(lists):
            time += self.rng.randint(30, 600)
            slate = self._slate(f"{part}-{number + offset + 1}", user, part == "test", time)
            slates.append(slate)
            for item, label in zip(slate.candidates, slate.labels, strict=True):
                if label:
                    user.remember(item, label)
        return slates

    def _slate(self, slate_id: str, user: SimulatedUser, late: bool, time: int) -> SimulatedSlate:
        labels: tuple[int, ...] = ()
        while not any(labels):  # a list without a click teaches nothing and is not logged
            candidates = self._candidates(user, late)
            affinities = tuple(round(user.affinity(item), 3) for item in candidates)
            labels = tuple(
                self._label(user, item) if self._clicked(position, affinity, item) else 0
                for position, (affinity, item) in enumerate(
                    zip(affinities, candidates, strict=True), start=1
                )
            )
        history, feedback = tuple(user.history), tuple(user.feedback)
        return SimulatedSlate(
            slate_id, user.user_id, history, feedback, candidates, affinities, labels, time
        )

    def _candidates(self, user: SimulatedUser, late: bool) -> tuple[SimulatedItem, ...]:
        rng, chosen = self.rng, list[SimulatedItem]()
        liked = rng.choices((1, 2, 3), (5, 4, 1))[0]
        for place in range(rng.choice((10, 11, 12, 12))):
            cold = late and rng.random() < _COLD_CANDIDATES
            chosen.append(self._pick(user, user.history + chosen, liked=place < liked, cold=cold))
        rng.shuffle(chosen)
        return tuple(chosen)

    def _pick(
        self, user: SimulatedUser, used: Sequence[SimulatedItem], *, liked: bool, cold: bool
    ) -> SimulatedItem:
        taken = {item.item_id for item in used}
        menu = user.menus[liked, cold]
        if all(item.item_id in taken for item in menu.items):
            # A small topic is used up: take its older or newer items.
            return self._pick(user, used, liked=liked, cold=not cold)
        while True:
            item = self.rng.choices(menu.items, cum_weights=menu.cumulated)[0]
            if item.item_id not in taken:
                return item

    def _menu(self, user: SimulatedUser, liked: bool, cold: bool) -> Menu:
        there = [item for item in self.items if item.cold == cold]
        items = [item for item in there if bool(user.affinity(item)) == liked]
        weights = (
            user.affinity(item) * item.appeal if liked else 0.4 + item.appeal for item in items
        )
        return Menu(items, list(accumulate(weights)))

    def _clicked(self, position: int, affinity: float, item: SimulatedItem) -> bool:
        examined = 1 / (1 + 0.12 * (position - 1))
        wanted = _NOISE + (1 - _NOISE) * affinity * (0.35 + 0.65 * item.appeal)
        return self.rng.random() < examined * wanted

    def _label(self, user: SimulatedUser, item: SimulatedItem) -> int:
        """Returns the feedback of a click: 1 (read, followed), 1-2 (bought) or 1-5 (rated)."""
        affinity, luck = user.affinity(item), self.rng.random()
        if self.domain == "ecommerce":
            return 2 if luck < 0.1 + 0.5 * affinity else 1
        if self.domain == "video":
            return (4 if luck < 0.5 else 5) - (luck < 0.15) if affinity else 1 + int(luck * 3)
        return 1


def _catalogue(domain: str, rng: random.Random) -> list[SimulatedItem]:
    texts = _members(rng) if domain == "social" else _titles(domain, rng)
    drafts = []
    for first in range(0, len(texts), _ITEMS_PER_TOPIC):  # texts are in the order of topics
        cold = set(rng.sample(range(_ITEMS_PER_TOPIC), _COLD_PER_TOPIC))
        block = texts[first : first + _ITEMS_PER_TOPIC]
        drafts += [(*text, place in cold) for place, text in enumerate(block)]
    rng.shuffle(drafts)
    count = len(drafts)
    appeals = [1 / (1 + 4 * rank / count) for rank in range(count)]
    rng.shuffle(appeals)
    return [
        SimulatedItem(f"{domain[0]}{number + 1}", fields, topics, appeals[number], cold)
        for number, (fields, topics, cold) in enumerate(drafts)
    ]


def _titles(domain: str, rng: random.Random) -> list[tuple[dict[str, str], dict[str, float]]]:
    drafts = []
    for topic, templates in _TOPICS[domain].items():
        for title in _varied(templates, _ITEMS_PER_TOPIC, rng):
            fields = {"title": title}
            if rng.random() < 0.5:  # half of the items lack it, as in a real catalogue
                fields["genres" if domain == "video" else "category"] = topic
            if domain == "ecommerce":
                fields["brand"] = rng.choice(BRANDS)
            drafts.append((fields, {topic: 1.0}))
    return drafts


def _members(rng: random.Random) -> list[tuple[dict[str, str], dict[str, float]]]:
    phrases = {topic: _expand(lines) for topic, lines in _SOCIAL.items()}
    used, drafts = Counter[str](), dict[str, tuple[dict[str, str], dict[str, float]]]()
    for place, topic in enumerate(phrases, start=1):
        while len(drafts) < place * _ITEMS_PER_TOPIC:  # two of the same text count once
            others = [other for other in phrases if other != topic]
            side = rng.choices((topic, rng.choice(others), ""), (35, 10, 55))[0]
            about = _about(phrases[topic], phrases.get(side, ()), used, rng)
            name = f"{rng.choice(NAMES)} {rng.choice('ABDEGHKLMNPRSTVW')}."
            topics = {side: 0.5, topic: 1.0} if side else {topic: 1.0}
            drafts.setdefault(about, ({"name": name, "about": about}, topics))
    return list(drafts.values())


def _about(main: Sequence[str], side: Sequence[str], used: Counter[str], rng: random.Random) -> str:
    """Returns a job (sometimes), a pastime of `main`, and one of `side` or an aside (sometimes)."""
    says = [rng.choice(JOBS).lower()] if rng.random() < 0.3 else []
    says.append(_least_used(main, used, rng))
    if side:
        says.append(_least_used(side, used, rng))
    elif rng.random() < 0.4:
        says.append(rng.choice(ASIDES))
    about = ", ".join(says)
    return about[0].upper() + about[1:]


def _least_used(phrases: Sequence[str], used: Counter[str], rng: random.Random) -> str:
    fewest = min(used[phrase] for phrase in phrases)
    phrase = rng.choice([phrase for phrase in phrases if used[phrase] == fewest])
    used[phrase] += 1
    return phrase


def _varied(templates: str, count: int, rng: random.Random) -> list[str]:
    """Returns `count` expansions, preferring those that share few words with earlier ones."""
    pool, chosen = _expand(templates), list[str]()
    rng.shuffle(pool)
    while len(chosen) < count:
        seen = [_words(text) for text in chosen]
        overlaps = [max((len(_words(text) & other) for other in seen), default=0) for text in pool]
        best = pool[overlaps.index(min(overlaps))]
        pool.remove(best)
        chosen.append(best)
    return chosen


def _words(text: str) -> set[str]:
    return {word for word in re.findall(r"\w+", text.lower()) if len(word) > 2}


def _expand(templates: str) -> list[str]:
    """Returns every reading of every line: `{a|b} c` gives `a c` and `b c`."""
    done, waiting = list[str](), templates.strip().splitlines()[::-1]
    while waiting:
        line = waiting.pop()
        found = _ALTERNATIVES.search(line)
        if found is None:
            done.append(line)
        else:
            words = found[1].split("|")
            waiting += [line[: found.start()] + word + line[found.end() :] for word in words]
    return done


def _row(domain: str, slate: SimulatedSlate) -> dict[str, object]:
    row: dict[str, object] = {
        "slate_id": slate.slate_id,
        "user_id": slate.user_id,
        "history": [item.item_id for item in slate.history],
        "candidates": [item.item_id for item in slate.candidates],
        "labels": slate.labels,
        "timestamp": slate.timestamp,
    }
    if domain == "video":
        row["history_feedback"] = slate.feedback
    return row


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(
        json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
