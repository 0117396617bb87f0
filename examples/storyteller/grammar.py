"""A generator of short children's stories: whoever is named keeps name, sex and temper; things keep
their looks; problems are solved by what was there before. Seeded: the same seed, the same stories.

    python3 grammar.py [--seed N] [--count N]     prints stories, an empty line between two
"""
import argparse
import random

import words as w


def a(phrase):
    """With its indefinite article."""
    return ("an " if phrase[0] in "aeiou" or phrase.startswith("honest") else "a ") + phrase


def capital(sentence):
    return sentence[0].upper() + sentence[1:]


class Someone:
    """A person or an animal, with pronouns. The full form stands where they are introduced."""

    def __init__(self, rng, kind=None):
        kind = kind or rng.choice(["girl", "boy", "animal", "animal", "elder"])
        self.kind = kind
        self.temper = rng.choice(w.TEMPERS)
        self.call = None
        she = rng.random() < 0.5
        if kind in ("girl", "boy"):
            she = kind == "girl"
            self.name = rng.choice(w.GIRLS if she else w.BOYS)
            self.full = a(self.temper + " " + kind) + " named " + self.name
            self.plain = "the " + kind
        elif kind == "animal":
            self.species = rng.choice(w.ANIMALS)
            self.name = rng.choice(w.PETS)
            size = rng.choice(w.SIZES + [""] * 10)
            self.full = a((size + " " if size else "") + self.temper + " " + self.species)
            self.full += " named " + self.name
            self.plain = "the " + self.species
        else:
            job = rng.choice(w.ELDERS)
            she = she and job not in ("king", "prince", "fisherman", "fireman", "mailman", "postman",
                                      "policeman", "ferryman", "watchman", "wizard", "knight")
            she = she or job == "queen"
            self.name = "the " + rng.choice(["old ", "young ", ""]) + job
            self.full = a(self.name[4:]) + " who was very " + self.temper
            self.plain = self.name
            self.call = self.name[4:]
        self.call = self.call or self.name
        self.he, self.him, self.his = ("she", "her", "her") if she else ("he", "him", "his")
        self.himself = "herself" if she else "himself"
        self.He, self.His = capital(self.he), capital(self.his)
        self.Name = capital(self.name)

    def __str__(self):
        return self.name


class Thing:
    """Something that can be lost: with its looks, in singular or plural."""

    def __init__(self, rng, looks):
        self.many = rng.random() < 0.15
        self.noun = rng.choice(w.PAIRS if self.many else w.THINGS)
        self.look = rng.choice(looks)
        self.they, self.it = ("they", "them") if self.many else ("it", "it")
        self.broke, self.broken = ("tore", "torn") if self.noun in w.CLOTH else ("broke", "broken")
        self.was, self.is_ = ("were", "are") if self.many else ("was", "is")
        phrase = self.look + " " + self.noun
        self.full = "a pair of " + phrase if self.many else a(phrase)
        self.named = phrase

    def __str__(self):
        return self.named


class Teller:
    """A story being told: what is known (slots of the templates) and what has been said."""

    def __init__(self, rng, **slots):
        self.rng, self.slots, self.said = rng, slots, []

    def say(self, *templates, **more):
        """One of the sentences, filled in. How things are said changes from sentence to sentence."""
        self.slots.update(
            kindly=self.rng.choice(w.KINDLY), sadly=self.rng.choice(w.SADLY),
            adverb=self.rng.choice(w.ADVERBS))
        sentence = self.rng.choice(templates).format(**self.slots, **more)
        if sentence:
            self.said.append(capital(sentence))


