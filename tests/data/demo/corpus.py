"""The demo model's training text: facts.txt, small talk, refusals, and template stories, as conversations.

One idea: every fact has one canonical answer and many wordings of its question. Some wordings are kept out of training
(`heldout`): those marked `!` in facts.txt, and a fixed tenth of the expanded ones. The rest are varied further at every
draw (case, politeness, typing mistakes). It knows nothing of tokens or tensors.
"""
import hashlib
import itertools
import os
import random
import re

HERE = os.path.dirname(os.path.abspath(__file__))

# ---- facts ----------------------------------------------------------------------------------------------------------

MACROS = {
    "what": ["what is {}", "what's {}", "what does {} mean", "explain {}", "define {}", "tell me about {}", "{}",
             "what do you know about {}", "what is meant by {}", "can you explain {}", "I want to know about {}",
             "I do not understand {}", "what exactly is {}", "give me a definition of {}"],
    "how": ["how do I {}", "how can I {}", "how to {}", "I want to {}", "what is the way to {}", "show me how to {}",
            "can I {}", "what do I do to {}", "help me {}", "I would like to {}", "tell me how to {}",
            "what should I type to {}", "how does one {}", "I need to {}", "{}", "is there a way to {}",
            "which command do I use to {}"],
    "flag": ["what does {} do", "what is {}", "what is {} for", "explain {}", "what does the {} flag do", "{}",
             "what is the {} flag", "how do I use {}", "what does {} mean", "tell me about {}", "meaning of {}",
             "what does the option {} do", "when do I use {}", "what is the flag {} for", "why would I use {}",
             "describe {}", "the {} option", "help with {}"],
    "cmd": ["what does gemrun {} do", "what is gemrun {}", "explain gemrun {}", "how do I use gemrun {}", "gemrun {}",
            "what does the {} command do", "what is the {} command", "tell me about gemrun {}", "what is {} for",
            "what is gemrun {} for", "explain the {} command", "how does gemrun {} work", "when do I use gemrun {}",
            "describe the command {}", "help with gemrun {}", "the {} command"],
    "slash": ["what does {} do", "what is {}", "explain {}", "{}", "what does {} do in the chat", "how do I use {}",
              "what is {} for", "tell me about {}", "what happens when I type {}", "the command {}",
              "when do I use {}", "describe {}"],
    "env": ["what does {} do", "what is {}", "explain {}", "{}", "what is {} for", "how do I use {}",
            "what does the variable {} do", "the environment variable {}", "what does {} mean", "tell me about {}",
            "what happens when I set {}", "what should {} be", "describe {}"],
    "exit": ["what does exit code {} mean", "exit code {}", "what is exit code {}", "why exit code {}",
             "gemrun ended with exit code {}", "what does the exit code {} tell me", "exit status {}",
             "the exit code is {}", "explain exit code {}", "return code {}", "it returned {}", "I got exit code {}",
             "what is exit status {}", "what does return code {} mean", "gemrun exited with {}", "code {}",
             "what does code {} mean", "error code {}"],
    "err": ["what does the error \"{}\" mean", "error: {}", "{}", "I get the error {}", "what does {} mean",
            "why do I get {}", "it says {}", "gemrun says {}", "how do I fix {}", "what is the error {}",
            "what can I do about {}", "the error {}", "I get \"{}\"", "the error message is {}", "help, {}"],
}

WHICH = {      # further readings of ?how, by the topic of the fact
    "flags": ["which flag lets me {}", "which flag do I need to {}", "is there a flag to {}", "what flag helps to {}"],
    "commands": ["which command lets me {}", "with which command can I {}", "what is the command to {}"],
    "chat": ["which slash command lets me {}", "what do I type in the chat to {}", "which chat command do I need to {}"],
    "environment": ["which variable lets me {}", "which environment variable do I set to {}"],
}

