import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.corpus.dataset import Sources
from llamero.corpus.megatron import Reader, Writer
from llamero.engine.batches import Batches, Report, split_at_turns
from llamero.engine.stage import StageConfig
from llamero.text.messages import SCAFFOLD, Role

S, U, A, C, T = Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.CONTEXT, Role.TEXT


def numbered(roles):
    """Documents in which every token of all is another one, so that each can be followed."""
    tokens, first = [], 0
    for document in roles:
        tokens.append(np.arange(first, first + len(document)))
        first += len(document)
    return tokens, [np.asarray(document, dtype=np.uint16) for document in roles]


def batches(roles, *, seed=0, **keys):
    about = {"name": "s", "mixture": "m", "sequence": 8, "batch": 2}
    about |= {} if "steps" in keys else {"epochs": 1}
    if "batch_samples" in keys:
        del about["batch"]
    tokens, arrays = numbered(roles)
    return Batches(tokens, arrays, StageConfig.model_validate(about | keys), seed=seed, where="here")


def learned(made, rows):
    """(token, next token, weight) of everything that rows teach."""
    batch = made.assemble(rows)
    inputs = batch.ids[batch.learned].tolist()
    return list(zip(inputs, batch.targets.tolist(), batch.weights.tolist(), strict=True))


def taught(made):
    """The same of all steps, with how often each pair came."""
    seen = Counter()
    for step in range(made.steps):
        seen.update((token, target) for token, target, _ in learned(made, made.rows_of(step)))
    return seen


documents = st.lists(
    st.lists(st.sampled_from([S, U, A, C, A + SCAFFOLD, U + SCAFFOLD, T]), max_size=9), min_size=1, max_size=30
)


def supervised(roles, learns=lambda role: role in (A, T)):
    """Walk the documents: (token, next token) of every token that is learned and has one before it."""
    tokens, _ = numbered(roles)
    return [
        (int(ids[at - 1]), int(ids[at]))
        for ids, document in zip(tokens, roles, strict=True)
        for at in range(1, len(document))
        if learns(document[at])
    ]


