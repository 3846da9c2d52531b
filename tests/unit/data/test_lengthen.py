import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.corpus.samples import Chat
from llamero.data import draw
from llamero.data.config import LengthenConfig
from llamero.data.lengthen import RECALLS, Asked, ChatCounts, Joiner, Piece, choose, long_chats
from llamero.text.messages import Message, rounds

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data/longtext"
CONFIG = LengthenConfig(length=8, long_from=100, short_share=0.5)

# -- which documents


def plainly_chosen(tokens, domains, config, keys):
    """One domain after the other: who is taken by length and chance, then who of them brings it nearer to its share."""
    taken, whole = {}, {}
    for domain in set(domains):
        those = sorted((n for n in range(len(tokens)) if domains[n] == domain and tokens[n]), key=lambda n: keys[n])
        long = [n for n in those if tokens[n] >= config.long_from]
        short = [n for n in those if n not in long]
        if those:
            drawn = long + [n for n in short if float(keys[n]) < config.short_share * 2**64]
            taken[domain] = drawn or short[:1]
            whole[domain] = sum(tokens[n] for n in those)
    tiny = {domain for domain in whole if whole[domain] < 10 * config.length}
    tiny = set() if len(tiny) == len(whole) else tiny
    part = min((sum(tokens[n] for n in taken[d]) / whole[d] for d in taken if d not in tiny), default=0.0)
    for domain in tiny:
        those = sorted((n for n in range(len(tokens)) if domains[n] == domain and tokens[n]), key=lambda n: keys[n])
        short = [n for n in those if n not in taken[domain]]
        taken[domain] += short
    kept = []
    for domain, those in taken.items():
        left = part * whole[domain]
        for n in those:
            if abs(left - tokens[n]) <= abs(left) + 1e-6:
                kept.append(n)
                left -= tokens[n]
    return sorted(kept)


documents = st.lists(
    st.tuples(st.integers(0, 300), st.sampled_from([0, 1, 5]), st.integers(0, 2**64 - 1)),
    max_size=30,
    unique_by=lambda d: d[2],
)


def chosen(found, config=CONFIG):
    tokens, domains, keys = zip(*found, strict=True) if found else ((), (), ())
    return choose(
        np.asarray(tokens, dtype=np.int64),
        np.asarray(domains, dtype=np.int32),
        config,
        keys=np.asarray(keys, dtype=np.uint64),
    )


@settings(max_examples=300)
@given(documents)
def test_documents_are_chosen_as_one_by_one(found):
    tokens, domains, keys = zip(*found, strict=True) if found else ((), (), ())
    choice = chosen(found)
    expected = plainly_chosen(tokens, domains, CONFIG, keys)
    assert [n for n in np.flatnonzero(choice.kept) if tokens[n]] == expected


@settings(max_examples=200)
@given(documents)
def test_no_domain_is_further_from_its_share_than_half_a_document(found):
    choice = chosen(found)
    tokens = Counter()
    for count, domain, _ in found:
        tokens[domain] += count
    if choice.scarcest is None:
        assert not sum(tokens.values())
        assert not choice.kept.any()
        return
    part = choice.domains[choice.scarcest].kept_tokens / tokens[choice.scarcest]
    longest = max(count for count, _, _ in found)
    for number, domain in choice.domains.items():
        assert abs(domain.kept_tokens - part * tokens[number]) <= longest / 2


def test_a_tiny_domain_does_not_decide_and_the_report_says_so():
    found = [(90, 0, n << 54) for n in range(1000)] + [(70, 1, 2**64 - 1)]
    choice = chosen(found)
    assert (choice.scarcest, choice.tiny) == (0, [1])
    assert choice.domains[0].kept_documents == 512
    assert choice.to_json(["web", "note"])["tiny"] == ["note"]