TALK = [  # (answer, questions, held-out questions)
    ("Hello! Ask me anything about gemrun.",
     ["hello", "hi", "hey", "hello there", "hi there", "good morning", "good evening", "good day", "hey there",
      "greetings", "hello demo", "hi gemrun", "hello gemrun", "howdy", "yo", "good afternoon",
      "hi everybody", "hello model", "hello you", "hi friend", "hello world", "hi bot", "hey you", "hello again", "hi again", "good to see you", "morning", "evening"], ["hey gemrun", "hi demo model"]),
    ("I am fine, thank you. Ask me anything about gemrun.",
     ["how are you", "how are you doing", "how is it going", "are you well", "how do you do", "what's up",
      "how are things", "are you ok", "how do you feel",
      "how are you now", "are you fine", "hello how are you doing", "hi, how are you", "how was your day", "how are you feeling", "you ok", "everything ok"], ["hello, how are you", "how are you today"]),
    ("You are welcome! Ask me more about gemrun if you like.",
     ["thanks", "thank you", "thank you very much", "thanks a lot", "many thanks", "thanks for your help", "thx",
      "great, thanks", "that helped", "ok thanks", "cool, thank you", "perfect, thank you", "that was helpful",
      "thanks for the answer",
      "thanks so much", "thank you, that helps", "thank you for your help", "very helpful", "thanks, bye", "much appreciated", "thanks again", "thank you again", "good answer", "well done", "great answer"], ["thank you so much", "good, thanks"]),
    ("Goodbye! Type /exit to leave the chat.",
     ["bye", "goodbye", "see you", "good night", "bye bye", "see you later", "I have to go", "until next time",
      "farewell", "ciao",
      "bye for now", "good bye", "see you soon", "thanks, goodbye", "that is all, bye", "I am leaving", "bye then", "so long"], ["ok bye", "goodbye then"]),
    ("Good. What else would you like to know about gemrun?",
     ["ok", "okay", "I see", "got it", "good", "great", "nice", "cool", "yes", "alright", "fine", "understood", "wow",
      "interesting", "sounds good", "perfect",
      "good to know", "ah ok", "ah I see", "all right", "I see, good", "makes sense", "clear", "ok good to know", "yeah", "right", "hm", "hmm"], ["ok, good", "I understand"]),
    ("I am sorry. Please ask in other words; I know only about gemrun.",
     ["that is wrong", "no", "that does not help", "this is not what I asked", "you are wrong", "bad answer",
      "I do not understand", "that makes no sense", "that was not my question", "what", "huh", "wrong",
      "you did not answer", "this is nonsense",
      "not true", "that is not right", "that's wrong", "no, that is wrong", "not helpful", "this is wrong", "incorrect", "I asked something else", "I meant something else", "try again in other words"], ["that answer is wrong", "not what I meant"]),
]

MORE = ["tell me more", "more", "go on", "continue", "what else", "can you say more", "more please",
        "tell me more about it", "and then", "more details", "say more", "anything else"]
NO_MORE = "That is all I know about it. Ask me something else about gemrun."

REFUSAL = "I only know about gemrun. Ask me about its commands, models or errors, or ask for a story."

# Follow-ups: after a fact of a family, "and X" means the fact of the same family for X.
FAMILIES = {
    "run": {"e2b": "run-e2b", "e4b": "run-e4b", "12b": "run-12b", "26b-a4b": "run-26b", "31b": "run-31b", "the mobile model": "run-mobile"},
    "mem": {"e2b": "mem-e2b", "e4b": "mem-e4b", "12b": "mem-12b", "26b-a4b": "mem-26b", "31b": "mem-31b", "the mobile model": "mem-mobile"},
    "size": {"e2b": "size-e2b", "e4b": "size-e4b", "12b": "size-12b", "26b-a4b": "size-26b", "31b": "size-31b"},
    "what": {"e2b": "e2b", "e4b": "e4b", "12b": "12b", "26b-a4b": "26b", "31b": "31b", "the mobile model": "mobile"},
    "flag": {"-n": "flag-n", "--temp": "flag-temp", "--top-k": "flag-top-k", "--top-p": "flag-top-p", "--min-p": "flag-min-p",
             "--seed": "flag-seed", "--ctx": "flag-ctx", "--threads": "flag-threads", "--system": "flag-system",
             "--think": "flag-think", "--raw": "flag-raw", "--kv": "flag-kv", "--kernel": "flag-kernel", "--stats": "flag-stats",
             "--repeat-penalty": "flag-repeat", "--ignore-eos": "flag-ignore-eos", "--hide-thinking": "flag-hide-thinking"},
    "exit": {str(c): f"exit-{c}" for c in (0, 1, 2, 3, 4, 5, 6, 10, 130)},
    "slash": {"/help": "slash-help", "/new": "slash-new", "/system": "slash-system", "/think": "slash-think",
              "/regen": "slash-regen", "/undo": "slash-undo", "/stats": "slash-stats", "/exit": "slash-exit"},
    "cmd": {"show": "cmd-show", "tokenize": "cmd-tokenize", "detokenize": "cmd-detokenize", "template": "cmd-template",
            "bench": "cmd-bench", "eval": "cmd-eval", "run": "cmd-run"},
}
AND = ["and {}", "what about {}", "and for {}", "how about {}", "and what about {}", "same for {}", "ok, and {}"]


