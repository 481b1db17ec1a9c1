"""Reviews, written by hand in pieces and put together by a small grammar; and `gold`, the score that knows the pieces.

A review begins with the prompt, which names a subject, and goes on for two to four sentences. Every clause carries a
value from −2 (as bad as it gets) to 2. A mood is drawn for the review, and the clauses are drawn around the mood.

    python data/reviews/grammar.py     writes the five .jsonl files beside this one, always the same
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache
from math import exp
from pathlib import Path
from random import Random

DEGREES = {"": 1.0, "very ": 1.25, "truly ": 1.3, "rather ": 0.75, "quite ": 0.8, "a little ": 0.5}
FEELINGS = {"adored": 2.0, "loved": 1.75, "enjoyed": 1.25, "liked": 1.0, "got used to": 0.0, "did not mind": 0.25,
            "disliked": -1.0, "could not stand": -1.75, "hated": -2.0}
INTROS = ("To my surprise", "As always", "Honestly", "This time", "All in all", "By the end")
SUBJECT = "subject"  # what the prompt names, where an aspect could stand
WORST, BEST = -2.0, 2.0
UNREADABLE = WORST  # of a sentence that the grammar cannot have made, or that was said before


@dataclass(frozen=True)
class Topic:
    """What can be reviewed, what of it can be praised or blamed, and what people say of it."""

    prompts: tuple[str, ...]  # with {name} where a name goes
    names: tuple[str, ...]
    aspects: tuple[str, ...]  # a trailing * marks a plural
    words: dict[str, float]  # adjective → value
    remarks: dict[str, float]  # whole sentences, written by hand → value
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)  # adjective → the aspects it is said of, if not of all


TOPICS = {
    "food": Topic(
        prompts=("The lentil soup at {name}", "The fish stew at {name}", "The mushroom pie at {name}",
                 "The noodles at {name}", "The pancakes at {name}", "The Sunday roast at {name}"),
        names=("Harbour Kitchen", "Mira's", "the Blue Lamp", "the station café", "Old Anselm's", "the Copper Pot",
               "the night market", "Tilda and Sons", "the Corner Table", "the ferry canteen"),
        aspects=("sauce", "bread", "broth", "crust", "filling", "spices*", "vegetables*", "portion", "dessert"),
        words={"wonderful": 2, "delicious": 2, "superb": 2, "tasty": 1.25, "fresh": 1, "generous": 1, "warm": 0.75,
               "fine": 0.5, "ordinary": -0.25, "plain": -0.25, "bland": -1, "cold": -1, "salty": -0.75, "greasy": -1.25,
               "stale": -1.5, "burnt": -1.5, "awful": -2, "inedible": -2},
        remarks={
            "We wiped our plates clean with the last of the bread.": 1.75,
            "I asked for the recipe and the cook only smiled.": 1.5,
            "My daughter, who eats nothing, ate all of it.": 2,
            "I would cross the town for it in the rain.": 2,
            "It tasted like the kitchen of my grandmother.": 1.5,
            "The waiter remembered us from last year.": 1,
            "We shared a table with two sailors.": 0,
            "They take cards since the spring.": 0,
            "It came in a small blue bowl.": 0,
            "We waited an hour and then waited for the forks.": -1.5,
            "I left half of it under the napkin.": -1.25,
            "The dog would not have it either.": -2,
            "We stopped for chips on the way home.": -1.25,
            "I was ill for two days.": -2,
        },
        only={
            "generous": (SUBJECT, "sauce", "filling", "portion"), "fresh": (SUBJECT, "bread", "vegetables*", "filling"),
            "greasy": (SUBJECT, "crust", "filling", "sauce"), "stale": ("bread", "crust", "dessert"),
            "burnt": ("crust", "bread", "vegetables*"), "salty": (SUBJECT, "broth", "sauce", "crust"),
            "warm": (SUBJECT, "bread", "broth", "sauce"), "cold": (SUBJECT, "broth", "sauce", "filling"),
        }),
    "film": Topic(
        prompts=("The film {name}", "Last night's film, {name},", "The matinee of {name}", "The director's cut of {name}"),
        names=("The Salt Road", "A Quiet Harbour", "Nine Lanterns", "The Clockmaker's Son", "Winter Ferry",
               "The Last Orchard", "Paper Moons", "North of Evening", "The Glass Violin", "Two Left Shoes"),
        aspects=("plot", "ending", "music", "camera work", "dialogue", "actors*", "opening scene", "jokes*", "middle part"),
        words={"brilliant": 2, "moving": 1.75, "gripping": 1.75, "clever": 1.25, "funny": 1.25, "charming": 1.25,
               "pleasant": 0.75, "watchable": 0.5, "long": -0.25, "loud": -0.5, "predictable": -0.75, "confusing": -1,
               "slow": -0.75, "dull": -1.25, "clumsy": -1.25, "tedious": -1.5, "dreadful": -2, "unbearable": -2},
        remarks={
            "Nobody in the row moved until the lights came on.": 2,
            "We talked about it all the way home.": 1.5,
            "I laughed, and then I noticed that I was crying.": 2,
            "I have already bought tickets for my parents.": 1.75,
            "My brother quotes it at every meal.": 1,
            "The usher let us stay for the songs at the end.": 0.75,
            "It was shown in the small hall.": 0,
            "We sat near the aisle.": 0,
            "There was a short film before it.": 0,
            "Half of the hall had left by the second reel.": -1.75,
            "I counted the lamps in the ceiling.": -1.5,
            "Even the popcorn gave up.": -1.25,
            "I want those two hours back.": -2,
            "The man beside me snored, and I envied him.": -1.5,
        },
        only={
            "funny": (SUBJECT, "dialogue", "jokes*", "ending"),
            "long": (SUBJECT, "dialogue", "opening scene", "middle part"),
            "loud": (SUBJECT, "music", "ending", "opening scene"), "watchable": (SUBJECT, "ending", "middle part"),
            "gripping": (SUBJECT, "plot", "ending", "opening scene"),
            "confusing": (SUBJECT, "plot", "ending", "camera work"),
            "predictable": (SUBJECT, "plot", "ending", "jokes*", "dialogue"),
        }),
    "place": Topic(
        prompts=("Our room at {name}", "The weekend at {name}", "The view from {name}", "A night at {name}"),
        names=("the Linden Hotel", "the Seven Pines", "Lakeside House", "the old lighthouse", "the Grand Meridian",
               "the miller's cottage", "Hill Farm", "the Harbour Inn", "the garden hostel", "Villa Rosa"),
        aspects=("bed", "breakfast", "garden", "bathroom", "staff", "windows*", "walls*", "balcony", "stairs*"),
        words={"lovely": 1.75, "splendid": 2, "perfect": 2, "cosy": 1.25, "bright": 1, "clean": 1, "quiet": 1,
               "friendly": 1.25, "decent": 0.5, "small": -0.25, "old": -0.25, "noisy": -1, "shabby": -1, "damp": -1.25,
               "dirty": -1.5, "rude": -1.5, "horrible": -2, "filthy": -2},
        remarks={
            "We woke to bells and the smell of coffee.": 1.5,
            "We stayed three days longer than we had planned.": 2,
            "I have never slept so well.": 2,
            "The owner drew us a map of her favourite walks.": 1.5,
            "A heron came to the window each morning.": 1.25,
            "They kept our boots by the stove.": 1,
            "The bus stops at the gate.": 0,
            "Our key was number twelve.": 0,
            "There is a lift for the luggage.": 0,
            "The tap sang to us until three in the morning.": -1.25,
            "We slept in our coats.": -1.75,
            "Something lived behind the wardrobe.": -1.75,
            "We left before breakfast and did not look back.": -2,
            "They charged us for the towels.": -1,
        },
        only={
            "friendly": ("staff",), "rude": ("staff",), "noisy": (SUBJECT, "bathroom", "windows*", "stairs*", "staff"),
            "quiet": (SUBJECT, "garden", "staff", "balcony"), "clean": ("bed", "bathroom", "windows*", "walls*", "stairs*"),
            "dirty": ("bathroom", "windows*", "walls*", "stairs*"), "filthy": ("bed", "bathroom", "balcony", "stairs*"),
            "damp": ("bed", "walls*", "bathroom"), "bright": (SUBJECT, "breakfast", "balcony", "bathroom"),
            "shabby": (SUBJECT, "bed", "bathroom", "walls*", "stairs*"), "cosy": (SUBJECT, "bed", "bathroom", "balcony"),
        }),
    "book": Topic(
        prompts=("The novel {name}", "My copy of {name}", "The second volume of {name}", "The audiobook of {name}"),
        names=("The Beekeeper's Atlas", "Letters to No One", "A Field of Bells", "The Tin Lighthouse", "Marrow Street",
               "What the Tide Kept", "The Patient Cartographer", "Ember and Ash", "Four Winters", "The Long Table"),
        aspects=("story", "prose", "heroine", "last chapter", "humour", "characters*", "illustrations*", "pace",
                 "first page"),
        words={"beautiful": 2, "masterly": 2, "enchanting": 1.75, "witty": 1.25, "tender": 1.25, "lively": 1,
               "readable": 0.75, "sound": 0.5, "odd": -0.25, "uneven": -0.5, "dry": -0.75, "muddled": -1,
               "shallow": -1, "flat": -1, "tiresome": -1.5, "pompous": -1.25, "unreadable": -2, "terrible": -2},
        remarks={
            "I missed my stop twice.": 1.75,
            "I turned the last page and began again.": 2,
            "My sister has hidden it so that I will sleep.": 1.5,
            "I have given away four copies by now.": 2,
            "I read whole pages aloud to the cat.": 1.25,
            "There is a sentence in it that I carry with me.": 1.5,
            "It has three parts and a map.": 0,
            "I borrowed it from the library.": 0,
            "It was printed on grey paper.": 0,
            "I left it on a bench on purpose.": -1.5,
            "It props up the short leg of our table now.": -1.75,
            "I fell asleep on every second page.": -1.25,
            "The author should apologise to the trees.": -2,
            "I skipped to the end and was none the wiser.": -1,
        },
        only={
            "readable": (SUBJECT, "prose", "story", "first page"), "unreadable": (SUBJECT, "prose", "last chapter"),
            "witty": (SUBJECT, "prose", "heroine", "characters*", "humour"), "muddled": (SUBJECT, "story", "last chapter"),
            "shallow": (SUBJECT, "story", "heroine", "characters*"), "pompous": (SUBJECT, "prose", "heroine", "first page"),
            "uneven": (SUBJECT, "pace", "prose", "humour", "illustrations*"),
        }),
    "concert": Topic(
        prompts=("The concert at {name}", "The choir at {name}", "The quartet at {name}", "The jazz evening at {name}"),
        names=("the Old Mill", "Saint Agnes", "the town hall", "the Blue Cellar", "the summer pavilion", "the opera house",
               "the railway museum", "the Lantern Room", "the harbour stage", "the school gym"),
        aspects=("singer", "violins*", "drums*", "sound", "encore", "programme", "pianist", "choir", "second half"),
        words={"glorious": 2, "dazzling": 2, "stirring": 1.75, "graceful": 1.25, "joyful": 1.5, "precise": 1,
               "spirited": 1, "steady": 0.5, "short": -0.25, "muffled": -0.75, "hasty": -0.75, "shrill": -1.25,
               "tired": -1, "careless": -1.25, "out of tune": -1.5, "painful": -1.75, "hopeless": -2, "ghastly": -2},
        remarks={
            "We stood and clapped until our hands hurt.": 2,
            "I hummed the last song for a week.": 1.5,
            "For once nobody coughed.": 1.25,
            "An old man beside me wept without hiding it.": 1.75,
            "They played on when the lights failed, and it was better still.": 2,
            "The children danced at the back.": 1,
            "The doors opened at seven.": 0,
            "We had seats on the left.": 0,
            "There were two pauses.": 0,
            "The best part was the silence after it.": -1.75,
            "I hid my face in the programme.": -1.25,
            "The pigeons left first, and we followed.": -1.75,
            "My ears rang until Tuesday.": -1.5,
            "I have heard better from a kettle.": -2,
        },
        only={
            "short": (SUBJECT, "encore", "programme", "second half"), "muffled": ("sound", "drums*", "choir", "violins*"),
            "shrill": ("singer", "violins*", "sound", "choir"), "out of tune": ("singer", "violins*", "choir", "pianist"),
            "hasty": (SUBJECT, "encore", "pianist", "drums*", "second half"),
            "steady": ("singer", "drums*", "pianist", "choir", "sound"), "tired": (SUBJECT, "singer", "pianist", "choir"),
        }),
    "thing": Topic(
        prompts=("My new kettle from {name}", "The umbrella from {name}", "The bicycle from {name}",
                 "The desk lamp from {name}", "The winter coat from {name}"),
        names=("Fenwick", "the flea market", "Bell and Daughters", "the old arcade", "Norden", "the market hall",
               "Kestrel Goods", "the corner shop", "Halloran", "the mail-order house"),
        aspects=("handle", "colour", "lid", "finish", "instructions*", "seams*", "switch", "price", "box"),
        words={"excellent": 2, "flawless": 2, "handsome": 1.25, "sturdy": 1.25, "handy": 1, "light": 0.75, "neat": 1,
               "usable": 0.5, "heavy": -0.25, "stiff": -0.5, "flimsy": -1.25, "crooked": -1, "dim": -0.75,
               "wobbly": -1, "useless": -2, "broken": -1.75, "dangerous": -2, "cheap": -0.75},
        remarks={
            "I cannot remember how we lived without it.": 2,
            "My neighbour bought one the same day.": 1.5,
            "It has outlived two winters and a toddler.": 1.75,
            "They mended a scratch for nothing.": 1.25,
            "It makes me happy each time I see it.": 1.75,
            "It fits in every cupboard.": 0.75,
            "It came on a Thursday.": 0,
            "I chose the grey one.": 0,
            "There is a leaflet in five languages.": 0,
            "It fell apart in the doorway.": -2,
            "I have glued it three times.": -1.5,
            "It smells of wet paint when it rains.": -1,
            "They would not take it back.": -1.25,
            "I keep it as a warning to others.": -1.75,
        },
        only={
            "sturdy": (SUBJECT, "handle", "lid", "seams*", "switch", "box"), "dim": ("colour", "finish"),
            "handy": (SUBJECT, "handle", "switch", "instructions*"), "light": (SUBJECT, "handle", "lid", "box"),
            "heavy": (SUBJECT, "handle", "lid", "box"), "stiff": ("handle", "lid", "switch"),
            "flimsy": (SUBJECT, "handle", "lid", "seams*", "switch", "box"), "wobbly": (SUBJECT, "handle", "lid", "switch"),
            "crooked": ("handle", "lid", "seams*", "switch"), "broken": ("handle", "lid", "switch", "box"),
            "dangerous": (SUBJECT, "handle", "switch", "lid"), "cheap": ("finish", "handle", "colour", "box"),
            "usable": (SUBJECT, "handle", "lid", "switch", "instructions*", "box"),
        }),
}


# --- Sentences: how each is written, and what it is worth ---

def _be(aspect: str) -> str:
    return f"the {aspect.removesuffix('*')} {'were' if aspect.endswith('*') else 'was'}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _strengthened(degree: str, value: float) -> float:
    """An adjective's value with a degree before it; nothing is better or worse than the best or worst."""
    return min(BEST, max(WORST, DEGREES[degree] * value))


