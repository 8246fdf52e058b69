"""The probes: planted models get what they must, guessers get chance, and the questions are the same every time."""

import json
import random
from pathlib import Path
from random import Random

import pytest
from tiny_models import Memory, Planted, corpus, induction, model_on, portable

from homelab_scaling.data.shards import open_shards
from homelab_scaling.errors import DataError
from homelab_scaling.evals.bpb import BitsPerByte
from homelab_scaling.evals.intervals import share
from homelab_scaling.evals.own import OWN_TASKS, left_out_because, own_tasks
from homelab_scaling.evals.pairs import IN_COUPLES, corrupt, direction, rules_of
from homelab_scaling.evals.probes import Copy, LastWord, MinimalPairs
from homelab_scaling.evals.texts import held_out, language_of


def listed(words: str) -> list[str]:
    return words.split()


NOUNS = listed("river house stone garden captain window letter mountain harbour candle winter soldier")
VERBS = listed("was were is are has this these found carried watched remembered crossed")
SMALL = listed("the a of to and under over near old young quiet broken")


def story(rng: random.Random) -> str:
    sentences = []
    for _ in range(rng.randrange(8, 20)):
        words = [rng.choice(rng.choice((NOUNS, VERBS, SMALL))) for _ in range(rng.randrange(6, 14))]
        sentences.append(" ".join(words).capitalize() + ".")
    return " ".join(sentences) + "\n"


def module(rng: random.Random) -> str:
    lines = []
    for _ in range(rng.randrange(6, 14)):
        name, left, right = rng.sample(NOUNS, 3)
        lines += [
            f"def {name}({left}, {right}):",
            f"    if {left} {rng.choice('<>')} {right}:",
            f"        return {left}[{rng.randrange(9)}] {rng.choice('+-')} {right}",
            f"    {right} = {rng.choice(NOUNS)}({left}[{right}])",
            f"    return {right}",
            "",
        ]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    return corpus(tmp_path_factory.mktemp("prose"), [story(rng) for _ in range(40)], tokenizer="bpe:400", val_frac=0.4)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    return corpus(tmp_path_factory.mktemp("code"), [module(rng) for _ in range(30)], tokenizer="bpe:320", val_frac=0.4)


def ask(task, model) -> list[float]:
    documents = task.documents()
    outcomes = task.ask(model, documents)
    assert [o.doc_id for o in outcomes] == [d.doc_id for d in documents]
    assert len({d.doc_id for d in documents}) == len(documents)
    assert all(o.n_tokens > 0 for o in outcomes)
    return [o.value for o in outcomes]


def knows(shards: Path, context: int = 512):
    """A model that has learnt the held-out text by heart."""
    model = model_on(shards, context=context)
    texts = [[model.eot_id, *document.ids.tolist()] for document in held_out(model).documents]
    return model_on(shards, Planted(model.n_vocab, Memory(texts)), context=context)


# ----------------------------------------------------------------------------------------------------------------- copy


def test_an_induction_head_copies(prose: Path) -> None:
    model = model_on(prose, Planted(400, induction), context=64)
    task = Copy(model, held_out(model), limit=40)
    assert ask(task, model) == [1.0] * 40
    assert task.chance == 1 / 8


@pytest.mark.parametrize("preference", ["earliest", "latest", "lowest id", "network"])
def test_who_does_not_use_the_cue_gets_chance(preference: str) -> None:
    """Also models that prefer a place or a token: no order of the candidates gives the answer away."""
    rules = {
        "earliest": lambda seen: [*seen[:0:-1]],
        "latest": lambda seen: [*seen],
        "lowest id": lambda seen: sorted(seen, reverse=True),
    }

    class Ranked(Planted):
        def forward(self, input_ids, attention_mask):
            found = super().forward(input_ids, attention_mask)
            for row, ids in enumerate(input_ids.tolist()):
                for rank, token in enumerate(self.ranking(ids)):
                    found.logits[row, -1, token] = float(rank)
            return found

    network = None
    if preference != "network":
        network = Ranked(257, lambda seen: None)
        network.ranking = rules[preference]
    model = portable(network, context=64)
    part = share(ask(Copy(model, None, limit=600), model))
    assert part.low is not None
    assert part.high is not None
    assert part.low < 1 / 8 < part.high


def test_copy_fits_small_contexts() -> None:
    """Candidates are as many as the context holds; a context too small is one sentence."""
    for context, k in ((36, 8), (35, 7), (16, 3), (12, 2)):
        model = portable(Planted(257, induction), context=context)
        task = Copy(model, None, limit=10)
        assert task.chance == 1 / k
        assert task.settings["candidates"] == k
        assert {len(item.context) for item in task.items.values()} == {1 + 4 * k + 3}
        assert ask(task, model) == [1.0] * 10
    with pytest.raises(DataError, match="has a context of 11"):
        Copy(portable(context=11), None).documents()