class Fact:
    def __init__(self, id, topic, answer, keys, questions, heldout, more):
        self.id, self.topic, self.answer, self.keys = id, topic, answer, keys
        self.questions, self.heldout, self.more = questions, heldout, more      # heldout: [(question, kind)]


def expand(text):
    """All readings of {a|b} alternatives."""
    parts = re.split(r"\{([^{}]*\|[^{}]*)\}", text)
    choices = [p.split("|") if i % 2 else [p] for i, p in enumerate(parts)]
    return [re.sub(" +", " ", "".join(c)).strip() for c in itertools.product(*choices)]


def kept_out(id, question):
    """A fixed tenth of the wordings, chosen by hash so that it never changes with the order of the file."""
    return hashlib.sha256(f"{id}|{question}".encode()).digest()[0] < 26


def load_facts(path=os.path.join(HERE, "facts.txt")):
    facts, block = [], []

    def finish():
        if not block:
            return
        head = re.fullmatch(r"== (\S+) (\S+)", block[0])
        answer, keys, questions, hard, more = [], None, [], [], None
        for line in block[1:]:
            m = re.match(r"([?!=+])(\w*) (.*)", line)
            if line.startswith(("? ", "! ", "= ", "+ ")) or re.match(r"\?(%s) " % "|".join(MACROS), line):
                mark, macro, rest = m.groups()
                if mark == "=":
                    keys = [k.strip() for k in re.split(r", (?=\S)", rest)]
                elif mark == "+":
                    more = rest
                elif mark == "!":
                    hard.append(rest)
                elif macro == "":
                    questions += expand(rest)
                else:
                    for thing in (expand(rest) if macro in ("how",) else re.split(r", ", rest)):
                        frames = MACROS[macro] + (WHICH.get(head[2], []) if macro == "how" else [])
                        questions += [t.replace("{}", thing) for t in frames]
            else:
                answer.append(line)
        questions = list(dict.fromkeys(questions))
        out = [q for q in questions if kept_out(head[1], q)] if len(questions) > 4 else []
        train = [q for q in questions if q not in out]
        facts.append(Fact(head[1], head[2], " ".join(answer), keys, train, [(q, "variant") for q in out] + [(q, "new") for q in hard], more))
        block.clear()

    for line in open(path, encoding="utf-8"):
        line = line.rstrip("\n")
        if line.startswith("#") or not line.strip():
            continue
        if line.startswith("== "):
            finish()
        block.append(line)
    finish()
    for i, (answer, qs, hard) in enumerate(TALK):
        facts.append(Fact(f"talk-{i}", "talk", answer, None, list(qs), [(q, "new") for q in hard], None))
    # A wording belongs to one fact only; what is held out anywhere is trained nowhere.
    ids = [f.id for f in facts]
    assert len(set(ids)) == len(ids), [i for i in ids if ids.count(i) > 1]
    out = {q.lower() for f in facts for q, _ in f.heldout}
    seen = {}
    for f in facts:
        f.questions = [q for q in f.questions if q.lower() not in out and seen.setdefault(q.lower(), f.id) == f.id]
        assert f.more is None or f.more in ids, f.more
    owner = {}
    for f in facts:
        f.heldout = [(q, k) for q, k in f.heldout if owner.setdefault(q.lower(), f.id) == f.id and q.lower() not in seen]
    return facts


