"""The tasks tiny-moe is specialised to: short questions with one right answer each.

    python examples/tiny_moe/tasks.py            # writes esft/tiny_moe/tasks/<task>/*.jsonl

A row is `{"prompt": "num sv 42 =", "completion": " fyrtiotvå"}`. No prompt occurs in the
pretraining text: each starts with a word, or asks for a language, that no pretraining line has.
The same seed gives the same files.
"""

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import lines

SHIPPED = Path(__file__).parents[2] / "esft" / "tiny_moe" / "tasks"
TEST_ROWS = 300

Rows = Iterator[tuple[str, str]]  # (question, answer)


def swedish(rng: random.Random) -> Rows:
    """`num sv 42` -> `fyrtiotvå`: a ninth language for the numbers of the pretraining text."""
    from num2words import num2words

    while True:
        number = rng.randrange(rng.choice((1_000, 10_000)))
        yield f"num sv {number}", num2words(number, lang="sv")


def values(rng: random.Random) -> Rows:
    """`value trois cent deux` -> `302`: the numbers' inverse, in all eight languages."""
    from num2words import num2words

    while True:
        number = rng.randrange(1_000)
        yield f"value {num2words(number, lang=rng.choice(lines.LANGUAGES))}", str(number)


MONTHS = "January February March April May June July August September October November December"
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"


def dates(rng: random.Random) -> Rows:
    """`date March 4, 1987` -> `1987-03-04`, from four ways to write a date."""
    while True:
        day = date(1950, 1, 1) + timedelta(days=rng.randrange(36_500))
        month = MONTHS.split()[day.month - 1]
        written = (
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month[:3]} {day.year}",
            f"{WEEKDAYS.split()[day.weekday()]} {day.day} {month} {day.year}",
            f"{day.month}/{day.day}/{day.year}",
        )
        yield f"date {rng.choice(written)}", day.isoformat()


