"""Writes the prompts of config_hub/quickstart_grpo.yaml: in which country a city lies, yes or no; some
countries are for validation only.

    python tests/grpo_data.py
"""

import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "config_hub/grpo"
CAPITALS = """
Afghanistan Kabul, Albania Tirana, Algeria Algiers, Angola Luanda, Argentina Buenos Aires, Armenia Yerevan, Australia
Canberra, Austria Vienna, Azerbaijan Baku, Bahrain Manama, Bangladesh Dhaka, Belarus Minsk, Belgium Brussels, Bhutan
Thimphu, Botswana Gaborone, Brazil Brasilia, Bulgaria Sofia, Cambodia Phnom Penh, Cameroon Yaounde, Canada Ottawa,
Chad N'Djamena, Chile Santiago, China Beijing, Colombia Bogota, Croatia Zagreb, Cuba Havana, Cyprus Nicosia, Denmark
Copenhagen, Ecuador Quito, Egypt Cairo, Eritrea Asmara, Estonia Tallinn, Ethiopia Addis Ababa, Fiji Suva, Finland
Helsinki, France Paris, Gabon Libreville, Georgia Tbilisi, Germany Berlin, Ghana Accra, Greece Athens, Guatemala
Guatemala City, Guinea Conakry, Haiti Port-au-Prince, Honduras Tegucigalpa, Hungary Budapest, Iceland Reykjavik, India
New Delhi, Indonesia Jakarta, Iran Tehran, Iraq Baghdad, Ireland Dublin, Italy Rome, Jamaica Kingston, Japan Tokyo,
Jordan Amman, Kenya Nairobi, Kuwait Kuwait City, Laos Vientiane, Latvia Riga, Lebanon Beirut, Liberia Monrovia, Libya
Tripoli, Lithuania Vilnius, Luxembourg Luxembourg, Madagascar Antananarivo, Malaysia Kuala Lumpur, Mali Bamako, Malta
Valletta, Mexico Mexico City, Moldova Chisinau, Mongolia Ulaanbaatar, Morocco Rabat, Mozambique Maputo, Namibia
Windhoek, Nepal Kathmandu, Nicaragua Managua, Niger Niamey, Nigeria Abuja, Norway Oslo, Oman Muscat, Pakistan
Islamabad, Panama Panama City, Paraguay Asuncion, Peru Lima, Poland Warsaw, Portugal Lisbon, Qatar Doha, Romania
Bucharest, Russia Moscow, Rwanda Kigali, Senegal Dakar, Serbia Belgrade, Singapore Singapore, Slovakia Bratislava,
Slovenia Ljubljana, Somalia Mogadishu, Spain Madrid, Sudan Khartoum, Sweden Stockholm, Switzerland Bern, Syria
Damascus, Taiwan Taipei, Tajikistan Dushanbe, Tanzania Dodoma, Thailand Bangkok, Togo Lome, Tunisia Tunis, Turkey
Ankara, Uganda Kampala, Ukraine Kyiv, Uruguay Montevideo, Uzbekistan Tashkent, Venezuela Caracas, Vietnam Hanoi, Yemen
Sanaa, Zambia Lusaka, Zimbabwe Harare
"""
QUESTION = "Is {} in {}? Yes or no?"
EVERY = 4
"""One of so many countries is for validation."""


def records() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the records for training and for validation: for each country its capital and another one's."""
    pairs = [line.strip().partition(" ") for line in CAPITALS.replace("\n", " ").split(",")]
    capitals = [(country, city.strip()) for country, _, city in pairs]
    found: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for i, (country, city) in enumerate(capitals):
        for other, answer in ((city, "yes"), (capitals[i - 5][1], "no")):
            found[i % EVERY == EVERY - 1].append({"prompt": QUESTION.format(other, country), "answer": answer})
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, rows in zip(("train", "heldout"), records(), strict=True):
        (FOLDER / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