def test_copy_takes_tokens_of_the_text_and_no_special_one(prose: Path) -> None:
    model = model_on(prose, context=64)
    there = {int(i) for document in held_out(model).documents for i in document.ids}
    task = Copy(model, held_out(model), limit=50)
    for item in task.items.values():
        assert set(item.context[1:]) <= there
        assert model.eot_id not in item.context[1:]
        assert len(set(item.candidates)) == len(item.candidates) == 8
        assert item.context[-3:] == item.context[1 + 4 * item.answer : 4 + 4 * item.answer]
        assert item.context[4 + 4 * item.answer] == item.candidates[item.answer]


# ------------------------------------------------------------------------------------------------------------ last word


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_who_knows_the_text_knows_the_word(kind: str, request: pytest.FixtureRequest) -> None:
    shards = request.getfixturevalue(kind)
    model = knows(shards)
    task = LastWord(held_out(model), limit=40)
    assert task.settings["language"] == kind
    assert sum(ask(task, model)) == 40
    stranger = model_on(shards, context=512)
    assert sum(ask(task, stranger)) <= 2


def test_the_word_is_one_of_the_passage_and_of_the_text(prose: Path) -> None:
    held = held_out(model_on(prose))
    texts = {document.doc_id: document.text for document in held.documents}
    items = LastWord(held, limit=60).items
    assert 40 <= len(items) <= 60
    for doc_id, item in items.items():
        document, place = doc_id.split("-")
        assert item.word in item.context
        assert texts[document][: int(place) + len(item.word)].endswith(item.context + item.blank + item.word)
        assert not item.context.endswith(" ")


def test_last_words_chance_is_the_best_simple_guess() -> None:
    class Items(LastWord):
        def __init__(self, answers: list[tuple[str, str]]) -> None:
            self.items = {str(i): _item(*pair) for i, pair in enumerate(answers)}

    def _item(context: str, word: str):
        from homelab_scaling.evals.probes import WordItem

        return WordItem(context=context, blank=" ", word=word)

    assert Items([("red red blue", "red"), ("sun sun moon", "sun"), ("one two", "one")]).chance == pytest.approx(2 / 3)
    assert Items([("red red blue", "blue"), ("sun sun moon", "moon")]).chance == 1.0
    assert Items([("red red blue tea", "blue"), ("sun sun blue rod", "blue")]).chance == 1.0


def test_no_repeated_word_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "nrst"))
    with pytest.raises(DataError, match=r"last-word: no passage of the text text\.txt repeats a word"):
        LastWord(held_out(portable(), path)).documents()


# -------------------------------------------------------------------------------------------------------- minimal pairs


@pytest.mark.parametrize("kind", ["prose", "code"])
def test_who_knows_the_text_prefers_it(kind: str, request: pytest.FixtureRequest) -> None:
    shards = request.getfixturevalue(kind)
    model = knows(shards)
    task = MinimalPairs(model, held_out(model), limit=40)
    assert sum(ask(task, model)) == 40
    assert {doc_id.rsplit("-", 2)[0] for doc_id in task.items} == {rule.replace(" ", "-") for rule in rules_of(kind)}


def test_who_knows_only_the_number_of_tokens_gets_chance(prose: Path) -> None:
    """A uniform model prefers the line of fewer tokens: that is the chance level; of bytes it is 1/2."""
    uniform = model_on(prose, Planted(400, lambda seen: None), context=512)
    task = MinimalPairs(uniform, held_out(uniform), limit=100)
    values = ask(task, uniform)
    assert task.chance is not None
    assert task.chance >= 0.5
    assert sum(values) <= task.chance * len(values)  # equal numbers are a loss here, half a point there
    raw = portable(tokenizer=None)
    assert MinimalPairs(raw, held_out(uniform), limit=30).chance in (0.5, pytest.approx(0.5, abs=0.2))


def test_pairs_differ_by_their_rule_alone(code: Path, prose: Path) -> None:
    """Exchanges keep the characters; every real line stands in the text after what is said to stand before it."""
    for shards in (code, prose):
        model = model_on(shards)
        held = held_out(model)
        texts = {document.doc_id: document.text for document in held.documents}
        for doc_id, item in MinimalPairs(model, held, limit=80).items.items():
            rule, document, place = doc_id.rsplit("-", 2)
            real, other = item.twins.real, item.twins.corrupted
            assert real != other
            assert texts[document][int(place) - len(item.before) :].startswith(item.before + real)
            if rule not in IN_COUPLES:
                assert sorted(real) == sorted(other)


@pytest.mark.parametrize(("kind", "rule"), [("prose", "agreement"), ("code", "opposites")])
def test_closed_pairs_go_both_ways_equally(kind: str, rule: str, request: pytest.FixtureRequest) -> None:
    model = model_on(request.getfixturevalue(kind))
    items = MinimalPairs(model, held_out(model), limit=301).items
    counts: dict[tuple[str, str], int] = {}
    for doc_id, item in items.items():
        if doc_id.startswith(rule):
            pair = direction(item.twins)
            counts[pair] = counts.get(pair, 0) + 1
    assert counts
    for (a, b), n in counts.items():
        assert n == counts.get((b, a), 0)