class Writer:
    """Draws the sentences of one review; what it draws is worth about what the mood says."""

    def __init__(self, topic: Topic, mood: float, random: Random) -> None:
        self.topic, self.mood, self.random = topic, mood, random
        self.aspects = random.sample(topic.aspects, len(topic.aspects))  # each is spoken of once
        self.said: set[str] = set()

    def _near(self, options: dict[str, float]) -> str:
        """One that was not said yet, likelier the nearer its value is to the mood."""
        options = {text: value for text, value in options.items() if text not in self.said}
        weights = [exp(-1.2 * (value - self.mood) ** 2) + 0.002 for value in options.values()]
        text = self.random.choices(list(options), weights)[0]
        self.said.add(text)
        return text

    def _judged(self, aspect: str) -> tuple[str, float]:
        """An adjective that can be said of the aspect, with or without a degree, and its value."""
        t = self.topic
        word = self._near({w: value for w, value in t.words.items() if aspect in t.only.get(w, (aspect,))})
        value = t.words[word]
        degrees = ["truly "] if abs(value) > 1.5 else [d for d in DEGREES if d and (value < 0 or d != "a little ")]
        degree = self.random.choice(["", *degrees]) if self.random.random() < 0.6 else ""
        return degree + word, _strengthened(degree, value)

    def _both(self, one: str, two: str, joint: str) -> str:
        """Two judgements, joined by `and` if both are good or both bad, else by `but`."""
        (first, a), (second, b) = self._judged(one), self._judged(two)
        same = (a > 0) == (b > 0)
        clause = _be(two) + " " if joint == "clause" else ""
        return f"{first} and {clause}{second}" if same else f"{first}, but {clause}{second}"

    def opening(self) -> str:
        """The rest of the sentence that the prompt begins."""
        if self.random.random() < 0.7:
            return f" was {self._judged(SUBJECT)[0]}."
        return f" was {self._both(SUBJECT, SUBJECT, 'word')}."

    def sentence(self) -> str:
        one, two = self.aspects.pop(), self.aspects.pop()
        forms = [
            lambda: f"{_capital(_be(one))} {self._judged(one)[0]}.",
            lambda: f"{_capital(_be(one))} {self._both(one, two, 'clause')}.",
            lambda: f"{self.random.choice(INTROS)}, {_be(one)} {self._judged(one)[0]}.",
            lambda: f"I {self._near(FEELINGS)} the {one.removesuffix('*')}.",
            lambda: self._near(self.topic.remarks),
        ]
        return self.random.choices(forms, [3, 4, 2, 2, 4])[0]()

    def review(self) -> str:
        """The response to the prompt: two to four sentences."""
        return " ".join([self.opening(), *(self.sentence() for _ in range(self.random.choice([1, 2, 2, 3])))])