def test_the_report_warns_where_little_is_kept():
    found = [(90, 0, n << 54) for n in range(1000)]
    config = LengthenConfig(length=8, long_from=100, short_share=0.01)
    said = chosen(found, config).to_json(["web"])
    assert said["warning"] == "only 1.1% of the tokens are kept, because of domain `web`"
    assert not chosen(found).to_json(["web"])["warning"]


def test_forty_thousand_domains_are_no_problem():
    count = 40_000
    tokens, domains = np.full(count, 500), np.arange(count)
    choice = choose(tokens, domains, CONFIG, keys=draw.keys(1, "x", "lengthen", np.arange(count)))
    assert (len(choice.domains), choice.share) == (count, 1.0)


def corpus(count=20_000):
    random = np.random.default_rng(0)
    domains = random.choice(3, count, p=[0.7, 0.2, 0.1])
    tokens = np.select(
        [domains == 0, domains == 1],
        [random.lognormal(6, 1, count), random.lognormal(7.5, 1, count)],
        random.lognormal(8.5, 1, count),
    ).astype(np.int64)
    return tokens, domains, draw.keys(1, "x", "lengthen", np.arange(count))


def test_shares_stay_and_long_documents_are_taken_more_often():
    tokens, domains, keys = corpus()
    choice = choose(tokens, domains, LengthenConfig(length=1), keys=keys)
    for domain in choice.domains.values():
        assert domain.kept_share == pytest.approx(domain.share, abs=0.001)
    assert choice.scarcest is not None
    assert choice.domains[choice.scarcest].kept_documents > 1000
    long = tokens >= 4096
    assert choice.kept[long].mean() > 2 * choice.kept[~long].mean()
    assert choice.kept[long & (domains == choice.scarcest)].all()


def test_long_documents_are_passed_over_only_where_they_would_be_too_much():
    tokens, domains, keys = corpus()
    choice = choose(tokens, domains, LengthenConfig(length=1), keys=keys)
    for number in range(3):
        long = (domains == number) & (tokens >= 4096)
        short = tokens[(domains == number) & (tokens < 4096) & choice.kept].sum()
        assert all(tokens[long & ~choice.kept] > short)
    assert not all(choice.kept[tokens >= 4096])


def test_the_choice_does_not_depend_on_the_order_of_the_documents():
    tokens, domains, keys = corpus(2000)
    order = np.random.default_rng(1).permutation(2000)
    config = LengthenConfig(length=1)
    kept = choose(tokens, domains, config, keys=keys).kept
    assert np.array_equal(choose(tokens[order], domains[order], config, keys=keys[order]).kept, kept[order])


def test_of_one_domain_all_that_chance_leaves_is_kept():
    tokens, domains, keys = corpus(2000)
    choice = choose(tokens, np.zeros_like(domains), LengthenConfig(length=1), keys=keys)
    assert np.array_equal(choice.kept, (tokens >= 4096) | draw.below(keys, 0.1))
    assert choice.domains[0].share == choice.domains[0].kept_share == 1.0


def test_of_a_domain_without_tokens_nothing_is_kept_and_nothing_is_decided_by_it():
    choice = chosen([(200, 0, 1), (0, 1, 0), (0, 1, 2), (50, 0, 3)])
    assert choice.kept.tolist() == [True, False, False, True]
    assert (choice.scarcest, choice.domains[1].documents, choice.domains[1].share) == (0, 2, 0.0)


def test_a_domain_that_chance_leaves_nothing_of_keeps_one_document():
    unlucky = 2**64 - 1
    choice = chosen([(10, 0, unlucky), (10, 0, unlucky - 1), (10, 1, 0), (10, 1, 1), (10, 1, 2), (10, 1, unlucky)])
    assert choice.kept.tolist() == [False, True, True, True, False, False]