@pytest.mark.parametrize(
    ("rule", "line", "twins"),
    [
        ("brackets", "    x = f(y[0])\n", {"    x = f[y(0)]\n"}),
        ("brackets", "    x = f(y(0))\n", {None}),
        ("brackets", "# see f(x[0]) for more\n", {None}),
        ("brackets", "x = y - 1 + )z(\n", {None}),
        ("identifiers", "total = count\n", {"count = total\n"}),
        ("identifiers", "total += total\n", {None}),
        ("opposites", "if x == 0 -> y\n", {"if x != 0 -> y\n", "if x == 1 -> y\n"}),
        ("opposites", "value -= 10\n", {None}),
        ("indentation", "if abc:\n    return x", {"    if abc:\nreturn x"}),
        ("indentation", "abc = 1\ndef = 2", {None}),
        ("indentation", "if abc:\n\n", {None}),
    ],
)
def test_rules_of_code(rule: str, line: str, twins: set[str | None]) -> None:
    found = {corrupt(line, rule, "code", Random(seed)) for seed in range(30)}
    assert {twin.corrupted if twin is not None else None for twin in found} == twins


@pytest.mark.parametrize(
    ("rule", "line", "twins"),
    [
        (
            "word order",
            "The old house was cold.",
            {"The house old was cold.", "The old was house cold.", "The old house cold was."},
        ),
        ("word order", "Too few words.", {None}),
        ("far words", "The house by a river sings.", {"The river by a house sings.", "The sings by a river house."}),
        ("agreement", "The old houses were by the river.", {"The old houses was by the river."}),
        ("agreement", "No word of any pair stands here.", {None}),
    ],
)
def test_rules_of_prose(rule: str, line: str, twins: set[str | None]) -> None:
    found = {corrupt(line, rule, "prose", Random(seed)) for seed in range(40)}
    assert {twin.corrupted if twin is not None else None for twin in found} == twins


@pytest.mark.parametrize("piece", ["x = yy", "yy = " * 41, "aa = bb(\ufffd, cc)"])
def test_lines_too_short_too_long_or_broken_are_left(piece: str) -> None:
    assert corrupt(piece, "identifiers", "code", Random(0)) is None


# --------------------------------------------------------------------------------------------------------------- common


def test_the_same_questions_every_time_and_others_for_another_seed(prose: Path) -> None:
    model = model_on(prose, context=64)
    one, two = (own_tasks(model, limit=30, seed=1) for _ in range(2))
    other = own_tasks(model, limit=30, seed=2)
    assert [task.name for task in one] == list(OWN_TASKS)
    for a, b, c in zip(one, two, other, strict=True):
        assert a.documents() == b.documents()
        assert a.settings == b.settings
        assert a.chance == b.chance
        assert len(a.documents()) <= 30
        if not isinstance(a, BitsPerByte):
            assert a.documents() != c.documents()
            assert len(a.documents()) == 30
    assert [o.value for t in one for o in t.ask(model, t.documents())] == [
        o.value for t in two for o in t.ask(model, t.documents())
    ]


def test_asked_in_pieces_or_at_once(prose: Path) -> None:
    model = model_on(prose, context=64)
    for task in own_tasks(model, limit=12):
        documents = task.documents()
        at_once = task.ask(model, documents)
        pieces = [outcome for i in range(0, len(documents), 5) for outcome in task.ask(model, documents[i : i + 5])]
        assert [o.doc_id for o in pieces] == [o.doc_id for o in at_once]
        assert [o.value for o in pieces] == pytest.approx([o.value for o in at_once], rel=1e-5)


def test_text_tasks_are_the_same_for_every_tokenizer(prose: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": d.text}) + "\n" for d in held_out(model_on(prose)).documents))
    names = ["bpb", "last-word", "minimal-pairs"]
    ours = own_tasks(model_on(prose), names, text=path, limit=20)
    theirs = own_tasks(portable(context=64), names, text=path, limit=20)
    for a, b in zip(ours, theirs, strict=True):
        assert a.documents() == b.documents()
        assert a.settings == b.settings


def test_a_foreign_model_without_text_can_only_copy() -> None:
    model = portable(context=64)
    assert [task.name for task in own_tasks(model, limit=5)] == ["copy"]
    assert left_out_because(model, ["copy"]) == (
        "not asked: bpb, last-word, minimal-pairs; tiny: nothing is known of the text this model was trained on; name "
        "a text with --text FILE"
    )
    assert left_out_because(model, list(OWN_TASKS)) is None
    with pytest.raises(DataError, match="task last-word wants held-out text: tiny: nothing is known of the text"):
        own_tasks(model, ["last-word"])
    with pytest.raises(DataError, match="no such file"):
        own_tasks(model, text="/nowhere/text.txt")


def test_language_is_told_by_the_marks(prose: Path, code: Path) -> None:
    for shards, language in ((prose, "prose"), (code, "code")):
        stream = open_shards(shards)
        text = stream.tokenizer().decode(stream.train[: len(stream.train)])
        assert language_of([text]) == language
    assert (
        language_of(["“Well,” she said; “it's late (or early) -- who knows?” He did not answer, and went out."])
        == "prose"
    )
    assert language_of([""]) == "prose"
    assert language_of([Path(__file__).read_text()]) == "code"