@cache
def _patterns(topic: str) -> tuple[re.Pattern, re.Pattern, re.Pattern]:
    """Of the opening, of a sentence about aspects, and of one about a feeling."""
    t = TOPICS[topic]
    judged = f"(?:{'|'.join(d for d in DEGREES if d)})?(?:{'|'.join(t.words)})"
    about = "|".join(_be(aspect).removeprefix("the ") for aspect in t.aspects)
    opening = re.compile(f"was ({judged})(?:,? (?:and|but) ({judged}))?")
    begin = f"(?:The|(?:{'|'.join(INTROS)}), the)"
    aspect = re.compile(f"{begin} (?:{about}) ({judged})(?:,? (?:and|but) the (?:{about}) ({judged}))?")
    feeling = re.compile(f"I ({'|'.join(FEELINGS)}) the (?:{'|'.join(a.removesuffix('*') for a in t.aspects)})")
    return opening, aspect, feeling


def _value_of(topic: str, judged: str) -> float:
    degree = next((d for d in DEGREES if d and judged.startswith(d)), "")
    return _strengthened(degree, TOPICS[topic].words[judged.removeprefix(degree)])


def sentence_value(topic: str, sentence: str, first: bool) -> float | None:
    """What a sentence is worth, the mean of its clauses; none where the grammar does not have it."""
    opening, aspect, feeling = _patterns(topic)
    if not first and (sentence + ".") in TOPICS[topic].remarks:
        return TOPICS[topic].remarks[sentence + "."]
    if not first and (match := feeling.fullmatch(sentence)):
        return FEELINGS[match[1]]
    if match := (opening if first else aspect).fullmatch(sentence):
        values = [_value_of(topic, judged) for judged in match.groups() if judged]
        return sum(values) / len(values)
    return None


