"""Write train.jsonl and heldout.jsonl of config_hub/quickstart: orders in plain English, with a line of JSON as completion.

    python scripts/examples/make_quickstart_data.py

The completion can be checked exactly: keys in order, numbers as digits, sizes as one letter. Validation orders have
customers, and combinations of item, size and city, that are not in the training data. Public domain (CC0).
"""

import json
import random
from pathlib import Path

TASK = "Write this order as one line of JSON with the keys item, quantity, size and city."
ITEMS = [
    "mug",
    "apron",
    "scarf",
    "lamp",
    "notebook",
    "backpack",
    "poster",
    "cushion",
    "blanket",
    "candle",
    "teapot",
    "umbrella",
    "basket",
    "vase",
    "clock",
    "jacket",
    "hoodie",
    "tray",
    "towel",
    "rug",
]
CITIES = [
    "Oslo",
    "Lisbon",
    "Vienna",
    "Prague",
    "Dublin",
    "Athens",
    "Warsaw",
    "Madrid",
    "Rome",
    "Berlin",
    "Zurich",
    "Geneva",
    "Helsinki",
    "Tallinn",
    "Riga",
    "Vilnius",
    "Krakow",
    "Porto",
    "Seville",
    "Milan",
    "Turin",
    "Lyon",
    "Nantes",
    "Bergen",
    "Malmo",
    "Aarhus",
    "Gdansk",
    "Brno",
    "Graz",
    "Basel",
]
CUSTOMERS = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Leo",
    "Maria",
    "Nils",
    "Olga",
    "Paul",
]
VALIDATION_CUSTOMERS = ["Quentin", "Rosa", "Stefan", "Tilda", "Ulrich", "Vera", "Walter", "Yara"]
SIZES = {"S": "small", "M": "medium", "L": "large"}
NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
PATTERNS = (
    "Hi, this is {who}. Please send {n} {size} {items} to {city}.",
    "{who} from {city} would like {n} {items}, size {size}.",
    "Could you ship {n} {size} {items} to my address in {city}? Thanks, {who}",
    "I need {n} {items} in {size} for our office in {city}. Regards, {who}",
    "{who} here. We are in {city} and want {n} of the {size} {items}.",
    "New order by {who}: {items}, {size}, {n} pieces, delivery to {city}.",
    "To {city}, please: {n} {items}. The {size} ones. {who}",
    "My name is {who} and I live in {city}. I would like to buy {n} {size} {items}.",
    "Please put {n} {size} {items} aside for {who}; a courier takes them to {city}.",
    "{who} called and asked for {size} {items}, {n} in all, for the shop in {city}.",
)


def main() -> None:
    pick = random.Random(7)
    combinations = [(item, size, city) for item in ITEMS for size in SIZES for city in CITIES]
    pick.shuffle(combinations)
    for name, chosen, customers in (
        ("train", combinations[:320], CUSTOMERS),
        ("heldout", combinations[320:370], VALIDATION_CUSTOMERS),
    ):
        lines = []
        for item, size, city in chosen:
            quantity = pick.randint(2, 12)
            written = pick.choice((str(quantity), NUMBERS[quantity - 2]))
            order = pick.choice(PATTERNS).format(
                who=pick.choice(customers), n=written, size=SIZES[size], items=item + "s", city=city
            )
            answer = json.dumps({"item": item, "quantity": quantity, "size": size, "city": city})
            messages = [{"role": "user", "content": f"{TASK}\n{order}"}, {"role": "assistant", "content": answer}]
            lines.append(json.dumps({"messages": messages}))
        Path(__file__).parents[2].joinpath("config_hub/quickstart", f"{name}.jsonl").write_text(
            "\n".join(lines) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