# ---- questions about other things -----------------------------------------------------------------------------------

THINGS = """apples bananas bread butter cheese coffee tea chocolate pizza soup cake wine beer pasta rice potatoes salad fish meat eggs
football tennis chess music the piano the guitar the weather history physics chemistry biology geography mathematics poetry art
dogs cats horses elephants lions whales birds spiders dinosaurs the moon the sun mars black holes gravity evolution democracy
economics inflation the stock market bitcoin love happiness philosophy religion the roman empire world war two napoleon shakespeare
mozart beethoven einstein newton picasso paris london berlin tokyo new york rome helsinki cairo the amazon the nile mount everest
python javascript java docker kubernetes photoshop excel windows 11 an iphone android a car a bicycle a train an airplane a ship
cancer the flu vitamins sleep yoga running swimming gardening roses trees the ocean volcanoes earthquakes electricity magnets
atoms dna the internet of things television movies star wars harry potter a novel the news taxes a mortgage insurance marriage
blockchain quantum computing nuclear power solar panels climate change recycling fashion perfume jewelry a garden a house""".replace("\n", " ")
THINGS = re.findall(r"(?:(?:the|a|an|black|stock|world war|new|mount|star|harry|quantum|nuclear|solar|climate|windows|roman|internet of) )*[\w]+", THINGS)
COUNTRIES = "france germany spain italy japan china india brazil canada mexico egypt kenya norway sweden finland poland greece turkey russia australia austria chile peru cuba iran vietnam thailand portugal ireland denmark england the world america".split(" ")
PEOPLE = "the president of america, the king of england, albert einstein, isaac newton, napoleon, cleopatra, the pope, the prime minister, elvis, marie curie, shakespeare, julius caesar, mozart, the queen, my mother, your father, a famous actor, taylor swift, messi".split(", ")
MAKE = "bake a cake, cook rice, make coffee, make bread, fix my car, learn french, lose weight, play the guitar, tie a tie, grow tomatoes, paint a wall, write a letter, find a job, become rich, sleep better, clean a window, train a dog, draw a horse, build a house, repair a bicycle, make friends, boil an egg, plant a tree, invest money, learn to swim, learn math, make pizza, sew a button, get a girlfriend, write a book, cook pasta, make a website".split(", ")
VERBS = "wrote hamlet, invented the telephone, discovered america, painted the mona lisa, won the world cup, built the pyramids, is the richest man, walked on the moon first, wrote harry potter, invented the wheel, founded rome, discovered penicillin, sang this song, won the election, invented the light bulb, wrote the bible".split(", ")
OFF = [("what is the capital of {}", COUNTRIES), ("how many people live in {}", COUNTRIES), ("where is {}", COUNTRIES), ("tell me about {}", COUNTRIES),
       ("what is the population of {}", COUNTRIES), ("who is the president of {}", COUNTRIES), ("capital of {}", COUNTRIES), ("what language do they speak in {}", COUNTRIES),
       ("what is {}", THINGS), ("tell me about {}", THINGS), ("do you like {}", THINGS), ("explain {}", THINGS), ("what do you think about {}", THINGS),
       ("how does {} work", THINGS), ("why is {} so popular", THINGS), ("write a poem about {}", THINGS), ("where can I buy {}", THINGS), ("what's {}", THINGS),
       ("what are {}", THINGS), ("give me facts about {}", THINGS), ("how much is {}", THINGS), ("what is the history of {}", THINGS), ("{}", THINGS),
       ("who is {}", PEOPLE), ("how old is {}", PEOPLE), ("when was {} born", PEOPLE), ("tell me about {}", PEOPLE), ("who was {}", PEOPLE),
       ("how do I {}", MAKE), ("how can I {}", MAKE), ("how to {}", MAKE), ("teach me to {}", MAKE), ("I want to {}", MAKE), ("help me {}", MAKE),
       ("who {}", VERBS), ("do you know who {}", VERBS), ("tell me who {}", VERBS)]