def test_the_report_names_the_domains():
    said = chosen([(200, 0, 1), (100, 1, 2), (50, 1, 2**64 - 1)]).to_json(["books", "web"])
    web = {"documents": 2, "kept_documents": 1, "tokens": 150, "kept_tokens": 100}
    assert said["scarcest"] == "web"
    assert said["domains"]["web"] == {**web, "share": 150 / 350, "kept_share": 1 / 3}


def test_a_real_corpus_keeps_its_shares():
    folder = SHARED / "redpajama_sample"
    if not folder.exists():
        pytest.skip(f"no RedPajama sample at {folder} (set LLAMERO_SHARED)")
    texts = [
        (domain, len(json.loads(line)["text"]))
        for domain, path in enumerate(sorted(folder.glob("*.jsonl")))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    domains, characters = (np.asarray(column) for column in zip(*texts, strict=True))
    tokens = (characters / 3.68).astype(np.int64)
    choice = choose(
        tokens, domains, LengthenConfig(length=1), keys=draw.keys(0, "redpajama", "lengthen", np.arange(len(texts)))
    )
    assert choice.scarcest is not None
    part = choice.domains[choice.scarcest].kept_tokens / choice.domains[choice.scarcest].tokens
    for number, domain in choice.domains.items():
        assert abs(domain.kept_tokens - part * domain.tokens) <= tokens[domains == number].max() / 2


# -- documents of one length

originals = st.lists(st.integers(0, 50), max_size=12).map(
    lambda sizes: [np.arange(1000 * n, 1000 * n + size, dtype=np.int32) for n, size in enumerate(sizes)]
)


def joined(found, length):
    joiner = Joiner(length)
    pieces = [piece for n, ids in enumerate(found) for piece in joiner.add(ids, (ids % 7).astype(np.uint16), n)]
    return pieces, joiner


@settings(max_examples=200)
@given(originals, st.integers(1, 40))
def test_pieces_are_the_documents_one_after_the_other(found, length):
    pieces, joiner = joined(found, length)
    everything = np.concatenate([np.zeros(0, np.int32), *found])
    assert all(piece.ids.size == piece.roles.size == length for piece in pieces)
    waiting = joiner.waiting
    assert np.array_equal(np.concatenate([piece.ids for piece in pieces] + [waiting.ids]), everything)
    assert len(pieces) == everything.size // length
    assert joiner.finish() == everything.size % length == waiting.ids.size
    assert joiner.finish() == 0
    for piece in [*pieces, waiting]:
        assert np.array_equal(piece.roles, piece.ids % 7)
        assert [span.start for span in piece.spans[1:]] == [span.stop for span in piece.spans[:-1]]
        assert not piece.spans or (piece.spans[0].start, piece.spans[-1].stop) == (0, piece.ids.size)
        for span in piece.spans:
            original = found[span.label][span.offset : span.offset + span.stop - span.start]
            assert np.array_equal(piece.ids[span.start : span.stop], original)
            assert original.size


def test_the_rest_of_a_long_document_goes_on_into_the_next_pieces():
    pieces, joiner = joined([np.arange(3), np.arange(25)], 10)
    assert [piece.spans for piece in pieces] == [[(0, 3, 0, 0), (3, 10, 1, 0)], [(0, 10, 1, 7)]]
    assert joiner.waiting.spans == [(0, 8, 1, 17)]


@settings(max_examples=50)
@given(originals, st.integers(1, 40), st.integers(0, 12))
def test_a_joiner_goes_on_from_what_another_was_left_with(found, length, after):
    expected, whole = joined(found, length)
    pieces, first = joined(found[:after], length)
    second = Joiner(length, first.waiting)
    for n, ids in enumerate(found[after:], after):
        pieces += second.add(ids, (ids % 7).astype(np.uint16), n)
    assert list(map(plain, pieces)) == list(map(plain, expected))
    assert plain(second.waiting) == plain(whole.waiting)


def plain(piece: Piece):
    return piece.ids.tolist(), piece.roles.tolist(), piece.spans, piece.ids.size and piece.ids.dtype


def test_tokens_and_roles_of_different_length_are_refused():
    with pytest.raises(ValueError, match="3 tokens, 2 roles"):
        Joiner(4).add(np.arange(3), np.arange(2), "a")


# -- chats


def dialogue(number, turns=2, *, system="", words=8, open_end=False):
    random = np.random.default_rng(number)

    def said():
        letters = random.integers(97, 123, (words, 7))
        return " ".join(bytes(word.tolist()).decode() for word in letters)

    messages = [Message("system", system)] if system else []
    for _ in range(turns):
        messages += [Message("user", said()), Message("assistant", said())]
    return Chat((*messages, *([Message("user", "and?")] if open_end else [])), "en")


def made(chats, *, characters=3000, recall_every=2, seed=0):
    counts = ChatCounts()
    found = list(
        long_chats(enumerate(chats), characters=characters, recall_every=recall_every, seed=seed, counts=counts)
    )
    return found, counts


def recalls(chat, spans):
    """(number, question, answer) of every round that belongs to no dialogue."""
    covered = {number for span in spans for number in range(span.start, span.stop)}
    return [
        (number, before.text, after.text)
        for number, (before, after) in enumerate(pairwise(chat.messages))
        if number not in covered and before.role == "user"
    ]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 4), st.sampled_from(["", "Be kind."]), st.booleans()), max_size=30
    ),
    st.integers(200, 4000),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_long_chats_are_the_dialogues_in_order_with_recalls_between(about, characters, every, seed):
    chats = [dialogue(n, turns, system=system, open_end=end) for n, turns, system, end in about]
    found, counts = made(chats, characters=characters, recall_every=every, seed=seed)
    used = []
    for chat, spans in found:
        rounds(chat.messages, to_answer=False)  # everybody speaks in turn
        assert chat.messages[-1].role == "assistant"
        size = sum(len(message.text) for message in chat.messages)
        assert size <= characters or len(spans) == 1
        for span in spans:
            used.append(span.label)
            original = chats[span.label].messages[span.offset : span.offset + span.stop - span.start]
            assert chat.messages[span.start : span.stop] == original
        asked = recalls(chat, spans)
        assert len(asked) <= len(spans) // every
        for number, _, answer in asked:
            assert any(message.text == answer for message in chat.messages[:number])
    assert used == [n for n, chat in enumerate(chats) if any(message.role == "assistant" for message in chat.messages)]
    assert counts.dialogues == len(used)
    assert counts.dialogues + counts.without_answer == len(chats)
    assert counts.unanswered == sum(end and turns > 0 for _, turns, _, end in about)
    assert counts.chats == len(found)
    assert counts.recalls == sum(len(recalls(*each)) for each in found)


