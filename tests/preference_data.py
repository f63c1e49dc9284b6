"""Writes the data of `config_hub/quickstart_preference.yaml`: questions with a short, polite answer and a long, blunt one.

    python tests/preference_data.py

The chosen answer opens with a friendly word and has two short sentences; the rejected one has four and no such word. What is
preferred can so be checked by a program: `is_short_and_polite`. Questions of the validation file are on other things.
"""

import json
import random
import re
from pathlib import Path

PLACE = Path(__file__).parents[1] / "config_hub/preference"
VALIDATION_EVERY = 5  # one thing in so many
OPENINGS = ("Happy to help!", "Gladly!", "Thank you for asking!", "With pleasure!")
POLITE = re.compile(r"(?i)\b(happy to|glad|gladly|thank|thanks|pleasure|welcome|kindly)\b")

CAPITALS = (
    "France Paris, Italy Rome, Spain Madrid, Portugal Lisbon, Austria Vienna, Hungary Budapest, Greece Athens, Norway Oslo, "
    "Sweden Stockholm, Finland Helsinki, Denmark Copenhagen, Ireland Dublin, Poland Warsaw, Japan Tokyo, Egypt Cairo, "
    "Kenya Nairobi, Peru Lima, Chile Santiago, Cuba Havana, Canada Ottawa, Iceland Reykjavik, Belgium Brussels, "
    "Germany Berlin, Russia Moscow, Turkey Ankara, Thailand Bangkok, Vietnam Hanoi, Bulgaria Sofia, Romania Bucharest"
)
YOUNG = (
    "cat kitten, dog puppy, cow calf, horse foal, sheep lamb, goat kid, pig piglet, hen chick, duck duckling, goose gosling, "
    "swan cygnet, bear cub, lion cub, deer fawn, frog tadpole, kangaroo joey, owl owlet, whale calf, seal pup, fox cub"
)
OPPOSITES = (
    "hot cold, big small, fast slow, early late, light dark, open closed, full empty, old young, high low, loud quiet, "
    "wet dry, hard soft, rich poor, strong weak, near far, clean dirty, happy sad, deep shallow, wide narrow, thick thin"
)
COLORS = (
    "a ripe banana yellow, grass green, snow white, coal black, a clear sky blue, a tomato red, a carrot orange, milk white, "
    "a lemon yellow, an emerald green, a ruby red, chocolate brown, an elephant grey, a flamingo pink, the sea blue"
)
KINDS = (
    (
        CAPITALS,
        ("What is the capital of {0}?", "Which city is the capital of {0}?", "Tell me the capital of {0}."),
        "The capital of {0} is {1}.",
        "The capital city of {0} is {1}, which is where the government of the country has its seat. A capital is often, but "
        "not always, the largest city of a country. There are many other cities in {0} that one might mention. Their history "
        "is long, and it would take a book to describe it.",
    ),
    (
        YOUNG,
        ("What is a young {0} called?", "What do you call the young of a {0}?", "Name the young of a {0}."),
        "A young {0} is called a {1}.",
        "Animals have different names when they are young, and the {0} is one of these animals. Its young one is known as a "
        "{1}. The word is old and is found in many stories. As it grows up, it is simply called a {0} like the others.",
    ),
    (
        OPPOSITES,
        ("What is the opposite of {0}?", "Which word means the opposite of {0}?", "Give me the opposite of {0}."),
        "The opposite of {0} is {1}.",
        "Words can be compared by their meaning, and some of them mean the contrary of each other. The word {0} is such a "
        "word. Its contrary is {1}. Whether that fits depends on the sentence, since many words have more than one meaning.",
    ),
    (
        COLORS,
        ("What color is {0}?", "Which color does {0} have?", "Tell me the color of {0}."),
        "The color of {0} is {1}.",
        "Color is what we see when light comes back from a thing to our eyes. In the case of {0}, that color is {1} for "
        "nearly everybody. In other light it may look different. Painters know many shades of it, each with its own name.",
    ),
)


def is_short_and_polite(answer: str) -> bool:
    """Whether an answer has at most 20 words, one of them a friendly one."""
    return 0 < len(answer.split()) <= 20 and bool(POLITE.search(answer))


def records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Pairs for training, and those for validation."""
    draw = random.Random(7)
    train, validation = [], []
    for things, questions, short, long in KINDS:
        pairs = [one.rsplit(" ", 1) for one in things.split(", ")]
        draw.shuffle(pairs)
        for number, (thing, answer) in enumerate(pairs):
            is_validation = number % VALIDATION_EVERY == 0
            for question in draw.sample(questions, 2):
                chosen = f"{draw.choice(OPENINGS)} {short.format(thing, answer)}"
                pair = {"prompt": question.format(thing), "chosen": chosen, "rejected": long.format(thing, answer)}
                (validation if is_validation else train).append(pair)
    draw.shuffle(train)
    draw.shuffle(validation)
    return train, validation


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    for name, rows in zip(("train", "heldout"), records(), strict=True):
        (PLACE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
