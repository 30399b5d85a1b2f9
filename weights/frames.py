"""Opinions, questions and news built from frames, and phrases: texts rare in old books and in an encyclopedia.

`made(texts, words, rng)` yields opinions and questions endlessly. Their words are drawn at random from lists that mix
praise, blame and neutral words, so a sentence may contradict itself; the teachers decide what it means. Names and
topics of questions come from running text, and one word in eight is any word of the teacher's vocabulary. No row of a
task was used.

`news(texts, words, rng)` yields news endlessly: of countries, companies, matches, machines and research.

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
PLACE = """
Africa|Asia|Europe|Afghanistan|Argentina|Australia|Austria|Baghdad|Bangkok|Bangladesh|Beijing|Belgium|Berlin|
Bolivia|Boston|Brazil|Britain|Brussels|Cairo|California|Canada|Chicago|Chile|China|Colombia|Congo|Cuba|Dallas|
Darfur|Delhi|Denmark|Detroit|Dublin|Egypt|England|Ethiopia|Finland|Florida|France|Frankfurt|Gaza|Geneva|Georgia|
Germany|Ghana|Greece|Haiti|Hong Kong|Houston|Hungary|Iceland|India|Indonesia|Iran|Iraq|Ireland|Islamabad|Israel|
Istanbul|Italy|Jakarta|Japan|Jerusalem|Jordan|Kabul|Kashmir|Kenya|Kuwait|Lebanon|Libya|London|Los Angeles|Madrid|
Malaysia|Mexico|Miami|Milan|Montreal|Morocco|Moscow|Mumbai|Nepal|Netherlands|New York|New Zealand|Nigeria|
North Korea|Norway|Pakistan|Paris|Peru|Philippines|Poland|Portugal|Prague|Rome|Russia|Rwanda|San Francisco|
Saudi Arabia|Scotland|Seattle|Seoul|Serbia|Shanghai|Singapore|Somalia|South Africa|South Korea|Spain|Sudan|Sweden|
Switzerland|Sydney|Syria|Taiwan|Tehran|Texas|Thailand|Tokyo|Toronto|Turkey|Uganda|Ukraine|Venezuela|Vienna|Vietnam|
Washington|Yemen|Zimbabwe
"""
COMPANY = """
Adobe|Airbus|Amazon|AMD|AOL|Apple|AT&T|Bank of America|Bayer|BMW|Boeing|BP|British Airways|Canon|Chevron|Cisco|
Citigroup|Coca-Cola|Comcast|Dell|Delta Air Lines|Deutsche Bank|Disney|eBay|Ericsson|ExxonMobil|Fiat|Ford|Fujitsu|
General Electric|General Motors|Gillette|Goldman Sachs|Google|Hewlett-Packard|Hitachi|Home Depot|Honda|HSBC|Hyundai|
IBM|Intel|JP Morgan|Kmart|Lockheed Martin|Lufthansa|McDonald's|Merck|Microsoft|Mitsubishi|Morgan Stanley|Motorola|
Nestle|Nike|Nintendo|Nissan|Nokia|Novell|Oracle|Panasonic|PepsiCo|Pfizer|Philips|Procter & Gamble|Qualcomm|Red Hat|
Renault|Samsung|SAP|Sears|Shell|Siemens|Sony|Starbucks|Sun Microsystems|Target|Texas Instruments|Time Warner|
Toshiba|Toyota|UBS|Unilever|Verizon|Vodafone|Volkswagen|Wal-Mart|Yahoo|Yukos
"""
POWER = """
army|government|parliament|opposition|police|rebels|militants|senate|congress|supreme court|cabinet|ruling party|
ministry|coalition|junta|navy|air force|security forces|united nations|european union|red cross|peacekeepers|
separatists|protesters|refugees|aid workers|diplomats|election commission|border guards|intelligence service
"""
OFFICIAL = """
president|prime minister|foreign minister|defence minister|chancellor|king|ambassador|envoy|spokesman|spokeswoman|
general|senator|governor|mayor|judge|prosecutor|opposition leader|rebel leader|secretary general|candidate|lawmaker|
cleric|bishop
"""
STRIFE = """
car bomb|suicide attack|air strike|ambush|election|coup|earthquake|flood|hurricane|famine|ceasefire|peace deal|
hostage crisis|border dispute|riot|protest|referendum|siege|massacre|trial|typhoon|plane crash|train crash|fire|
treaty|nuclear programme|sanctions|summit|uprising|civil war|epidemic|kidnapping
"""
ACTED = """
attacked|freed|condemned|arrested|killed|rejected|approved|welcomed|accused|backed|elected|evacuated|surrounded|
warned|met|bombed|banned|released|threatened|blamed
"""
MARKET = """
shares|stocks|bonds|oil prices|crude futures|gold prices|profits|sales|orders|exports|revenues|earnings|
interest rates|wages|house prices|imports|quarterly results|the dollar|the euro|the yen|blue chips|
technology stocks|consumer spending|inflation|unemployment|retail sales|factory output|the trade deficit
"""
MOVED = """
rose|fell|jumped|slid|climbed|dropped|surged|tumbled|edged up|edged lower|doubled|halved|were flat|rallied|slipped|
recovered
"""
DEAL = """
merger|takeover|bankruptcy|buyout|price cut|job cuts|dividend|share sale|loan|lawsuit|settlement|contract|forecast|
stock split|joint venture|strike|audit|antitrust case|fraud inquiry|pension plan|profit warning|
initial public offering
"""
SPORT = """
football|soccer|baseball|basketball|ice hockey|tennis|golf|cricket|rugby|boxing|swimming|athletics|cycling|rowing|
skiing|gymnastics|formula one|horse racing|volleyball|wrestling|marathon
"""
TEAM = """
the Yankees|the Red Sox|the Cubs|the Giants|the Dodgers|the Braves|the Lakers|the Bulls|the Celtics|the Knicks|
the Pistons|the Spurs|the Cowboys|the Patriots|the Packers|the Eagles|the Steelers|the Raiders|the Rangers|
the Maple Leafs|the Canadiens|Arsenal|Chelsea|Liverpool|Manchester United|Everton|Celtic|Real Madrid|Barcelona|
Juventus|AC Milan|Inter Milan|Bayern Munich|Ajax|Porto|Notre Dame|Oklahoma|Michigan|Ohio State|Duke|Stanford|Kansas
"""
PLAYER = """
striker|goalkeeper|quarterback|pitcher|shortstop|captain|coach|manager|defender|midfielder|batsman|bowler|forward|
rookie|sprinter|swimmer|golfer|top seed|champion|referee|running back|catcher|driver|world number one
"""
MATCH = """
final|semifinal|opener|qualifier|derby|playoff|first round|quarterfinal|world cup|olympics|grand slam|open|
league game|one-day international|test match|season opener|super bowl|world series|cup tie|championship|grand prix|
relay
"""
SCORED = """
beat|defeated|lost to|drew with|routed|edged|upset|swept|held off|overcame|thrashed|shut out|outlasted|eliminated
"""
GADGET = """
browser|search engine|operating system|laptop|mobile phone|handset|music player|video game|console|chip|processor|
server|database|security hole|virus|worm|spam filter|web site|internet service|broadband network|wireless network|
digital camera|flat screen|hard drive|memory card|software update|open source program|patch|e-mail service|
online store|printer|supercomputer|satellite radio|file sharing network|instant messenger|plug-in|tablet|robot
"""
SCIENCE = """
spacecraft|space shuttle|rover|telescope|comet|asteroid|planet|moon|star|galaxy|rocket|satellite|fossil|dinosaur|
gene|genome|stem cell|protein|vaccine|cancer drug|virus|whale|bird|bee|coral reef|glacier|ozone layer|climate|
volcano|fuel cell|laser|atom|brain|skull|seed|black hole|solar flare|space station
"""
EXPERT = """
scientists|researchers|astronomers|biologists|engineers|doctors|physicists|archaeologists|hackers|programmers|
analysts|economists|geologists|developers|regulators|security experts|nasa|a university team
"""
DAY = """
monday|tuesday|wednesday|thursday|friday|saturday|sunday|today|yesterday|overnight|last week|this year|next month
"""
NUMBER = """
two three five six eight ten 12 15 20 25 30 40 50 60 80 100 120 200 300 500 700 1,000 2,500 10,000 2.5 4.1 7.3
"""
REPORTS = """
{power} {acted} the {official} of {place} on {day}
{power} in {place} {acted} {number} people after a {strife}
a {strife} in {place} killed at least {number} people on {day} , {power} said
the {official} of {place} {acted} {place} over the {strife}
the {official} said that the {strife} would not change the policy of {place}
{number} people were hurt in a {strife} near {place}
talks between {place} and {place} ended without a {strife}
{power} say they have {acted} {number} {power} in the north of {place}
thousands fled {place} as the {strife} spread
voters in {place} go to the polls on {day} after a {strife}
{name} , the {official} of {place} , {acted} the {power}
{place} marks {number} years since the {strife}
troops from {place} will leave {place} by {day}
{market} {moved} {number} percent on {day}
{market} {moved} as {market} {moved}
{company} said its {market} {moved} {number} percent in the quarter
{company} will cut {number} jobs after a {deal}
{company} agreed to buy {company} for {money}
{company} denied reports of a {deal} with {company}
{company} named {name} as its chief executive on {day}
investors worry that a {deal} could hurt {company}
{market} in {place} {moved} on hopes for {market}
{company} faces a {deal} worth {money}
a {deal} at {company} sent its {market} to the lowest level in {number} months
the central bank of {place} left interest rates unchanged on {day}
{place} 's economy grew by {number} percent , {expert} said
{company} raised its {deal} to {money}
{team} {scored} {team} {score} on {day}
{team} {scored} {team} in the {match}
{name} scored {number} points as {team} {scored} {team}
{name} won the {match} in {place} on {day}
{place} {scored} {place} {score} in the {sport} {match}
{team} signed {player} {name} from {team} for {money}
{player} {name} will miss the {match} with a knee injury
{name} hit a home run as {team} {scored} {team} {score}
the {player} of {team} said he would retire after the {match}
{name} takes the lead in the {sport} {match} in {place}
{team} fired their {player} on {day} after {number} defeats
{place} won {number} medals in {sport} at the {match}
{sport} : {name} {scored} {name} in the {match}
fans cheered as {name} {scored} the {player} from {place}
{company} released a new {gadget} on {day}
{company} unveils {gadget} for {company} users
{company} and {company} will work together on a {gadget}
a flaw in the {gadget} of {company} lets attackers read files , {expert} said
{expert} found a {gadget} that spreads by e-mail
users can now download the {gadget} of {company} for free
{company} sues a maker of {gadget}s over a patent
a {gadget} for less than {money} goes on sale on {day}
the next {gadget} will be {number} times faster , {company} says
{number} million people use a {gadget} , a survey says
{expert} have found a {science} that is {number} million years old
{expert} say a {science} may help to explain a {science}
nasa will launch a {science} on {day}
pictures from a {science} show a {science}
a new study of the {science} surprises {expert}
the {science} has been seen for the first time near {place}
{expert} warn that the {science} is changing faster than expected
a {science} passed {number} miles from the earth on {day}
{expert} in {place} have built a {gadget} that is {adj}
a court in {place} sentenced {name} to {number} years
the {thing} by {name} opened in {place} on {day}
{name} , {person} and {person} , died on {day} . he was {number}
""".strip().splitlines()
STARTS = ("", "", "", "", "{place} - ", "{place} ( reuters ) - ", "{place} , {place} ( ap ) - ", "{day} : ")
NEWS_KINDS = {  # apart from KINDS, whose words also make phrases
    kind: [w.strip() for w in words.split("|")] if "|" in words else words.split()
    for kind, words in dict(
        place=PLACE, company=COMPANY, power=POWER, official=OFFICIAL, strife=STRIFE, acted=ACTED, market=MARKET,
        moved=MOVED, deal=DEAL, sport=SPORT, team=TEAM, player=PLAYER, match=MATCH, scored=SCORED, gadget=GADGET,
        science=SCIENCE, expert=EXPERT, day=DAY, number=NUMBER,
    ).items()
}  # fmt: skip


def filler(texts, words, rng):
    """Return a function that draws a frame and fills it. Names and nouns come from the texts."""
    names = [n for t in texts for n in re.findall(r"(?<=[a-z,] )(?:[A-Z][a-z]+ ?){1,3}(?<! )", t)]
    nouns = [n for t in texts for n in re.findall(r"\b(?:the|a|of) ([a-z]{3,})\b", t)]

    def drawn(among):
        return among[rng.integers(len(among))]

    def word(slot):
        kind = slot[1]
        if kind == "name":
            return drawn(names)
        if kind == "letters":
            return " ".join("abcdefghijklmnopqrstuvwxyz"[i] for i in rng.integers(26, size=rng.integers(2, 5)))
        if kind == "noun":
            return drawn(nouns)
        if kind == "money":
            return " ".join(map(drawn, (NEWS_KINDS["number"], ("million", "billion"), ("dollars", "euros", "pounds"))))
        if kind == "score":
            return f"{rng.integers(0, 9)}-{rng.integers(0, 9)}"
        if kind in NEWS_KINDS:
            return drawn(NEWS_KINDS[kind])
        return drawn(words if rng.random() < 0.125 else KINDS[kind])

    return lambda frames: re.sub(r"\{(\w+)\}", word, drawn(frames))


def made(texts, words, rng):
    """Yield opinions and questions alternately. texts: some running text; words: the teacher's vocabulary."""
    sentence = filler(texts, words, rng)
    dots = (" .", " .", ".", " !", "")
    while True:
        parts = [sentence(OPINIONS)]
        while len(parts) < 4 and rng.random() < 0.4:
            parts += [JOINTS[rng.integers(len(JOINTS))], sentence(OPINIONS)]
        yield "".join(parts) + dots[rng.integers(len(dots))]
        yield sentence(QUESTIONS)


def news(texts, words, rng):
    """Yield news of one to three sentences, whose frames stand near each other. texts, words: as for `made`."""
    sentence = filler(texts, words, rng)
    while True:
        at = rng.integers(len(REPORTS))
        parts = [sentence(REPORTS[max(0, at - 6) : at + 7]) for _ in range(rng.integers(1, 4))]
        yield sentence(STARTS) + " . ".join(parts) + (" ." if rng.random() < 0.7 else "")


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