@settings(max_examples=100)
@given(roles=documents, batch=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_supervised_token_is_a_target_exactly_once_an_epoch(roles, batch, seed):
    expected = supervised(roles)
    if not expected:
        with pytest.raises(LlameroError, match="nothing to learn"):
            batches(roles, batch=batch, seed=seed)
        return
    made = batches(roles, batch=batch, seed=seed)
    assert taught(made) == Counter(expected)
    assert made.report.supervised_tokens == len(expected)


@settings(max_examples=30)
@given(roles=documents, epochs=st.sampled_from([2, 3]))
def test_and_as_often_as_there_are_epochs(roles, epochs):
    expected = Counter(supervised(roles))
    if expected:
        assert taught(batches(roles, batch=3, epochs=epochs)) == Counter({pair: epochs for pair in expected})


def test_a_part_of_an_epoch_is_a_part_of_the_rows():
    made = batches([[U] + [A] * 8] * 10, batch=4, epochs=1.1)
    assert [len(made.rows_of(step)) for step in range(made.steps)] == [4, 4, 3]
    assert sorted(made.rows_of(0) + made.rows_of(1) + made.rows_of(2)[:2]) == list(range(10))


def test_steps_run_on_through_epochs_with_full_batches():
    made = batches([[U] + [A] * 8] * 10, batch=4, steps=5)
    order = [row for step in range(5) for row in made.rows_of(step)]
    assert [len(made.rows_of(step)) for step in range(5)] == [4] * 5
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


@settings(max_examples=100)
@given(roles=documents, samples=st.integers(1, 6), epochs=st.sampled_from([1, 1.5, 3]), seed=st.integers(0, 3))
def test_a_batch_in_samples_takes_as_many_documents_in_as_few_rows(roles, samples, epochs, seed):
    expected = supervised(roles)
    if not expected:
        return
    made = batches(roles, batch_samples=samples, epochs=epochs, seed=seed, overlong="split")
    steps = [[made.assemble([row]) for row in made.rows_of(step)] for step in range(made.steps)]
    taken = [[number for row in rows for number in row.documents] for rows in steps]
    kept = len({number for step in taken for number in step})
    assert all(len(step) == samples for step in taken[:-1])
    assert sum(map(len, taken)) == math.ceil(round(epochs * kept, 6))
    assert made.batch == max(len(rows) for rows in steps)
    for rows in steps:
        fill = [sum(row.lengths) for row in rows]
        assert max(fill) <= 8
        assert all(a + b > 8 for number, a in enumerate(fill) for b in fill[:number]), "two of these rows are one"
    if epochs == 3:
        assert taught(made) == Counter({pair: 3 for pair in expected})


def test_a_batch_in_samples_needs_no_step_before_it():
    roles = [[U] + [A] * (1 + number % 8) for number in range(23)]
    forward = batches(roles, batch_samples=5, steps=12)
    said = [forward.assemble(forward.rows_of(step)).documents for step in range(12)]
    made = batches(roles, batch_samples=5, steps=12)
    assert [made.assemble(made.rows_of(step)).documents for step in reversed(range(12))] == said[::-1]
    assert sorted(number for step in said for number in step)[:20] != [*range(20)]  # the passes are shuffled
    assert all(len(step) == 5 for step in said)


def test_inputs_and_targets_are_shifted_within_documents():
    made = batches([[U, A, A], [U, U, A, A], [T] * 5], batch=1, sequence=16)
    batch = made.assemble([0])
    tokens, roles = numbered([[U, A, A], [U, U, A, A], [T] * 5])
    at = 0
    assert sorted(batch.documents) == [0, 1, 2]
    for document, length in zip(batch.documents, batch.lengths, strict=True):
        assert length == len(tokens[document]) - 1
        assert batch.ids[at : at + length].tolist() == tokens[document][:-1].tolist()
        at += length
    assert at == len(batch.ids)
    assert sorted(taught(made)) == supervised(list(roles))


def test_the_batch_of_a_step_depends_on_the_seed_and_the_step_alone():
    roles = [[U] + [A] * 8] * 23
    forward = [batches(roles, steps=40, seed=5).rows_of(step) for step in range(40)]
    made = batches(roles, steps=40, seed=5)
    assert [made.rows_of(step) for step in reversed(range(40))] == forward[::-1]
    assert [batches(roles, steps=40, seed=6).rows_of(step) for step in range(40)] != forward


def test_rows_hold_no_more_than_the_sequence():
    random = np.random.default_rng(0)
    made = batches([[U] + [A] * int(random.integers(1, 9)) for _ in range(200)])
    fill = [len(made.assemble([row]).ids) for row in range(len(made))]
    assert max(fill) <= 8
    assert made.report.rows == len(made)
    assert made.report.fill == pytest.approx(sum(fill) / (8 * len(made)))


ALL_ROLES = [S, S + SCAFFOLD, C, C + SCAFFOLD, U, U + SCAFFOLD, A, A + SCAFFOLD, T, T + SCAFFOLD]


def weights_of(made):
    """Weight of each target role, the documents being [U, role]."""
    found = {}
    for row in range(len(made)):
        for _, target, weight in learned(made, [row]):
            found[ALL_ROLES[(target - 1) // 2]] = weight
    return found


def test_each_speaker_counts_as_much_as_the_stage_says():
    roles = [[U, role] for role in ALL_ROLES]
    assert weights_of(batches(roles)) == {A: 1.0, T: 1.0}
    learn = {"assistant": 1.5, "text": 0.0, "user": 0.25, "system": 0.5, "context": 0.125}
    assert weights_of(batches(roles, learn=learn)) == {A: 1.5, U: 0.25, S: 0.5, C: 0.125}


def test_language_modelling_learns_every_token_markup_included():
    assert weights_of(batches([[U, role] for role in ALL_ROLES], objective="lm")) == dict.fromkeys(ALL_ROLES, 1.0)


LONG = [[U, U, A, A], [U] + [A] * 12, [U, A]]


def test_a_long_sample_is_an_error_that_names_it():
    with pytest.raises(LlameroError, match=r"^here: sample 1 has 13 tokens, `sequence` is 8(?s:.*)overlong: split"):
        batches(LONG)


def test_a_sample_of_one_token_more_than_the_sequence_fits():
    assert batches([[U] + [A] * 8]).report.rows == 1


@pytest.mark.parametrize(
    ("policy", "counts", "targets"),
    [
        ("drop", {"dropped": 1, "tokens": 4}, 3),
        ("truncate", {"truncated": 1, "truncated_tokens": 4, "tokens": 12}, 3 + 8),
        ("split", {"truncated": 1, "truncated_tokens": 4, "tokens": 12}, 3 + 8),
    ],
)
def test_what_becomes_of_a_long_turn_is_counted(policy, counts, targets):
    made = batches(LONG, overlong=policy)
    said = {key: value for key, value in made.report.to_json().items() if value and key not in ("rows", "fill")}
    assert said == {"documents": 3, "supervised_tokens": targets, **counts}
    assert sum(taught(made).values()) == targets


def test_a_long_chat_is_split_before_a_question():
    first, second, third = [U, U, A, A], [U, A, A, A], [U, A, A]
    made = batches([first + second + third], overlong="split")
    report = made.report
    assert (report.split, report.truncated, report.dropped) == (1, 0, 0)
    # 4 + 4 tokens fit into one piece of 9, the third turn begins the next
    assert sorted(length for row in range(len(made)) for length in made.assemble([row]).lengths) == [2, 7]
    assert taught(made) == Counter(supervised([first + second + third]))


def test_a_context_stays_with_its_question():
    rounds = [C, C + SCAFFOLD, U, A, A, A + SCAFFOLD]
    assert split_at_turns(np.asarray(rounds * 3), 6) == [(0, 6), (6, 12), (12, 18)]
    assert split_at_turns(np.asarray(rounds * 3), 11) == [(0, 12), (12, 18)]
    assert split_at_turns(np.asarray([S, *rounds, *rounds]), 8) == [(0, 7), (7, 13)]


def test_a_turn_that_alone_is_too_long_loses_its_end():
    roles = np.asarray([U, A, U] + [A] * 20 + [U, A])
    assert split_at_turns(roles, 8) == [(0, 2), (2, 11), (23, 25)]


def test_a_piece_without_anything_to_learn_is_left_out_and_counted():
    made = batches([[U, A] + [U] * 12 + [A] + [U, A]], overlong="split")
    assert made.report.pieces_without_target == 1
    assert (made.report.split, made.report.truncated, made.report.truncated_tokens) == (1, 1, 4)
    assert made.report.supervised_tokens == 2


@settings(max_examples=100)
@given(length=st.integers(2, 60), limit=st.integers(8, 20))
def test_a_long_text_is_cut_so_that_no_target_is_lost(length, limit):
    made = batches([[T] * length], objective="lm", sequence=limit)
    assert taught(made) == Counter({(at, at + 1): 1 for at in range(length - 1)})
    assert made.report.truncated == 0
    assert made.report.tokens == length - 1


def test_documents_are_counted_once_whatever_became_of_them():
    made = batches([[], [A], [U, U], [U, A]])
    report = made.report
    assert (report.documents, report.too_short, report.nothing_to_learn, report.rows) == (4, 2, 1, 1)


def test_nothing_to_learn_is_an_error():
    for roles in ([], [[A]], [[U, U]], [[U, A + SCAFFOLD]]):
        with pytest.raises(LlameroError, match="here: nothing to learn"):
            batches(roles)


def test_tokens_and_roles_of_different_runs_are_refused():
    tokens, roles = numbered([[U, A, A], [U, A]])
    stage = StageConfig(name="s", mixture="m", steps=1)
    with pytest.raises(LlameroError, match="document 0 has 3 tokens and 2 roles"):
        Batches(tokens, roles[::-1], stage, seed=0, where="here")
    with pytest.raises(LlameroError, match="2 documents of tokens, 1 of roles"):
        Batches(tokens, roles[:1], stage, seed=0, where="here")


def plainly_cut(roles, stage):
    """Cut documents one after the other: the pieces, and the report without what packing adds."""
    weights = stage.learn.model_dump()
    named = {S: "system", U: "user", A: "assistant", C: "context", T: "text"}

    def learns(role):
        return stage.objective == "lm" or bool(role in named and weights[named[role]])

    pieces, report = [], Report()
    for number, document in enumerate(roles):
        report.documents += 1
        report.too_short += len(document) < 2
        if len(document) < 2:
            continue
        cuts = [(0, len(document))]
        if len(document) > stage.sequence + 1:
            cuts = plainly_shortened(document, stage)
            lost = len(document) - sum(b - a for a, b in cuts)
            report.dropped += not cuts
            report.split += len(cuts) > 1
            report.truncated += bool(cuts) and lost > 0
            report.truncated_tokens += max(0, lost) if cuts else 0
        learned = [sum(map(learns, document[a + 1 : b])) for a, b in cuts]
        kept = [cut for cut, count in zip(cuts, learned, strict=True) if count]
        report.nothing_to_learn += bool(cuts) and not kept
        report.pieces_without_target += len(cuts) - len(kept) if kept else 0
        report.tokens += sum(b - a - 1 for a, b in kept)
        report.supervised_tokens += sum(learned)
        pieces += [(number, a, b) for a, b in kept]
    return pieces, report


def plainly_shortened(document, stage):
    limit = stage.sequence
    if stage.policy == "drop":
        return []
    if stage.policy == "truncate":
        return [(0, limit + 1)]
    if all(role % SCAFFOLD == T for role in document):
        return [(a, min(a + limit + 1, len(document))) for a in range(0, len(document) - 1, limit)]
    return split_at_turns(np.asarray(document), limit)


@settings(max_examples=200)
@given(
    roles=st.lists(
        st.one_of(
            st.lists(st.sampled_from([S, U, A, C, A + SCAFFOLD, U + SCAFFOLD, T]), max_size=40),
            st.lists(st.sampled_from([T, T + SCAFFOLD]), max_size=40),
        ),
        min_size=1,
        max_size=12,
    ),
    policy=st.sampled_from(["drop", "truncate", "split"]),
    keys=st.sampled_from([{}, {"objective": "lm"}, {"learn": {"assistant": 0.5, "user": 0.25, "text": 0.0}}]),
    block=st.sampled_from([1, 25, 1 << 22]),
)
def test_documents_are_cut_as_one_by_one(roles, policy, keys, block):
    stage = StageConfig.model_validate(
        {"name": "s", "mixture": "m", "sequence": 8, "steps": 1, "overlong": policy} | keys
    )
    pieces, report = plainly_cut(roles, stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamero.engine.batches._BLOCK", block)
        if not pieces:
            with pytest.raises(LlameroError, match="nothing to learn"):
                batches(roles, overlong=policy, steps=1, **keys)
            return
        made = batches(roles, overlong=policy, steps=1, **keys)
    assert replace(made.report, rows=0, fill=0.0) == report
    tokens, _ = numbered(roles)
    found = []
    for row in range(len(made)):
        batch = made.assemble([row])
        stops = np.cumsum(batch.lengths)
        inputs = np.split(batch.ids.numpy(), stops[:-1])
        found += [(number, ids.tolist()) for number, ids in zip(batch.documents, inputs, strict=True)]
    assert sorted(found) == sorted((number, tokens[number][a : b - 1].tolist()) for number, a, b in pieces)


def test_files_give_the_batches_of_lists(tmp_path):
    random = np.random.default_rng(0)
    roles = [random.choice([U, A, T], size=random.integers(0, 30)).astype(np.uint16) for _ in range(100)]
    tokens, _ = numbered(roles)
    for name, documents in (("tokens", tokens), ("roles", roles)):
        with Writer(tmp_path / name, np.uint16) as writer:
            for document in documents:
                writer.add(document)
    stage = StageConfig(name="s", mixture="m", sequence=8, epochs=1, overlong="split")
    read = Batches(Reader(tmp_path / "tokens"), Reader(tmp_path / "roles"), stage, seed=0, where="here")
    made = Batches(tokens, roles, stage, seed=0, where="here")
    assert read.report == made.report
    for row in range(len(made)):
        ours, theirs = read.assemble([row]), made.assemble([row])
        assert ours.documents == theirs.documents
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.weights.tolist() == theirs.weights.tolist()


def test_documents_need_not_lie_in_order_in_their_file(tmp_path):
    tokens, roles = numbered([[U, A, A], [U, U, A, A], [U, A]])
    for name, documents in (("tokens", tokens), ("roles", roles)):
        with Writer(tmp_path / name, np.uint16) as writer:
            for document in documents:
                writer.add(document)
        idx = bytearray((tmp_path / f"{name}.idx").read_bytes())
        idx[34:46] = np.asarray([2, 3, 4], "<i4").tobytes()  # the last document comes first
        idx[46:70] = np.asarray([14, 0, 6], "<i8").tobytes()
        (tmp_path / f"{name}.idx").write_bytes(bytes(idx))
    stage = StageConfig(name="s", mixture="m", sequence=8, epochs=1)
    read = Batches(Reader(tmp_path / "tokens"), Reader(tmp_path / "roles"), stage, seed=0, where="here")
    in_order = [tokens[2], tokens[0], tokens[1]], [roles[2], roles[0], roles[1]]
    made = Batches(*in_order, stage, seed=0, where="here")
    assert read.report == made.report
    assert taught(read) == taught(made)


@settings(max_examples=50)
@given(roles=documents, cuts=st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_every_learned_token_knows_its_source(roles, cuts):
    tokens, arrays = numbered(roles)
    if not supervised(roles):
        return
    ends = (*sorted(min(cut, len(roles)) for cut in cuts), len(roles))
    sources = Sources(tuple("abcd"[: len(ends)]), ends)
    stage = StageConfig.model_validate({"name": "s", "mixture": "m", "sequence": 8, "batch": 2, "steps": 1})
    made = Batches(tokens, arrays, stage, seed=0, where="here", sources=sources)
    assert made.sources == sources.names
    batch = made.assemble(range(len(made)))
    first_tokens = np.cumsum([0, *map(len, roles)])
    expected = [
        sum(int(np.searchsorted(first_tokens, target, side="right")) - 1 >= end for end in ends)
        for target in batch.targets.tolist()
    ]
    assert batch.sources.tolist() == expected


def test_one_source_alone_is_not_told_apart():
    tokens, arrays = numbered([[U, A, A], [U, A]])
    stage = StageConfig.model_validate({"name": "s", "mixture": "m", "sequence": 8, "batch": 2, "steps": 1})
    made = Batches(tokens, arrays, stage, seed=0, where="here", sources=Sources(("a",), (2,)))
    assert made.sources == ()
    assert not made.assemble([0]).sources.any()


@pytest.mark.parametrize(("key", "kind"), [("batch", "packed rows"), ("batch_samples", "samples")])
def test_data_that_is_less_than_one_batch_is_refused_with_the_number_that_fits(make_data, key, kind):
    def batches(size):
        stage = {"name": "tiny", "mixture": "chat", "sequence": 32, "steps": 4, key: size}
        return make_data(30).batches(StageConfig.model_validate(stage))

    there = len(batches(1)) if key == "batch" else 30
    with pytest.raises(LlameroError, match=rf"a step takes {there + 1} {kind}, and there are {there}: the data is"):
        batches(there + 1).refuse_short()
    batches(there).refuse_short()


def test_data_of_which_nothing_is_learned_is_refused_with_counts(make_data, make_stage):
    silent = {"learn": {"assistant": 0, "text": 0}}
    with pytest.raises(LlameroError, match=r"of 30 documents 30 have no token that is learned, 0 are longer") as told:
        make_data(30).batches(make_stage(**silent))
    assert "`learn`" in str(told.value.fix)