OFF_PLAIN = """what time is it; what day is today; what is the weather like; will it rain tomorrow; tell me a joke; sing a song; what is the meaning of life;
how far is the moon; how tall is mount everest; what is two plus two; what is 2 + 2; what is 7 times 8; solve x + 3 = 5; what is the square root of 16;
write a python program; write code for me; translate this to french; translate hello into german; how do you say cat in spanish; what should I eat today;
what is the best movie; recommend a book; recommend a restaurant; do you love me; will you marry me; what is your favourite colour; are you hungry;
what is the speed of light; why is the sky blue; why is the grass green; how many planets are there; when did the war end; what is the tallest building;
write an essay; write an email to my boss; summarise this article; play a game with me; let us play chess; what is my name; where do I live; where am I;
what is the news today; who will win the election; what is the price of gold; how do planes fly; asdf; qwerty; lorem ipsum; blah blah; xyz; foo bar; 123; 42;
is there a god; what happens after death; how do birds fly; what is a good name for a dog; can you see me; what am I thinking; flip a coin; pick a number;
name a colour; count to ten; say something; say hello in french; what is the largest animal; how deep is the sea; how old is the earth; why do cats purr""".replace("\n", " ").split("; ")


def off_topic():
    """(trained, held out) off-topic questions."""
    all_ = [t.replace("{}", x) for t, xs in OFF for x in xs] + OFF_PLAIN
    all_ = list(dict.fromkeys(all_))
    out = [q for q in all_ if hashlib.sha256(q.encode()).digest()[0] < 8]
    return [q for q in all_ if q not in set(out)], out


# ---- stories --------------------------------------------------------------------------------------------------------

ANIMALS = "fox dog cat bear mouse rabbit bird frog horse cow sheep duck owl wolf lion fish pig goat hen squirrel deer turtle bee penguin robot dragon boy girl king queen farmer sailor".split()
NAMES = "Tom Anna Ben Lily Max Mia Sam Lucy Tim Ella Leo Nora Jack Rosa Finn Ida".split()
KINDS = "little old clever brave kind shy hungry happy lazy young small grey".split()
PLACES = ["in a green forest", "by a quiet river", "on a small farm", "near a high hill", "in a warm house", "by the blue sea", "in a deep valley", "under a big tree"]
FOUND = ["a red apple", "a small key", "a shiny stone", "a lost ball", "a warm hat", "a blue flower", "a golden ring", "a piece of cheese", "an old book", "a tiny boat"]
FEEL = ["very happy", "a little sad", "very proud", "tired but happy", "very surprised", "no longer afraid"]
WEATHER = ["One sunny morning", "One rainy day", "One cold night", "One warm evening", "One day"]
END = ["They became good friends and shared it every day.", "So they played together until the sun went down.", "From that day on they were never alone.",
       "Then they went home and slept well.", "They laughed and walked home together.", "And they lived happily for a long time."]
STORY_ASK = ["tell me a story about {}", "write a story about {}", "a story about {}", "tell a story about {}", "can you tell me a story about {}",
             "please tell me a story about {}", "write a short story about {}", "I want a story about {}", "give me a story about {}", "story about {}"]
STORY_ANY = ["tell me a story", "write a story", "tell a story", "a story please", "can you tell me a story", "I want to hear a story", "write a short story",
             "story", "another story", "please tell me a story", "tell me another story", "give me a story"]


def article(w):
    return ("an " if w[0] in "aeiou" else "a ") + w


