"""What captions say about a scene."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .scene import Thing

KIND_WORDS = {
    "circle": ["disc"],
    "square": ["box", "block"],
    "triangle": ["wedge"],
    "heart": ["love heart"],
    "cross": ["plus sign"],
    "crescent": ["moon", "crescent moon"],
    "ring": ["hoop", "doughnut"],
    "arrow": ["pointer"],
    "diamond": ["rhombus"],
    "oval": ["ellipse", "egg"],
    "drop": ["droplet", "teardrop"],
    "bolt": ["lightning bolt", "flash"],
    "house": ["hut", "cottage"],
    "flower": ["blossom"],
    "mushroom": ["toadstool"],
    "tree": ["fir", "pine"],
    "frame": ["picture frame"],
    "bow": ["bow tie"],
    "boat": ["sailboat", "ship"],
}
COLOUR_WORDS = {"purple": ["violet"], "grey": ["gray"], "turquoise": ["teal"], "red": ["scarlet"], "black": ["dark"]}
# Before the noun, and after it.
PATTERN_WORDS = {
    "striped": (["striped", "stripy"], ["with stripes"]),
    "dotted": (["dotted", "spotted", "polka dot"], ["with dots", "with spots"]),
    "checked": (["checked", "checkered", "chequered"], ["with a check pattern", "with checks"]),
    "grid": (["gridded", "latticed"], ["with a grid", "with grid lines"]),
    "two-tone": (["two-tone", "half white"], ["in two tones"]),
    "plain": (["plain", "solid"], ["without any pattern"]),
}
GROUND_WORDS = {
    "grass": ["on the grass", "on a lawn", "in a meadow", "on green grass"],
    "sand": ["on the sand", "on a beach", "in the desert", "on sand"],
    "water": ["on the water", "in water", "floating on a lake", "on the sea"],
    "brick": ["on a brick wall", "in front of bricks", "against a wall of brick", "on the bricks"],
    "snow": ["in the snow", "on snow", "on fresh snow"],
    "wood": ["on wood", "on a wooden floor", "on wooden planks", "on the table"],
    "gravel": ["on gravel", "on the stones", "on pebbles"],
    "tiles": ["on tiles", "on a tiled floor", "in front of tiles"],
    "mud": ["in the mud", "on the soil", "on muddy ground"],
    "leaves": ["on leaves", "among the leaves", "on fallen leaves"],
    "sky": ["in the sky", "against a cloudy sky", "up in the clouds"],
    "cloth": ["on cloth", "on a carpet", "on woven cloth"],
}


def caption(things: Sequence[Thing], ground: str, detail: float, rng: random.Random, said: dict[str, None]) -> str:
    """One way to describe a scene; the kinds and the ground that it mentions are added to `said`."""
    order = rng.sample(things, len(things))
    if len(order) > 1 and rng.random() < 0.15:
        order = order[:-1]  # people do not mention everything
    said.update(dict.fromkeys(thing.kind for thing in order))
    phrases = [_describe(thing, detail, rng) for thing in order]
    if len(order) >= 2 and rng.random() < 0.4:
        subject = f"{phrases[0]} {_relation(order[0], order[1], rng)} {phrases[1]}"
        if len(order) == 3:
            subject += f"{rng.choice((' and', ', with', ' near'))} {phrases[2]}"
    elif len(order) == 3:
        subject = f"{phrases[0]}, {phrases[1]} {rng.choice(('and', 'and also'))} {phrases[2]}"
    else:
        subject = rng.choice((" and ", " with ", " together with ")).join(phrases)
    where = ""
    if rng.random() < 0.65 * detail:
        where = rng.choice(GROUND_WORDS[ground])
        said[ground] = None
    plural = len(order) > 1 and " and " in subject
    sentence = rng.choices(
        (
            f"{subject} {where}",
            f"{where}{',' if where else ''} {subject}",
            f"there {'are' if plural else 'is'} {subject} {where}",
            f"a picture of {subject} {where}",
            f"{subject} can be seen {where}",
            f"we see {subject} {where}",
            f"{subject} {rng.choice(('lie', 'sit')) + ('' if plural else 's')} {where}" if where else subject,
        ),
        weights=(8, 2, 3, 2, 1, 1, 2),
    )[0]
    sentence = " ".join(sentence.split())
    if rng.random() < 0.6:
        sentence = sentence[0].upper() + sentence[1:]
    return sentence + rng.choice(("", "", ".", " ."))


def _describe(thing: Thing, detail: float, rng: random.Random) -> str:
    """A noun phrase: article, perhaps size, pattern and colour in either order, the kind or a synonym."""
    words = KIND_WORDS.get(thing.kind, [])
    noun = rng.choice(words) if words and rng.random() < 0.25 else thing.kind
    adjectives, after = [], ""
    if rng.random() < 0.85 * detail:
        words = COLOUR_WORDS.get(thing.colour, [])
        adjectives.append(rng.choice(words) if words and rng.random() < 0.25 else thing.colour)
    if rng.random() < (0.1 if thing.pattern == "plain" else 0.65) * detail:
        before, behind = PATTERN_WORDS[thing.pattern]
        if rng.random() < 0.7:
            adjectives.insert(rng.randint(0, len(adjectives)), rng.choice(before))
        else:
            after = " " + rng.choice(behind)
    if rng.random() < 0.15 and not 0.33 < thing.size < 0.45:
        adjectives.insert(0, rng.choice(("large", "big") if thing.size >= 0.45 else ("small", "little")))
    phrase = " ".join([*adjectives, noun])
    article = rng.choices(("a", "the", "one"), weights=(8, 1, 1))[0]
    if article == "a" and phrase[0] in "aeiou" and not phrase.startswith("one"):
        article = "an"
    return f"{article} {phrase}{after}"


def _relation(first: Thing, second: Thing, rng: random.Random) -> str:
    """A true preposition between two objects."""
    across, down = second.x - first.x, second.y - first.y
    choices = ["next to", "beside", "near"]
    if abs(across) > 1.5 * abs(down):
        choices += ["left of", "to the left of"] if across > 0 else ["right of", "to the right of"]
    elif abs(down) > 1.5 * abs(across):
        choices += ["above", "over"] if down > 0 else ["below", "under"]
    return rng.choice(choices)