def test_after_every_few_dialogues_one_earlier_is_asked_about():
    found, counts = made([dialogue(n) for n in range(60)], characters=10_000, recall_every=3)
    assert (counts.recalls_missed, counts.recalls) == (0, sum(len(spans) // 3 for _, spans in found))
    kinds = Counter(question.partition("“")[0] for each in found for _, question, _ in recalls(*each))
    assert len(kinds) == len(RECALLS)
    for chat, spans in found:
        for number, _, answer in recalls(chat, spans):
            last = max(span.start for span in spans if span.stop <= number)
            assert answer in [message.text for message in chat.messages[:last]]


def true_answers(asked, messages):
    """Every answer that the messages before a question allow."""
    what, quote = asked.partition("“")[0], asked.partition("“")[2].rpartition("”")[0].removesuffix(" …")
    said = list(pairwise(messages))
    by_user = [message.text for message in messages if message.role == "user"]
    if what.startswith("Earlier"):
        return {after.text for before, after in said if before.role == "user" and before.text.startswith(quote)}
    if what.startswith("What had I"):
        return {before.text for before, after in said if before.role == "user" and after.text.startswith(quote)}
    if what.startswith("Which"):
        return {before for before, after in pairwise(by_user) if after.startswith(quote)}
    return {next(text for text in by_user if quote in text)}


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 3)), max_size=40), st.integers(1, 3), st.integers(0, 9))
def test_every_recall_has_one_answer_and_it_is_the_one_given(about, every, seed):
    found, _ = made([dialogue(n, turns) for n, turns in about], characters=9000, recall_every=every, seed=seed)
    for chat, spans in found:
        for number, question, answer in recalls(chat, spans):
            assert true_answers(question, chat.messages[:number]) == {answer}