def story(r, hero=None):
    hero = hero or r.choice(ANIMALS)
    name, kind = r.choice(NAMES), r.choice(KINDS)
    friend = r.choice([a for a in ANIMALS if a != hero])
    it = r.choice(FOUND)
    thing = it.split(" ")[-1]
    first = r.choice([f"Once upon a time {article(kind)} {hero} called {name} lived {r.choice(PLACES)}.",
                      f"There was once {article(kind)} {hero} who lived {r.choice(PLACES)}. Its name was {name}."])
    second = r.choice([f"{r.choice(WEATHER)} the {hero} found {it}.", f"{r.choice(WEATHER)} {name} went for a walk and found {it}."])
    third = r.choice([f"\"Is this yours?\" {name} asked {article(r.choice(KINDS))} {friend}. \"Yes, thank you!\" said the {friend}.",
                      f"{article(friend).capitalize()} came by and looked at the {thing}. \"May I see it?\" asked the {friend}. \"Of course,\" said {name}.",
                      f"But the {thing} was too heavy to carry. {article(friend).capitalize()} saw it and helped {name}."])
    fourth = f"The {hero} was {r.choice(FEEL)}."
    return " ".join([first, second, third, fourth, r.choice(END)])


# ---- variation and conversations ------------------------------------------------------------------------------------

BEFORE = ["please tell me, ", "hello, ", "hi, ", "can you tell me, ", "I have a question: ", "quick question: ", "ok, ", "and ", "so ", "hey, ", "now tell me, ", "tell me, ", "sorry, ", "please, ", "question: ", "well, "]
AFTER = [" please", " in gemrun", ", please", " with gemrun", " exactly", ", do you know", " again"]
ENDS = ["?", "?", "?", "?", "", "", ".", " ?", "!"]


def typo(r, w):
    i = r.randrange(len(w))
    k = r.randrange(4)
    if k == 0:
        return w[:i] + w[i + 1:]
    if k == 1 and i + 1 < len(w):
        return w[:i] + w[i + 1] + w[i] + w[i + 2:]
    if k == 2:
        return w[:i] + w[i] + w[i:]
    return w[:i] + r.choice("abcdefghijklmnopqrstuvwxyz") + w[i + 1:]


def capital(q):
    return q[0].upper() + q[1:] if q[0].isalpha() else q


SAME = {   # words that may stand for each other in a question
    "show": ["display", "print", "show me"], "see": ["view", "look at", "get"], "use": ["employ", "work with", "apply"], "start": ["launch", "begin", "open"],
    "run": ["start", "launch", "use", "execute"], "set": ["change", "choose", "adjust"], "change": ["set", "alter", "modify"], "stop": ["halt", "end", "abort"],
    "big": ["large", "huge"], "large": ["big"], "fast": ["quick", "quickly"], "make": ["get", "create"], "get": ["have", "obtain", "receive"], "which": ["what"], "what": ["which"],
    "need": ["require", "want"], "explain": ["describe", "tell me about"], "memory": ["ram"], "ram": ["memory"], "file": ["model file", "gguf"], "model": ["gemma model"],
    "answer": ["reply", "response"], "answers": ["replies", "responses"], "text": ["output", "words"], "error": ["message", "problem"], "computer": ["machine", "pc", "laptop"],
    "machine": ["computer", "pc"], "says": ["tells me", "prints", "complains"], "measure": ["test", "check", "determine"], "question": ["prompt"], "prompt": ["question"],
    "chat": ["conversation", "dialogue"], "conversation": ["chat"], "can": ["could", "may"], "how": ["in what way"], "flag": ["option", "switch"], "option": ["flag", "switch"],
    "command": ["subcommand"], "gemrun": ["it", "the program", "this program"], "many": ["lots of"], "the": ["my", "a"], "my": ["the"], "I": ["we", "one"], "do": ["can", "should"],
    "mean": ["stand for", "say"], "is": ["would be"], "good": ["useful"], "write": ["print", "produce"], "compare": ["contrast"], "find": ["locate", "discover"],
    "download": ["fetch", "get"], "choose": ["pick", "select"], "hide": ["suppress", "not see"], "turn": ["switch"], "small": ["little", "tiny"], "smallest": ["tiniest", "lightest"]}
SMALL = set("the a an do does did is are was of for to can could I it me my in on with what how which when why would should be there that this you one tell give show explain please so and by".split())
LOOSE = ["question about {}", "something about {}", "{}, how", "{}, what is that", "info on {}", "about {}", "I have a problem with {}", "what about {}", "{} explained",
         "need help with {}", "say something on {}", "{} please", "my question is {}", "{} {}", "can you say what {} is", "is {} possible", "{} in short", "details on {}"]