OPENINGS = [
    "Once upon a time there was {h.full}.",
    "Once there was {h.full}, who lived {home}.",
    "One {weather} {time}, {h.full} went for a walk {place}.",
    "Long ago, {home}, there lived {h.full}.",
    "There once was {h.full}. {h.He} lived {home} with {h.his} {kin}.",
    "This is the story of {h.full}.",
    "Far away, {home}, lived {h.full}.",
    "Once upon a time {h.full} lived {home}.",
    "{Home} there lived {h.full}.",
]
ELDERS_OPENINGS = [
    "{h.Name} lived {home} and was very {h.temper}.",
    "{h.Name} was very {h.temper}, and everybody {home} knew {h.him}.",
    "{h.Name} lived {home} with {h.his} {kin}. {h.He} was very {h.temper}.",
]
HABITS = [
    "{h.He} liked to {hobby}, and {h.he} liked {foods}.",
    "Every {time} {h.he} liked to {hobby}.",
    "Nothing made {h.him} as {feeling} as {hobbying}.",
    "{h.He} was always {hobbying}, even when it was {weather}.",
    "Everyone said that {h.name} was the most {h.temper} {kind} {home}.",
    "What {h.he} loved most was {hobbying} with {h.his} {kin}.",
]
OWNING = [
    "{h.Name} had {t.full}. {h.His} {kin} had given {t.it} to {h.him}.",
    "{h.His} greatest treasure was {t.full}.",
    "{h.He} owned {t.full}, and {h.he} took {t.it} along wherever {h.he} went.",
    "On {h.his} birthday {h.he} got {t.full} from {h.his} {kin}.",
]
MEETING = [
    "There {h.he} met {f.full}.",
    "On the way {h.he} met {f.full}.",
    "Just then {f.full} came along.",
    "After a while {h.he} saw {f.full} sitting under {tree}.",
]
GREETING = [
    "\"Good {part},\" said {f.name} {kindly}. \"Why are you so {sad}?\"",
    "\"What is the matter, {h.call}?\" asked {f.name}.",
    "\"You look {sad},\" said {f.name}. \"Can I help you?\"",
    "\"Hello, {h.call}!\" called {f.name}. \"What has happened?\"",
]
THANKS = [
    "\"Thank you, {f.call}!\" said {h.name}. \"You are a true friend.\"",
    "{h.Name} hugged {f.name} and thanked {f.him} {kindly}.",
    "\"Without you I would not have made it,\" said {h.name} {kindly}.",
    "{h.Name} was so {glad} that {h.he} gave {f.name} {reward}.",
    "As a thank-you, {f.name} got {reward} from {h.name}.",
]
EVENINGS = [
    "Then they went home together and ate {foods}.",
    "They laughed and danced until the stars came out.",
    "At home {h.he} told {h.his} {kin} everything, and they all ate {foods}.",
    "That night {h.name} fell asleep with a smile.",
]
MORALS = [
    "From that day on, {h.name} and {f.name} were the best of friends.",
    "And {h.name} learned that {lesson}.",
    "{h.Name} never forgot what {f.name} had done for {h.him}.",
    "And if you go there on {a_weather} day, you may still see them {hobbying}.",
]
CLOSINGS = ["The end.", "And they lived happily ever after.", "And that was that.", ""]


def lost(tell):
    """A thing is lost, looked for, and found in the last of three places."""
    s0, s1, s2 = tell.rng.sample(w.HIDING, 3)
    tell.slots.update(s0=s0, s1=s1, s2=s2, S2=capital(s2))
    tell.say(*OWNING)
    tell.say("But one {time} the {t.noun} {t.was} gone.",
             "One {weather} {time}, {h.he} could not find {t.it} anywhere.",
             "Then, on a {weather} {time}, {h.he} lost {t.it} {place}.")
    tell.say("{h.He} looked {s0}, but the {t.noun} {t.was} not there.",
             "First {h.he} searched {s0}. Nothing!",
             "{h.Name} was {sad}. {h.He} looked {s0}, but in vain.")
    tell.say(*MEETING)
    tell.say(*GREETING)
    tell.say("\"I have lost my {t.noun},\" said {h.name}.",
             "\"My {t} {t.is_} gone,\" answered {h.name} {sadly}.",
             "\"I cannot find my {t},\" sighed {h.name}.")
    tell.say("\"Let us look {s1},\" said {f.name}. But there was nothing but {foods}.",
             "\"Did you look {s1}?\" asked {f.name}. They looked, but found nothing.",
             "So they searched together, first {s1} and then {s2}.")
    tell.say("At last {f.name} looked {s2}, and there {t.was} the {t}!",
             "Then {h.name} saw something {t.look} {s2}. It was the {t.noun}!"
             if not tell.slots["t"].many else "And {s2} they found the {t.noun}!",
             "And where {t.was} the {t.noun}? {S2}!")