def test_the_seed_decides_what_is_asked():
    chats = [dialogue(n) for n in range(40)]
    assert made(chats, seed=1) == made(chats, seed=1)
    assert made(chats, seed=1)[0] != made(chats, seed=2)[0]


ROUNDS = [
    Asked("What is a llama?", "An animal."),
    Asked("Where do llamas live?", "In the Andes."),
    Asked("Do llamas spit?", "Yes."),
]


def test_what_is_asked_and_what_is_true():
    assert [ask(ROUNDS, 1) for ask in RECALLS] == [
        Asked("Earlier I asked you: “Where do llamas live?” What did you answer?", "In the Andes.", recalls=True),
        Asked("What had I asked when you said this? “In the Andes.”", "Where do llamas live?", recalls=True),
        Asked(
            "Which question did I ask just before this one? “Where do llamas live?”", "What is a llama?", recalls=True
        ),
        Asked("What was the first question in which I mentioned “llamas”?", "Where do llamas live?", recalls=True),
    ]


def test_nothing_is_asked_that_has_no_answer_or_two():
    twice = [*ROUNDS, ROUNDS[1]]
    assert [ask(twice, 1) for ask in RECALLS[:3]] == [None, None, None]
    assert RECALLS[2](ROUNDS, 0) is None  # nothing came before
    assert RECALLS[3](ROUNDS, 2) is None  # no word of it is new
    assert [ask([Asked("  ", " ")], 0) for ask in RECALLS] == [None] * 4


def test_long_questions_are_quoted_from_their_beginning():
    asked = Asked("word " * 100, "yes")
    found = RECALLS[0]([asked], 0)
    assert found is not None
    assert len(found.question) < 260
    assert found.question.endswith(" …” What did you answer?")


def test_a_system_message_is_kept_where_all_share_it():
    found, counts = made([dialogue(n, system="Be kind.") for n in range(4)], characters=10_000, recall_every=9)
    ((chat, spans),) = found
    assert [message.role for message in chat.messages].count("system") == 1
    assert [(span.start, span.stop, span.offset) for span in spans] == [(0, 5, 0), (5, 9, 1), (9, 13, 1), (13, 17, 1)]
    assert counts.systems_dropped == 0


def test_and_dropped_where_they_differ():
    systems = ["Be kind.", "Be kind.", "", "Be short."]
    ((chat, _),), counts = made([dialogue(n, system=each) for n, each in enumerate(systems)], characters=10_000)
    assert all(message.role != "system" for message in chat.messages)
    assert counts.systems_dropped == 3


def test_a_dialogue_longer_than_asked_for_is_a_chat_alone_and_counted():
    found, counts = made([dialogue(0), dialogue(1, turns=40), dialogue(2)], characters=1000)
    assert [len(spans) for _, spans in found] == [1, 1, 1]
    assert counts.overlong == 1


def test_a_dialogue_without_an_answer_is_counted():
    found, counts = made([Chat((Message("user", "hm"),)), Chat(()), Chat((Message("system", "hm"),))])
    assert (found, counts.to_json()["without_answer"]) == ([], 3)


def test_a_recall_that_fits_nowhere_is_counted():
    _, counts = made([dialogue(n) for n in range(6)], characters=520, recall_every=2)
    assert (counts.recalls, counts.recalls_missed, counts.chats) == (0, 3, 3)
