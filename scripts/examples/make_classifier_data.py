"""Make the data of config_hub/quickstart_classifier.yaml: messages of customers, with what they want as their label.

    python scripts/examples/make_classifier_data.py

The sentences of the validation messages, and the things that they are about, are in no training message. The classes share
most words: complaints without a bad word, praise with many, questions about either.
"""

import json
import random
from pathlib import Path

PLACE = Path(__file__).parents[2] / "config_hub/classifier"
OPEN = ["", "", "Hello,", "Hi there,", "Good morning.", "Dear team,", "To whom it may concern:"]
CLOSE = ["", "", "Regards, Ida", "Thanks, Tom", "Best wishes, Vera", "Sent from my phone", "I ordered it last week."]
THINGS = ["kettle", "lamp", "backpack", "printer", "bicycle pump", "radio", "desk chair", "tent", "blender", "keyboard"]
NEW_THINGS = ["toaster", "suitcase", "headphones", "drill", "rain jacket"]
TRAIN = {
    "complaint": [
        "the {} stopped working after two days.",
        "I waited four weeks, and the {} is still not here.",
        "the box was open, and a part of the {} is gone.",
        "this is the second {} that you sent me with the same fault.",
        "nobody answers the phone, and my {} is in pieces.",
        "so much for your promise: the {} does not even turn on.",
        "I expected a good {} and got a cheap copy.",
        "your {} made a noise, then smoke, then nothing.",
        "I would love to praise the {}, if only it worked.",
        "you charged me twice for one {}.",
        "the {} looks nice in the picture; in my hands it fell apart.",
        "three calls, no answer, no {}.",
    ],
    "praise": [
        "the {} works better than I hoped.",
        "I feared that the {} would be late, and it came a day early.",
        "my old {} broke all the time; this one never does.",
        "whoever packed the {} did not leave a scratch on it.",
        "two years of rain and falls, and the {} still works.",
        "I have no fault to find with the {}, and I tried.",
        "a neighbour saw my {} and wants the same one.",
        "it is rare that a cheap {} is this good.",
        "the part that was gone came the next day, and the {} is perfect now.",
        "I called about my {}, and your colleague solved it in a minute.",
        "the {} turns on at once and makes no noise.",
        "I meant to send the {} back; now nobody may take it from me.",
    ],
    "question": [
        "does the {} work without a cable?",
        "how long does it take until a {} is here?",
        "is a broken {} covered by the guarantee?",
        "can I open the {} to change a part?",
        "which {} makes less noise, the old or the new one?",
        "I wonder whether the {} comes in green.",
        "would the {} survive a fall?",
        "please tell me how heavy the {} is.",
        "what do I do if the {} does not turn on?",
        "before I buy the {}: is it good for children?",
        "do you charge for sending a {} back?",
        "I could not find the size of the {} on your page.",
    ],
    "change": [
        "please send the {} to my new address instead.",
        "I need two of the {}, not one.",
        "cancel the {}, I found my old one.",
        "could you wait with the {} until I am back on Monday?",
        "make it the green {} rather than the red one.",
        "take the {} off my order and leave the rest.",
        "I typed the wrong street for the {}; it is number 14.",
        "if the {} is not packed yet, add a second one.",
        "put the bill for the {} on the company, please.",
        "I no longer want the {}, so do not send it.",
        "my {} should go to the shop; I will pick it up there.",
        "swap the {} for the larger model before it leaves.",
    ],
}
VALIDATION = {
    "complaint": [
        "after one week the {} is already useless.",
        "what arrived is not the {} that I paid for.",
        "I have sent five letters about the {} and heard nothing.",
        "I was told the {} is brand new, and it has someone else's name on it.",
        "great, another {} that leaks.",
        "my {} was dropped at the wrong house and nobody cares.",
        "the manual of the {} is missing, and so are the screws.",
        "I regret every cent that I spent on the {}.",
        "it took me an hour to find out that the {} cannot be fixed.",
        "please explain why the {} smells of burnt rubber.",
    ],
    "praise": [
        "I cannot imagine a day without the {} any more.",
        "the repair of my {} was free and quick.",
        "not once has the {} let me down.",
        "everyone at home fights over the {}.",
        "I was wrong to doubt the {}.",
        "the {} has earned its place in my kitchen.",
        "who would have thought that a {} can make me smile?",
        "for once, a {} that does what the page says.",
        "I gave the {} to my mother, and she calls it a treasure.",
        "my third {} from you, and again no complaint.",
    ],
    "question": [
        "is there a discount on the {} for students?",
        "where can I read how to clean the {}?",
        "will the {} fit into a small car?",
        "I am not sure if the {} needs batteries.",
        "who repairs a {} that leaks?",
        "are the colours of the {} the same as in the picture?",
        "may I try the {} for a week before I pay?",
        "from which country does the {} come?",
        "I would like to know if the {} is waterproof.",
        "at what time will the {} arrive on Friday?",
    ],
    "change": [
        "deliver the {} a week later than planned.",
        "my flat is empty until June, so bring the {} to my sister.",
        "drop one {} from the three that I asked for.",
        "I would rather pay for the {} by card after all.",
        "use my maiden name on the parcel with the {}.",
        "do not ring at my door with the {}; leave it with the porter.",
        "I picked black by mistake, the {} has to be blue.",
        "let my colleague collect the {}, her name is Ana.",
        "send the {} together with my other parcel to save a trip.",
        "stop the {}, we are moving abroad.",
    ],
}


def write(file: Path, sentences: dict[str, list[str]], things: list[str], copies: int, seed: int) -> None:
    """Write `copies` messages of each sentence, each about another thing."""
    draw = random.Random(seed)
    rows = []
    for label, lines in sentences.items():
        for line in lines:
            for thing in draw.sample(things, copies):
                words = [draw.choice(OPEN), line.format(thing), draw.choice(CLOSE)]
                text = " ".join(word for word in words if word)
                rows.append({"text": text[0].upper() + text[1:], "label": label})
    draw.shuffle(rows)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    PLACE.mkdir(exist_ok=True)
    write(PLACE / "train.jsonl", TRAIN, THINGS, 5, 1)
    write(PLACE / "heldout.jsonl", VALIDATION, NEW_THINGS, 2, 2)


if __name__ == "__main__":
    main()