def loosen(r, q):
    """The same question in fewer or other words: other verbs, dropped small words, or only the words that matter."""
    words = q.split(" ")
    x = r.random()
    if x < 0.45:
        for _ in range(r.choice([1, 1, 2])):
            at = [i for i, w in enumerate(words) if w in SAME]
            if at:
                i = r.choice(at)
                words[i] = r.choice(SAME[words[i]])
        return " ".join(words)
    if x < 0.65:
        return " ".join(w for w in words if w not in SMALL or r.random() < 0.6) or q
    core = " ".join(w for w in words if w not in SMALL)
    if not core:
        return q
    return core if x < 0.85 else r.choice(LOOSE).replace("{}", core)


def bare(q):
    """A question without case, final punctuation and spare spaces: what makes two questions the same."""
    return " ".join(q.lower().rstrip(" ?.!").split())


def ask(r, q, loose=0.3):
    """One way a person might type the question `q`."""
    while bare(typed := variation(r, q, loose)) in HELD_OUT:
        pass                                  # variation must not lead back to a question that is kept out
    return typed


HELD_OUT = set()


def variation(r, q, loose):
    if r.random() < loose:
        q = loosen(r, q)
    if r.random() < 0.2:
        q = r.choice(BEFORE) + q
    if r.random() < 0.1:
        q = q + r.choice(AFTER)
    words = q.split(" ")
    if r.random() < 0.15:                     # typing mistakes, in plain long words only: names and flags stay whole
        i = r.randrange(len(words))
        if len(words[i]) > 4 and words[i].isalpha() and words[i] != "gemrun":
            words[i] = typo(r, words[i])
    if len(words) > 3 and r.random() < 0.1:
        small = [i for i, w in enumerate(words) if w in ("the", "a", "an", "do", "does", "is", "of", "for", "to", "can", "I", "it")]
        if small:
            del words[r.choice(small)]
    q = " ".join(words)
    style = r.random()
    if style < 0.45:
        return capital(q) + ("?" if r.random() < 0.7 else "")
    if style < 0.75:
        return q.lower() + r.choice(ENDS)
    if style < 0.78:
        return q.upper() + "?"
    return q + r.choice(ENDS)


def plain(q):
    """The question as the evaluation asks it."""
    return capital(q) + ("" if q.endswith(("?", ".")) else "?")


SYSTEMS = ["You are a helpful assistant.", "You are terse.", "Answer briefly.", "You answer questions about gemrun.", "Be kind.", "You are an expert.", "Speak simply."]