def broken(tell):
    """Something breaks and is mended."""
    thing = tell.slots["t"]
    tools = w.SEWING if thing.noun in w.CLOTH else w.TOOLS
    tool = tell.rng.choice(list(tools))
    who = tell.rng.choice(["{f.He}", "Together they", "{f.Name} and {h.name}"])
    tell.slots.update(tool=tool, mended=tools[tool].format(it=thing.it))
    tell.say(*OWNING)
    tell.say("One {time} {h.he} stumbled over {stumble}, and the {t.noun} {t.broke}.",
             "But one {weather} {time} the {t.noun} fell down with a {crash}. Now {t.they} {t.was} "
             "{t.broken}.",
             "Then came {danger}. {Crash}! The {t} {t.was} {t.broken}.")
    tell.say("{h.Name} was very {sad} and began to cry.",
             "\"Oh no!\" cried {h.name}. \"What shall I do now?\"",
             "{h.He} sat down under {tree} and felt {sad}.")
    tell.say(*MEETING)
    tell.say(*GREETING)
    tell.say("\"My {t.noun} {t.broke},\" said {h.name} {sadly}.",
             "{h.Name} showed {f.him} the {t.noun}.")
    tell.say("\"That can be mended,\" said {f.name} and took out {tool}.",
             "\"Do not worry,\" said {f.name}. \"I have {tool} at home.\"")
    tell.say(who + " {mended}, and soon the {t.noun} {t.was} as good as new.")


STUCK = [
    ("high up in {tree}", "leaned a long ladder against the trunk"),
    ("at the bottom of a deep hole", "let down a strong rope"),
    ("on a rock in the middle of the water", "came with a little boat"),
    ("behind a heavy door", "found the key under the mat"),
    ("in the thick mud", "laid a broad plank across"),
    ("on the edge of the roof", "brought a tall stool and a basket"),
    ("among the thorns", "cut a path with a pair of scissors"),
]


def stuck(tell):
    """Somebody cannot get down or out, and is helped."""
    where, way = tell.rng.choice(STUCK)
    tell.slots.update(where=where.format(**tell.slots), way=way)
    tell.say("One {weather} {time}, while {hobbying}, {h.he} went too far.",
             "One {time} {h.he} wanted to {hobby} {place}.",
             "But {h.he} was so {h.temper} that {h.he} did not watch out for {danger}.")
    tell.say("Suddenly {h.he} was {where} and could not move.",
             "With a {crash} {h.he} ended up {where}.",
             "Before long {h.name} sat {where}, and {h.he} was {sad}.")
    tell.say("\"Help!\" cried {h.name}. \"Please help me!\"",
             "{h.He} called {sadly}, but nobody came for a long time.",
             "\"Is anybody there?\" called {h.name} {sadly}.")
    tell.say("{f.full} heard {h.him} and came running.",
             "Luckily {f.full} was not far away.",
             "Then {f.full} came by and stopped in surprise.")
    tell.say("\"Hold on, {h.call}!\" shouted {f.name}. \"I am coming!\"",
             "\"Do not be {sad},\" said {f.name}. \"I have an idea.\"",
             "\"How did you get there?\" asked {f.name}.")
    tell.say("{f.Name} {way}, and step by step {h.name} came back to safety.")


def storm(tell):
    """A storm, and shelter with somebody."""
    tell.say("One {time} {h.he} was {hobbying} when dark clouds came up.",
             "While {h.he} was {hobbying}, it began to rain harder and harder.",
             "One {part} a storm came over the hills with a {storm}.")
    tell.say("{h.Name} was wet and {sad}, and the way home was long.",
             "The wind blew so hard that {tree} fell across the path.",
             "{h.He} could not see the path any more.")
    tell.say(*MEETING)
    tell.say("\"Come in, {h.call}, it is warm in my house,\" said {f.name}.",
             "\"Quick, follow me!\" said {f.name}. \"I know a dry place.\"",
             "\"You are shaking,\" said {f.name} and put a blanket around {h.him}.")
    tell.say("They sat by the fire, ate {foods} and listened to the rain.",
             "Inside there was a stove and a pot full of {foods}.",
             "{f.He} told stories until the storm was over.")
    tell.say("In the morning the sun came out, and the {flowers} were shining like jewels.",
             "When the sky was {clear} again, a rainbow stood over the {flowers}.",
             "Soon the wind lay down, and the birds sang in {tree}.",
             clear=tell.rng.choice(["blue", "clear", "bright"]))


