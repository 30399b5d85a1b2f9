"""Opinions and questions built from frames, and phrases: texts that are rare in old books and in an encyclopedia.

`made(texts, words, rng)` yields opinions and questions endlessly. Their words are drawn at random from lists that mix
praise, blame and neutral words, so a sentence may contradict itself; the teachers decide what it means. Names and
topics of questions come from running text, and one word in eight is any word of the teacher's vocabulary. No row of a
task was used.

`phrases(words, rng)` yields a few words each, with links between them: any word of the vocabulary, or a word of the
lists. They are short, so a teacher reads many of them, and a student meets every word beside many others.
"""

import re

import numpy as np

ADJECTIVE = """
good bad great awful terrible wonderful excellent poor fine dull boring exciting thrilling tedious funny hilarious witty
clever stupid silly smart brilliant dreadful horrible lovely beautiful ugly charming annoying irritating delightful
pleasant unpleasant amusing moving touching sad gloomy cheerful warm cold cool fresh stale tired original predictable
inventive lazy clumsy graceful elegant crude vulgar subtle heavy light dark bright bleak grim sweet bitter sour sharp
blunt slow fast brisk long short endless brief bloated lean thin thick rich cheap expensive fair unfair honest
dishonest fake genuine sincere cynical cruel kind gentle harsh rough smooth clean dirty filthy tidy messy muddled clear
confusing simple complicated easy hard difficult convincing unconvincing believable absurd ridiculous sensible wise
foolish deep shallow hollow empty full flat lively lifeless energetic limp powerful weak strong feeble gripping
absorbing forgettable memorable unforgettable remarkable ordinary average mediocre decent adequate acceptable perfect
flawed flawless broken useless useful helpful hopeless hopeful disappointing satisfying frustrating rewarding
refreshing exhausting uplifting depressing inspiring inspired insipid bland tasty delicious disgusting fragrant smelly
noisy quiet loud soft comfortable uncomfortable cosy cramped spacious friendly rude polite impolite nasty nice generous
mean greedy modest pompous pretentious preachy earnest playful solemn serious mature childish sophisticated primitive
magical mechanical formulaic fashionable dated modern timeless classic new old overlong tight loose tense relaxed
frightening scary creepy harmless dangerous safe reliable unreliable sturdy flimsy accurate sloppy careful careless
thoughtful thoughtless sensitive insensitive compelling pointless meaningful meaningless ambitious bold brave timid
cowardly daring reckless affectionate spiteful tender sentimental sappy mawkish romantic erotic violent peaceful chaotic
overrated underrated wasted superb splendid magnificent marvellous fantastic incredible amazing stunning shoddy lousy
pathetic miserable atrocious abysmal appalling offensive inoffensive worthy worthless priceless masterly amateurish
"""
ADVERB = """
very really quite rather so too utterly completely totally hardly barely never always often sometimes rarely oddly
surprisingly strangely deeply truly simply merely painfully wonderfully terribly remarkably mildly slightly fairly
almost nearly consistently occasionally endlessly relentlessly genuinely hopelessly delightfully unbearably
"""
THING = """
film movie picture drama comedy thriller documentary cartoon sequel story novel book poem play song album concert show
series episode game meal breakfast dinner soup pizza coffee wine cake sandwich hotel room bed beach museum city village
train flight bus car bicycle phone laptop camera printer radio watch chair lamp kettle jacket dress shoe lecture course
lesson class school job office meeting doctor nurse dentist barber plumber driver waiter waitress manager shop service
restaurant cafe bar party wedding holiday trip tour garden park house flat kitchen view price quality delivery website
manual toy puzzle speech interview article essay painting statue building bridge team match race coach player season
law budget plan idea theory answer result performance debut remake adaptation biography musical western
"""
PART = """
acting plot script dialogue ending beginning pace music score songs photography direction cast hero heroine villain
characters jokes humour story style tone message dancing singing costumes effects action romance mystery suspense
atmosphere setting writing editing voices animation food sauce bread dessert service staff owner portions menu bill
bathroom shower bed sheets pillows carpet garden pool view noise smell colour shape size weight battery screen buttons
handle engine brakes seats instructions packaging teacher pupils chapters pictures language spelling chorus lyrics
drums guitar melody defence attack passing crowd weather traffic parking queue prices
"""
PERSON = """
director actor actress author singer drummer chef cook waiter teacher nurse doctor lawyer boss neighbour uncle aunt
mother father son daughter brother sister wife husband friend critic audience viewer reader guest host captain
goalkeeper coach pilot guide clerk mayor king queen soldier detective widow priest child boy girl stranger crowd
"""
FEEL = """
loved hated liked disliked enjoyed endured admired despised adored loathed recommended regretted forgot remembered
praised blamed bought returned missed avoided finished abandoned trusted doubted understood misunderstood needed wasted
survived treasured resented welcomed dreaded
"""
HAPPENED = """
laughed cried yawned slept smiled sighed gasped cheered booed clapped left stayed waited complained apologised danced
sang shivered blushed trembled frowned grinned groaned argued agreed
"""
OPINIONS = """
the {thing} is {adj}
the {thing} was {adv} {adj}
this is a {adj} {thing}
this is {adv} {adj}
a {adj} {thing}
a {adj} and {adj} {thing}
a {adj} , {adj} {thing} with {adj} {part}
{adj} , {adj} and {adj}
{adv} {adj} and {adv} {adj}
the {part} is {adj} and the {part} is {adj}
the {part} is {adj} , but the {part} is {adj}
the {part} could be more {adj}
the {part} is not {adj} at all
the {part} is neither {adj} nor {adj}
not {adj} , just {adj}
not a {adj} {thing} , but not a {adj} one either
too {adj} to be {adj}
so {adj} that i {happened}
more {adj} than {adj}
as {adj} as a {thing}
as {adj} as it is {adj}
less a {thing} than a {adj} {thing}
i {feel} the {part}
i {feel} this {adj} {thing}
i {feel} every minute of it
i {feel} it and so did my {person}
we {feel} the {adj} {part}
my {person} {happened} , and i {happened} too
my {person} found the {part} {adv} {adj}
the {person} is {adv} {adj}
the {person} gives a {adj} performance
the {person} has never been more {adj}
the {person} was {adj} to my {person}
nobody {happened} at this {adj} {thing}
everybody {happened} when the {person} {happened}
what a {adj} {thing}
what a {adj} way to spend an evening
how can a {thing} be this {adj} ?
it is {adj} , and that is all
it is {adj} in a {adj} way
it is {adv} {adj} for a {thing}
it could have been {adj} , but it is only {adj}
it wants to be {adj} and ends up {adj}
it begins {adj} and ends {adj}
it makes a {adj} {thing} look {adj}
it has a {adj} {part} and not much else
it has everything but {adj} {part}
it lacks {adj} {part}
it offers {adj} {part} and {adj} {part}
there is nothing {adj} about the {part}
there is something {adj} about this {thing}
there are {adj} moments , yet the whole is {adj}
despite the {adj} {part} , the {thing} is {adj}
with its {adj} {part} , this {thing} is {adv} {adj}
without the {adj} {part} it would be {adj}
if you like {adj} {part} , you will find it {adj}
one of the most {adj} things i have seen
the most {adj} {thing} of the year
the least {adj} {thing} of the week
never {adj} , always {adj}
only a {adj} {person} could make such a {adj} {thing}
a {thing} for {adj} people
a {thing} that is {adj} and {adj} at once
a {thing} that nobody {feel}
you will be {adj} by the end
you need a {adj} {person} to enjoy this {thing}
i would not call it {adj}
i expected something {adj} and got something {adj}
i have rarely been so {adj}
i am glad that i {feel} it
i am sorry that i {feel} it
i want my money back for this {adj} {thing}
i will come back for the {adj} {part}
i would recommend it to any {adj} {person}
the {adj} {part} makes up for the {adj} {part}
the {adj} {part} ruins a {adj} {thing}
the {person} and the {person} are {adj} together
{name} is {adv} {adj}
{name} makes a {adj} {thing}
""".strip().splitlines()
JOINTS = (" , but ", " , and ", " . ", " . ", " ; ", " , although ", " , because ", " , so ", " , yet ", " - ")
LINKS = """
, , and and of the a but not is was with to in for more than as too very no that it at about
"""
QUESTIONS = """
who was {name} ?
who wrote {name} ?
who invented the {noun} ?
who is the {person} of {name} ?
who was the first {person} in {name} ?
which {person} {happened} in {name} ?
what is a {noun} ?
what is the {noun} of {name} ?
what does the word {noun} mean ?
what does {letters} stand for ?
what {noun} is {adj} in {name} ?
what kind of {noun} is {adj} ?
what is the capital of {name} ?
what is the name of the {noun} in {name} ?
what {thing} did {name} make ?
what do you call a {adj} {noun} ?
what causes {noun} ?
what happened to {name} ?
what color is a {noun} ?
what was the cause of the {noun} in {name} ?
what is the difference between {noun} and {noun} ?
what are the {noun} of {name} ?
name a {adj} {noun} from {name}
name the {person} who {feel} {name}
where is {name} ?
where was {name} born ?
where does the {noun} come from ?
where can i find a {adj} {noun} ?
in which {noun} is {name} ?
what city has a {adj} {noun} ?
what country is {name} in ?
what river runs through {name} ?
when was {name} founded ?
when did {name} end ?
when is the {noun} ?
what year did {name} begin ?
what date was the {noun} ?
how many {noun} are there in {name} ?
how many people live in {name} ?
how much does a {noun} cost ?
how much {noun} is in a {noun} ?
how far is it from {name} to {name} ?
how old was {name} when the {person} {happened} ?
how long does a {noun} last ?
how tall is {name} ?
how fast is a {noun} ?
how do you make a {noun} ?
how does a {noun} work ?
how did {name} become {adj} ?
why is the {noun} {adj} ?
why did {name} fail ?
why do {noun} have {noun} ?
is the {noun} {adj} ?
did the {person} {feel} {name} ?
can a {noun} be {adj} ?
do you know what {letters} means ?
what percentage of {noun} are {adj} ?
what temperature does {noun} need ?
what number of {noun} did {name} have ?
tell me about the {noun} of {name}
""".strip().splitlines()
KINDS = {
    kind: words.split()
    for kind, words in dict(
        adj=ADJECTIVE, adv=ADVERB, thing=THING, part=PART, person=PERSON, feel=FEEL, happened=HAPPENED
    ).items()
}