@cache
def topic_of(prompt: str) -> str | None:
    """Which topic a prompt names."""
    return next((name for name, topic in TOPICS.items() for form in topic.prompts for who in topic.names
                 if prompt == form.format(name=who)), None)


def score(prompt: str, response: str) -> float:
    """Mean value of the review's sentences, counted as two at least; one that is cut, foreign or said twice is −2."""
    topic = topic_of(prompt)
    if topic is None:
        return UNREADABLE
    *sentences, rest = response.strip().split(".")
    values, seen = [], set()
    for i, sentence in enumerate(part.strip() for part in sentences):
        value = None if sentence in seen else sentence_value(topic, sentence, first=i == 0)
        values.append(UNREADABLE if value is None else value)
        seen.add(sentence)
    if rest.strip() or not sentences:
        values.append(UNREADABLE)
    return sum(values) / max(2, len(values))


def gold(prompts: list[str], responses: list[str]) -> list[float]:
    """The judge: what the grammar knows of each response, from −2 to 2."""
    return [score(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


# --- The files ---

def _prompts(random: Random) -> list[str]:
    """All prompts there are, in random order."""
    prompts = [form.format(name=name) for topic in TOPICS.values() for form in topic.prompts for name in topic.names]
    random.shuffle(prompts)
    return prompts


def _review(prompt: str, random: Random) -> str:
    return Writer(TOPICS[topic_of(prompt)], random.gauss(-0.1, 1.1), random).review()


def _spoiled(prompt: str, review: str, random: Random) -> str:
    """A review with one thing wrong: said twice, cut off, a word missing, moved or foreign, or a sentence off topic."""
    words = review.split(" ")
    other = random.choice([name for name in TOPICS if name != topic_of(prompt)])
    foreign = Writer(TOPICS[other], random.gauss(0, 1.1), random).sentence()
    at = random.randrange(2, len(words))
    match random.randrange(6):
        case 0:
            return review + " " + _capital(random.choice(review.strip().removesuffix(".").split(". "))) + "."
        case 1:
            return " ".join(words[:at])
        case 2:
            return " ".join(words[:at] + words[at + 1 :])
        case 3:
            words.insert(random.randrange(2, len(words)), words.pop(at))
            return " ".join(words)
        case 4:
            words[at] = random.choice(foreign.removesuffix(".").split(" "))
            return " ".join(words)
    return f"{review} {foreign}"


def _pair(prompt: str, random: Random) -> dict[str, str]:
    """Two reviews of one subject, three quarters of a point apart at least, the better one chosen."""
    while True:
        a, b = _review(prompt, random), _review(prompt, random)
        if random.random() < 0.5:
            b = _spoiled(prompt, a if random.random() < 0.5 else b, random)
        better, worse = sorted((a, b), key=lambda review: -score(prompt, review))
        if score(prompt, better) - score(prompt, worse) >= 0.75:
            return {"prompt": prompt, "chosen": better, "rejected": worse}


def files(seed: int = 2026) -> dict[str, list[dict[str, str]]]:
    """File name → rows. Held-out prompts and pairs combine subject and name as no training row does."""
    random = Random(seed)
    prompts = _prompts(random)
    heldout, training = prompts[:64], prompts[64:]
    demonstrations = [{"prompt": p, "completion": _review(p, random)} for p in random.choices(training, k=4000)]
    return {
        "demonstrations.jsonl": demonstrations,
        "pairs.jsonl": [_pair(p, random) for p in random.choices(training, k=3000)],
        "heldout_pairs.jsonl": [_pair(p, random) for p in random.choices(heldout, k=300)],
        "prompts.jsonl": [{"prompt": p} for p in training],
        "heldout_prompts.jsonl": [{"prompt": p} for p in heldout],
    }


if __name__ == "__main__":
    for file, rows in files().items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (Path(__file__).parent / file).write_text(text, encoding="utf-8")
        print(f"{file}: {len(rows)} lines")