def hungry(tell):
    """Somebody has nothing to eat; somebody shares."""
    food, other = tell.rng.sample(w.FOODS, 2)
    tell.slots.update(food=food, other=other)
    tell.say("One {time} there was nothing left to eat, not even {other}.",
             "One {weather} {time}, {h.name} was so hungry that {h.his} belly growled.",
             "In that year the winter was long, and {h.name} had only {number} {crumbs} left.",
             crumbs=tell.rng.choice(["crumbs", "nuts", "beans", "spoons of flour"]))
    tell.say("So {h.he} went out to look for {food}.",
             "{h.He} dreamed of {food} all day long.",
             "\"If only I had some {food},\" said {h.name} {sadly}.")
    tell.say(*MEETING)
    tell.say("{f.He} had a basket full of {food}.",
             "{f.Name} was just eating {food}.",
             "In {f.his} bag there was plenty of {food}.")
    tell.say("\"Take half of it,\" said {f.name} {kindly}.",
             "\"Sit down with me,\" said {f.name}. \"There is enough for both of us.\"",
             "\"I do not want to share,\" said {f.name} at first, but then {f.he} saw how {sad} "
             "{h.name} was.")
    tell.say("They ate the {food} together, and nothing had ever tasted so good.",
             "Soon {h.name} was full, and the birds got the rest of the {food}.")


CONTESTS = ["a race", "a singing contest", "a cooking contest", "a boat race", "a snail race",
            "a riddle contest", "a sled race", "a dancing contest", "a spelling contest", "a parade"]


def contest(tell):
    """A contest, and something that matters more."""
    what = tell.rng.choice(CONTESTS)
    tell.slots.update(what=what, the="the " + what[2:])
    tell.say("One {time} there was {what} {place}, and {h.name} wanted to win.",
             "In the {season} everyone came together for {what}.",
             season=tell.rng.choice(["spring", "summer", "autumn", "winter"]))
    tell.say("{h.He} practised for {number} days until {h.he} was {feels}.",
             "\"You are much too {h.temper} for that,\" said {h.his} {kin}.",
             "\"I will never win,\" thought {h.name} and was {sad}.",
             feels=tell.rng.choice(w.FEELINGS))
    tell.say("At the start stood {f.full}.",
             "The strongest of all was {f.full}.",
             "Next to {h.him} stood {f.full}.")
    tell.say("In the middle of {the} {f.name} fell over {stumble}.",
             "{f.Name} was far ahead, but then {f.he} hurt {f.his} foot.",
             "Suddenly there was a {crash}, and {f.name} stood still and looked {sad}.")
    tell.say("{h.Name} could have won now. But {h.he} stopped and helped {f.him} up.",
             "\"Winning is not everything,\" said {h.name} and went back to {f.him}.",
             "{h.He} forgot the prize and ran to help {f.name}.")
    tell.say("So they came in last, hand in hand, and everybody cheered.",
             "In the end both of them got a prize: {reward}.",
             "The {judge} said that this was the finest victory of all.",
             judge=tell.rng.choice(["judge", "mayor", "crowd", "teacher"]))


def gift(tell):
    """A present is made for somebody's birthday."""
    kin = tell.slots["kin"]
    tell.slots.update(whom=tell.slots["h"].his + " " + kin,
                      kin_his="her" if kin in ("grandmother", "mother", "aunt", "sister") else "his")
    tell.say("Soon it was the birthday of {whom}, and {h.name} had no present.",
             "One {time} {h.he} wanted to make a present for {whom}.")
    tell.say("{h.He} counted {h.his} coins: only {number}. That was not enough for {t.full}.",
             "In the shop window there was {t.full}, but it was much too dear.")
    tell.say(*MEETING)
    tell.say(*GREETING)
    tell.say("\"I need a present and have no money,\" said {h.name}.",
             "{h.Name} told {f.him} about the birthday.")
    tell.say("\"The best presents are made with your own hands,\" said {f.name}.",
             "\"Then let us make one,\" said {f.name} {kindly}. \"I will show you how.\"")
    tell.say("So they picked {flowers}, packed {foods} and tied everything up with {a_colour} ribbon.",
             "They worked for {number} hours, and then it was done: {t.full}, all made by hand.",
             "Out of paper, leaves and {flowers} they made a wonderful picture.")
    tell.say("{h.His} {kin} had tears of joy in {kin_his} eyes.",
             "\"This is the nicest present I ever got,\" said {h.his} {kin}.")