def made(texts, words, rng):
    """Yield opinions and questions alternately. texts: some running text; words: the teacher's vocabulary."""
    names = [n for t in texts for n in re.findall(r"(?<=[a-z,] )(?:[A-Z][a-z]+ ?){1,3}(?<! )", t)]
    nouns = [n for t in texts for n in re.findall(r"\b(?:the|a|of) ([a-z]{3,})\b", t)]

    def word(slot):
        kind = slot[1]
        if kind == "name":
            return names[rng.integers(len(names))]
        if kind == "letters":
            return " ".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(26, size=rng.integers(2, 5)))
        if kind == "noun":
            return nouns[rng.integers(len(nouns))]
        among = words if rng.random() < 0.125 else KINDS[kind]
        return among[rng.integers(len(among))]

    def sentence(frames):
        return re.sub(r"\{(\w+)\}", word, frames[rng.integers(len(frames))])

    dots = (" .", " .", ".", " !", "")
    while True:
        parts = [sentence(OPINIONS)]
        while len(parts) < 4 and rng.random() < 0.4:
            parts += [JOINTS[rng.integers(len(JOINTS))], sentence(OPINIONS)]
        yield "".join(parts) + dots[rng.integers(len(dots))]
        yield sentence(QUESTIONS)


def phrases(words, rng):
    """Yield phrases of two to eight words. words: the teacher's vocabulary."""
    lists = np.array([w for kind in KINDS.values() for w in kind])
    links = [*[""] * 9, *LINKS.split()]  # nine of 34 are none
    while True:
        own = [
            lists[rng.integers(len(lists))] if rng.random() < 0.35 else words[rng.integers(len(words))]
            for _ in range(rng.integers(2, 9))
        ]
        yield " ".join(f"{links[rng.integers(len(links))]} {word}".strip() for word in own)