def clock(rng: random.Random) -> Rows:
    """`clock 14:35` -> `twenty-five to three in the afternoon`, each minute of the day once."""
    from num2words import num2words

    def spoken(hour: int, minute: int) -> str:
        """Minutes up to the half hour count from this hour, later ones to the next."""
        near = hour + (minute > 30)
        name = num2words((near - 1) % 12 + 1)
        part = ("night", "morning", "afternoon", "evening")[near % 24 // 6]
        part = f"at {part}" if part == "night" else f"in the {part}"
        away = min(minute, 60 - minute)
        count = {15: "quarter", 30: "half"}.get(away) or num2words(away)
        if away == 0:
            return f"{name} {part}"
        return f"{count} {'past' if minute <= 30 else 'to'} {name} {part}"

    times = list(itertools.product(range(24), range(60)))
    rng.shuffle(times)
    for hour, minute in times:
        yield f"clock {hour:02d}:{minute:02d}", spoken(hour, minute)


def roman(rng: random.Random) -> Rows:
    """`roman 1987` -> `MCMLXXXVII`, each number from 1 to 3,999 once."""
    ladder = (
        *((1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L")),
        *((40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
    )
    for number in rng.sample(range(1, 4_000), 3_999):
        rest, numeral = number, ""
        for value, letters in ladder:
            numeral += letters * (rest // value)
            rest %= value
        yield f"roman {number}", numeral


# ARPAbet, the alphabet of CMUdict, to the International Phonetic Alphabet (General American).
ARPABET_TO_IPA = (
    "AA:ɑ AE:æ AH:ʌ AO:ɔ AW:aʊ AY:aɪ EH:ɛ ER:ɝ EY:eɪ IH:ɪ IY:i OW:oʊ OY:ɔɪ UH:ʊ UW:u B:b CH:tʃ "
    "D:d DH:ð F:f G:ɡ HH:h JH:dʒ K:k L:l M:m N:n NG:ŋ P:p R:ɹ S:s SH:ʃ T:t TH:θ V:v W:w Y:j Z:z "
    "ZH:ʒ"
)


def ipa(rng: random.Random) -> Rows:
    """`ipa HH AH0 L OW1` -> `hʌlˈoʊ`: another alphabet for the sounds of the pretraining text."""
    letters = dict(pair.split(":") for pair in ARPABET_TO_IPA.split())
    stress = {"0": "", "1": "ˈ", "2": "ˌ"}
    words = lines.pronunciations()
    rng.shuffle(words)
    for _, phones in words:
        symbols = (
            stress.get(phone[-1], "") + letters[phone.rstrip("012")] for phone in phones.split()
        )
        yield f"ipa {phones}", "".join(symbols)


VEHICLES = ("train", "bus", "ferry", "flight", "taxi")


def travel(rng: random.Random) -> Rows:
    """`travel two seats ...` -> `book(by=train, from=Oslo, ...)`: new intents, call notation."""
    while True:
        start, goal = rng.sample(lines.CITIES.split(), 2)
        by, day = rng.choice(VEHICLES), rng.choice(lines.DAYS.split())
        seats, number = rng.randrange(1, 10), rng.randrange(100, 1_000)
        said, meant = rng.choice(
            (
                (
                    f"{seats} seats on the {by} from {start} to {goal} {day}",
                    f"book(by={by}, from={start}, to={goal}, day={day}, seats={seats})",
                ),
                (
                    f"get me to {goal} from {start} by {by} on {day}",
                    f"book(by={by}, from={start}, to={goal}, day={day}, seats=1)",
                ),
                (f"cancel {by} {number} to {goal}", f"cancel(by={by}, to={goal}, number={number})"),
                (f"is {by} {number} on time {day}", f"status(by={by}, number={number}, day={day})"),
                (
                    f"a room in {goal} for {seats} nights from {day}",
                    f"stay(city={goal}, day={day}, nights={seats})",
                ),
            )
        )
        yield f"travel {said}", meant


COLUMNS = {
    "id": "number",
    "qty": "number",
    "price": "number",
    "age": "number",
    "city": lines.CITIES.split(),
    "owner": lines.PEOPLE.split(),
    "item": lines.DEVICES.split(),
    "room": lines.ROOMS.split(),
    "genre": lines.STYLES.split(),
}


def csv(rng: random.Random) -> Rows:
    """`csv id,city;7,Oslo` -> `{"id": 7, "city": "Oslo"}`: a header and one record."""
    while True:
        record: dict[str, str | int] = {}
        for column in rng.sample(list(COLUMNS), rng.randint(2, 4)):
            kind = COLUMNS[column]
            record[column] = rng.randrange(1_000) if isinstance(kind, str) else rng.choice(kind)
        header, row = ",".join(record), ",".join(map(str, record.values()))
        yield f"csv {header};{row}", json.dumps(record)


NAME_PARTS = (
    "get set parse read write open close http file node list tree cache index token user error "
    "event queue thread lock path name value type source target header body request response "
    "buffer stream client server config option group field"
)


def snake(rng: random.Random) -> Rows:
    """`snake parseHttpHeader` -> `parse_http_header`: an identifier in the other convention."""
    while True:
        first, *rest = rng.sample(NAME_PARTS.split(), rng.randint(2, 4))
        yield f"snake {first}{''.join(p.title() for p in rest)}", "_".join((first, *rest))


def latex(rng: random.Random) -> Rows:
    r"""`latex 3*t**2 + sin(t)` -> `3 t^{2} + \\sin{\\left(t \\right)}`, by sympy, in t, not x."""
    import sympy

    t = sympy.Symbol("t")
    functions = (sympy.sin, sympy.cos, sympy.exp, sympy.log)

    def term() -> sympy.Expr:
        factor, power, function = rng.randrange(2, 13), rng.randrange(2, 7), rng.choice(functions)
        return rng.choice((factor * t**power, function(factor * t), t**power * function(t)))

    while True:
        expression = sum((term() for _ in range(rng.randrange(1, 3))), sympy.Integer(0))
        yield f"latex {expression}", sympy.latex(expression)


@dataclass(frozen=True)
class Task:
    """A task and how many rows of it ship for training; the test split has TEST_ROWS."""

    name: str
    rows: Callable[[random.Random], Rows]
    train_rows: int


TASKS = (
    Task("swedish", swedish, 4_000),
    Task("values", values, 3_000),
    Task("dates", dates, 3_000),
    Task("clock", clock, 1_100),
    Task("roman", roman, 3_000),
    Task("ipa", ipa, 3_000),
    Task("travel", travel, 2_000),
    Task("csv", csv, 2_000),
    Task("snake", snake, 2_000),
    Task("latex", latex, 2_000),
)


def build(task: Task, seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """`{"train": rows, "test": rows}`; a prompt occurs once in the two together."""
    rng = random.Random(f"tiny-moe/{seed}/task/{task.name}")
    rows: dict[str, str] = {}
    for question, answer in task.rows(rng):
        rows.setdefault(f"{question} =", f" {answer}")
        if len(rows) == TEST_ROWS + task.train_rows:
            break
    drawn = [{"prompt": p, "completion": c} for p, c in rows.items()]
    return {"test": drawn[:TEST_ROWS], "train": drawn[TEST_ROWS:]}


def as_jsonl(rows: list[dict[str, str]]) -> str:
    """Rows as the text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Write every task's two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED)
    args = parser.parse_args()
    for task in TASKS:
        folder = args.out / task.name
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in build(task).items():
            (folder / f"{split}.jsonl").write_text(as_jsonl(rows), encoding="utf-8")
            print(f"{task.name} {split}: {len(rows)} rows, first {rows[0]}")


if __name__ == "__main__":
    main()