class Corpus:
    """Draws conversations: lists of (role, text) with roles system, user, thought, model; or plain text."""

    def __init__(self):
        self.facts = load_facts()
        self.by_id = {f.id: f for f in self.facts}
        self.off, self.off_heldout = off_topic()
        taken = {q.lower() for f in self.facts for q in f.questions} | {q.lower() for f in self.facts for q, _ in f.heldout}
        self.off = [q for q in self.off if q.lower() not in taken]
        self.fresh = [l.rstrip("\n").split(" | ") for l in open(os.path.join(HERE, "fresh.txt"), encoding="utf-8") if l[0] not in "#\n"]
        HELD_OUT.update(bare(q) for _, q in self.fresh)
        HELD_OUT.update(bare(q) for q in self.off_heldout)
        HELD_OUT.update(bare(q) for f in self.facts for q, _ in f.heldout)
        for f in self.facts:                           # wordings that differ from a held-out one by punctuation only
            f.questions = [q for q in f.questions if bare(q) not in HELD_OUT]
        self.off = [q for q in self.off if bare(q) not in HELD_OUT]
        self.family_of = {id: (fam, x) for fam, d in FAMILIES.items() for x, id in d.items()}
        for d in FAMILIES.values():
            for id in d.values():
                assert id in self.by_id, id
        # square root: facts with many wordings come up more often, but not in proportion
        self.weights = [max(3.0, len(f.questions)) ** 0.5 for f in self.facts]
        total = sum(self.weights)
        self.cum, s = [], 0.0
        for w in self.weights:
            s += w / total
            self.cum.append(s)

    def turn(self, r, last):
        """(question, answer, topic, fact or None)"""
        x = r.random()
        if last is not None and x < 0.05:
            more = self.by_id[last.more].answer if last.more else NO_MORE
            return ask(r, r.choice(MORE)), more, last.topic, self.by_id[last.more] if last.more else None
        if last is not None and last.id in self.family_of and x < 0.4:
            fam, me = self.family_of[last.id]
            other = r.choice([k for k in FAMILIES[fam] if k != me])
            f = self.by_id[FAMILIES[fam][other]]
            return ask(r, r.choice(AND).replace("{}", other)), f.answer, f.topic, f
        if x > 0.92:
            return ask(r, r.choice(self.off)), REFUSAL, "something else", None
        if x > 0.88:
            if r.random() < 0.3:
                return ask(r, r.choice(STORY_ANY)), story(r), "a story", None
            hero = r.choice(ANIMALS)
            who = article(hero) if r.random() < 0.8 else article(r.choice(KINDS) + " " + hero)
            return ask(r, r.choice(STORY_ASK).replace("{}", who)), story(r, hero), "a story", None
        f = r.choices(self.facts, cum_weights=self.cum)[0]
        if f.id == "talk-5" and last is None:      # "no", "wrong" make sense only after an answer
            f = r.choice(self.facts[:-6])
        return ask(r, r.choice(f.questions)), f.answer, f.topic, f

    def conversation(self, r):
        out, last = [], None
        x = r.random()
        think = x < 0.04
        if think:
            out.append(("system", "<|think|>\n" + (r.choice(SYSTEMS) if r.random() < 0.3 else "")))
        elif x < 0.12:
            out.append(("system", r.choice(SYSTEMS)))
        turns = 1 if r.random() < 0.45 else r.choice([2, 2, 3, 3, 4, 5, 6, 8])
        for i in range(turns):
            q, a, topic, last = self.turn(r, last)
            out.append(("user", q))
            if think and i == turns - 1:           # the template drops thoughts of earlier turns
                out.append(("thought", f"The user asks about {topic}."))
            out.append(("model", a))
        return out

    def prose(self, r):
        """Plain text: a story, or a few answers in a row."""
        if r.random() < 0.6:
            return story(r)
        return " ".join(f.answer for f in r.sample(self.facts[:-6], r.randint(2, 5)))

    def heldout(self):
        """Questions never trained: dicts of id, kind, question, answer, keys."""
        rows = []
        for f in self.facts:
            for q, kind in f.heldout:
                rows.append(dict(id=f.id, kind=kind, question=plain(q), answer=f.answer, keys=f.keys or [f.answer]))
        for id, q in self.fresh:
            f = self.by_id.get(id)
            rows.append(dict(id=id, kind="fresh", question=q, answer=f.answer if f else REFUSAL,
                             keys=f.keys or [f.answer] if f else ["I only know about gemrun"]))
        for q in self.off_heldout:
            rows.append(dict(id="refusal", kind="variant", question=plain(q), answer=REFUSAL, keys=["I only know about gemrun"]))
        return rows


def right(row, text):
    """A right answer contains every key of its fact (letter case aside); without keys, it is the canonical answer."""
    return all(k.lower() in text.lower() for k in row["keys"])


if __name__ == "__main__":
    c = Corpus()
    h = c.heldout()
    print(len(c.facts), "facts,", sum(len(f.questions) for f in c.facts), "wordings trained,", len(h), "held out,",
          {k: sum(x["kind"] == k for x in h) for k in ("variant", "new")}, len(c.off), "off-topic trained,", len(c.off_heldout), "held out")
    few = sorted((len(f.questions), f.id) for f in c.facts)[:12]
    print("fewest wordings:", few)
    r = random.Random(1)
    for _ in range(4):
        for role, text in c.conversation(r):
            print(f"  {role}: {text}")
        print()