def secret(tell):
    """A strange noise, and who made it."""
    tell.slots.update(spot=tell.rng.choice(w.HIDING), Full=capital(tell.slots["f"].full))
    tell.say("One {part} {h.he} heard a strange {sound}.",
             "\"What was that?\" whispered {h.name}. There it was again: {a_sound}!",
             "It was {weather} and late, and from somewhere came {a_sound}.")
    tell.say("{h.He} was {sad}, but also curious.",
             "{h.Name} took {t.full} and went to look.",
             "\"I am not afraid,\" said {h.name} to {h.himself}, and {h.his} knees shook.")
    tell.say("{adverb} {h.he} looked {spot}.", "The {sound} came from something {spot}.",
             "{h.He} tiptoed along and listened. There was something {spot}.")
    tell.say("And who sat there? {Full}!",
             "It was no ghost at all. It was {f.full}!",
             "Two bright eyes looked at {h.him}. They belonged to {f.full}.")
    tell.say("\"I am sorry,\" said {f.name}. \"I only wanted to find some {foods}.\"",
             "\"Please do not tell anyone,\" said {f.name}. \"I am hiding from the cold.\"",
             "\"I was looking for a friend,\" said {f.name} {sadly}.")
    tell.say("{h.Name} laughed and brought {f.him} {foods}.",
             "\"Then stay with me,\" said {h.name}, and {f.name} was {glad}.")


PLOTS = [lost, lost, broken, broken, stuck, storm, hungry, contest, gift, secret]


def story(rng):
    h = Someone(rng, rng.choice(["girl", "boy", "animal", "elder", "girl", "boy", "animal"]))
    f = Someone(rng, rng.choice(["animal", "elder", "girl", "boy", "animal"]))
    while f.name == h.name or f.plain == h.plain:
        f = Someone(rng, "animal")

    def place():
        preposition, name = rng.choice(w.PLACES)
        return "%s the %s" % (preposition, name)

    plot = rng.choice(PLOTS)
    hobby, hobbying = rng.choice(w.HOBBIES)
    weather, sound, crash = rng.choice(w.WEATHERS), rng.choice(w.SOUNDS), rng.choice(w.CRASHES)
    home, looks = place(), w.COLOURS + w.FINE + ([] if plot is gift else w.WORN)

    tell = Teller(
        rng, h=h, f=f, t=Thing(rng, looks), home=home, Home=capital(home), place=place(), hobby=hobby,
        hobbying=hobbying, foods=rng.choice(w.FOODS), kin=rng.choice(w.KIN),
        kind={"girl": "child", "boy": "child", "animal": "creature", "elder": "person"}[h.kind],
        weather=weather, a_weather=a(weather), time=rng.choice(w.TIMES),
        part=rng.choice(["morning", "evening", "afternoon"]),
        feeling=rng.choice(["happy", "cheerful", "merry", "calm", "proud"]),
        sad=rng.choice(w.SAD), glad=rng.choice(w.GLAD), tree=a(rng.choice(w.TREES)),
        flowers=rng.choice(w.FLOWERS), danger=rng.choice(w.DANGERS),
        stumble=rng.choice(w.STUMBLES), sound=sound, a_sound=a(sound), number=rng.choice(w.NUMBERS),
        a_colour=a(rng.choice(w.COLOURS)), reward=rng.choice(w.REWARDS),
        crash=crash, Crash=capital(crash), storm=rng.choice(["roar", "howl", "rumble"]),
        lesson=rng.choice(w.LESSONS[plot.__name__]))
    tell.say(*OPENINGS + (ELDERS_OPENINGS if h.kind == "elder" else []))
    tell.say(*HABITS)
    plot(tell)
    if plot in (contest, secret):  # there it was the hero who helped
        tell.slots.update(h=f, f=h)
    tell.say(*THANKS)
    ending = rng.choice(["evening", "moral", "both"])
    if ending != "moral":
        tell.say(*EVENINGS)
    if ending != "evening":
        tell.say(*MORALS)
    tell.say(*CLOSINGS)
    return " ".join(tell.said)


def stories(seed, count):
    rng = random.Random(seed)
    for _ in range(count):
        yield story(rng)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prints stories, an empty line between two.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=3)
    options = parser.parse_args()
    print("\n\n".join(stories(options.seed, options.count)))
