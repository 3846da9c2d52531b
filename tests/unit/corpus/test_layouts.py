import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamero.core.errors import LlameroError
from llamero.corpus import layouts, rows
from llamero.corpus.layouts import LAYOUTS, Options
from llamero.corpus.samples import BadRowError, Chat, Document, LeftOut
from llamero.text.messages import Message
from llamero.text.system_messages import ALPACA

SHARED = Path(os.environ.get("LLAMERO_SHARED", Path(__file__).parents[4] / "shared")) / "data"
NEEDS_SHARED = pytest.mark.skipif(not SHARED.exists(), reason="needs the shared data folder")


def chat(*turns, language=""):
    return Chat(tuple(Message(role, text) for role, text in turns), language)


def read(layout, row) -> Any:
    (sample,) = layouts.layout_named(layout).read(row, Options())
    return sample


ROWS = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        chat(("user", "Add.\n1 and 2"), ("assistant", "3")),
    ),
    "alpaca without input": (
        {"instruction": "Greet.", "input": "", "output": "Hi", "system": "Be kind."},
        chat(("system", "Be kind."), ("user", "Greet."), ("assistant", "Hi")),
    ),
    "orca": (
        {"id": "niv.1", "system_prompt": "Think.", "question": "Why?", "response": "So."},
        chat(("system", "Think."), ("user", "Why?"), ("assistant", "So.")),
    ),
    "orca without system": (
        {"system_prompt": "", "question": "Why?", "response": "So."},
        chat(("user", "Why?"), ("assistant", "So.")),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        chat(("user", "Hi"), ("assistant", "Yo")),
    ),
    "messages": (
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "context", "content": "C"},
                {"role": "user", "content": [{"type": "text", "text": "U"}, {"type": "text", "value": "V"}]},
                {"role": "assistant", "content": "A"},
            ]
        },
        chat(("system", "S"), ("context", "C"), ("user", "UV"), ("assistant", "A")),
    ),
    "messages with weights": (
        {
            "messages": [
                {"role": "user", "content": "U"},
                {"role": "assistant", "content": "no", "loss_weight": 0.0},
                {"role": "user", "content": "V"},
                {"role": "assistant", "content": "yes", "loss_weight": 1},
            ]
        },
        Chat(
            (
                Message("user", "U"),
                Message("assistant", "no", learned=False),
                Message("user", "V"),
                Message("assistant", "yes"),
            )
        ),
    ),
    "pair": ({"prompt": "P", "completion": "C"}, chat(("user", "P"), ("assistant", "C"))),
    "text": ({"text": "Once.", "meta": 3}, Document("Once.")),
}


DETECTED = {
    **ROWS,
    "messages in a language": (
        {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}], "lang": "sv"},
        chat(("user", "U"), ("assistant", "A"), language="sv"),
    ),
    "question and answer": ({"question": "Q", "answer": "A"}, chat(("user", "Q"), ("assistant", "A"))),
    "OrcaChat": (
        {
            "conversation": [{"input": "Q", "output": "A"}, {"input": "R", "output": "B"}],
            "instruction": "Think.",
            "source": "dolphin",
        },
        chat(("system", "Think."), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")),
    ),
    "OrcaBest": (
        {"cluster": {"samples": [{"input": "Q", "output": "A"}]}, "instruction": "", "num_samples": 1},
        chat(("user", "Q"), ("assistant", "A")),
    ),
    "Dolly": (
        {"instruction": "Q", "context": "It[12] is[a], [3, 4]so[citation needed].", "response": "A", "category": "qa"},
        chat(("context", "It is, so."), ("user", "Q"), ("assistant", "A")),
    ),
    "Dolly in German": (
        {
            "instruction": "Q",
            "context": "",
            "response": "A",
            "category": "open_qa",
            "instruction_original_en": "Q in English",
            "context_original_en": "",
            "response_original_en": "A in English",
            "id": 3,
            "language": "de",
        },
        chat(("user", "Q"), ("assistant", "A"), language="de"),
    ),
    "leet10k": (
        {"INSTRUCTION": "Sort.", "RESPONSE": "```sort()```", "SOURCE": "leetcode", "METADATA": None},
        chat(("user", "Sort."), ("assistant", "```sort()```")),
    ),
    "MegaCode": ({"USER": "Sort.", "ASSISTANT": "sort()"}, chat(("user", "Sort."), ("assistant", "sort()"))),
    "instruction and response": ({"instruction": "Q", "response": "A"}, chat(("user", "Q"), ("assistant", "A"))),
    "an empty answer of MegaCode": ({"USER": "Sort.", "ASSISTANT": " "}, LeftOut("question or answer empty")),
    "a null answer of MegaCode": ({"USER": "Sort.", "ASSISTANT": None}, LeftOut("question or answer empty")),
    "an empty question of MegaCode": ({"USER": "", "ASSISTANT": "A"}, LeftOut("question or answer empty")),
    "UltraChat": (
        {"id": "0", "data": ["Q", "A", "R", "B"]},
        chat(("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")),
    ),
    "dialogue that ends with a question": (
        {"dialogue": ["Q", "A", "R"]},
        chat(("user", "Q"), ("assistant", "A"), ("user", "R")),
    ),
    "preference of texts": (
        {"prompt": "P", "chosen": "C", "rejected": "R"},
        chat(("user", "P"), ("assistant", "C")),
    ),
    "preference of whole conversations": (
        {
            "prompt": "U",
            "chosen": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "C"}],
            "rejected": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "R"}],
        },
        chat(("user", "U"), ("assistant", "C")),
    ),
    "preference of messages": (
        {
            "prompt": [
                {"role": "user", "content": "U"},
                {"role": "assistant", "content": "said before"},
                {"role": "user", "content": "V"},
            ],
            "chosen": [{"role": "assistant", "content": "C"}],
            "rejected": [{"role": "assistant", "content": "R"}],
        },
        Chat(
            (
                Message("user", "U", learned=False),
                Message("assistant", "said before", learned=False),
                Message("user", "V", learned=False),
                Message("assistant", "C"),
            )
        ),
    ),
    "preference in ShareGPT's form": (
        {
            "conversations": [{"from": "human", "value": "U"}],
            "chosen": {"from": "gpt", "value": "C"},
            "rejected": {"from": "gpt", "value": "R"},
        },
        chat(("user", "U"), ("assistant", "C")),
    ),
    "preferred output": (
        {
            "input": {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]},
            "preferred_output": [{"role": "assistant", "content": "C"}],
            "non_preferred_output": [{"role": "assistant", "content": "R"}],
        },
        chat(("system", "S"), ("user", "U"), ("assistant", "C")),
    ),
    "SlimPajama": (
        {"text": "Once.", "meta": {"redpajama_set_name": "RedPajamaC4"}},
        Document("Once.", domain="RedPajamaC4"),
    ),
    "RedPajama": (
        {"text": "Once.", "meta": '{"url": "x", "language": "bg", "source": "wikipedia"}'},
        Document("Once.", "bg", "wikipedia"),
    ),
    "a file of GitHub": (
        {"text": "Once.", "meta": {"language": [{"name": "C", "bytes": "3"}], "source": "github"}},
        Document("Once.", domain="github"),
    ),
    "a page of CommonCrawl": (
        {"text": "Once.", "source": "cc/2019-30/en_head_0000.json.gz/line20"},
        Document("Once.", domain="cc"),
    ),
    "text with a note": ({"text": "Once.", "meta": "{a note}"}, Document("Once.")),
}


def unlearned(sample):
    """Return a conversation with what no loss looks at made equal."""
    if not isinstance(sample, Chat):
        return sample
    said = [m if m.role == "assistant" else Message(m.role, m.text) for m in sample.messages]
    return Chat(tuple(said), sample.language)


@pytest.mark.parametrize(("row", "sample"), DETECTED.values(), ids=DETECTED)
def test_a_layout_is_recognised_and_read(row, sample):
    layout = layouts.detect(row, where="x:1")
    assert unlearned(read(layout, row)) == unlearned(sample)


def test_a_rendered_alpaca_prompt_is_taken_out_of_its_wrapper():
    preamble = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    prompt = f"{preamble}\n\n### Instruction:\nAdd.\n\n### Response:"
    assert read("alpaca-rendered", {"prompt": prompt, "answer": "3"}) == chat(("user", "Add."), ("assistant", "3"))
    with pytest.raises(BadRowError, match="not in the Alpaca wrapper"):
        read("alpaca-rendered", {"prompt": "Add.", "answer": "3"})


@pytest.mark.parametrize("extra", ["", "No input", "<noinput>", "N/A", "THE LIST", "the list"])
def test_an_input_that_says_nothing_new_is_skipped(extra):
    row = {"instruction": "Sort the list.", "input": extra, "output": "O"}
    assert read("alpaca-gpt4", row) == chat(("user", "Sort the list."), ("assistant", "O"))


def test_an_input_is_joined_in_one_of_three_ways_and_always_in_the_same():
    def joints():
        users = [
            read("alpaca-gpt4", {"instruction": "Sort.", "input": str(n), "output": "O"}).messages[0].text
            for n in range(30)
        ]
        return [user.removeprefix("Sort.").removesuffix(str(n)) for n, user in enumerate(users)]

    assert set(joints()) == {"\n", "\n\n", " "}
    assert joints() == joints()


def test_dolphin_has_its_system_message_under_instruction():
    row = {"instruction": "Think.", "input": "Q", "output": "A"}
    assert read("dolphin", row) == chat(("system", "Think."), ("user", "Q"), ("assistant", "A"))
    assert read("alpaca", row) == chat(("user", "Think.\nQ"), ("assistant", "A"))


def test_a_context_beside_the_row_is_read_by_dolly_and_refused_where_it_would_be_lost():
    row = {"INSTRUCTION": "Q", "RESPONSE": "A", "METADATA": {"CATEGORY": "qa", "CONTEXT": "C [1]"}}
    assert read("dolly", row) == chat(("context", "C "), ("user", "Q"), ("assistant", "A"))
    with pytest.raises(BadRowError, match=r"`METADATA` holds a `CONTEXT`.*layout: dolly"):
        read(layouts.detect(row, where=""), row)


def test_lima_is_a_dialogue_under_the_key_of_sharegpt():
    row = {"conversations": ["Q", "A"], "source": "stackexchange"}
    assert read("dialogue", row) == chat(("user", "Q"), ("assistant", "A"))
    with pytest.raises(BadRowError, match=r"`conversations\.0` must be an object.*layout: dialogue"):
        read(layouts.detect(row, where=""), row)


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


@pytest.mark.parametrize(
    ("turns", "sample"),
    [
        ([human("a\\_b"), gpt("2 \\* 3 [1]")], chat(("user", "a_b"), ("assistant", "2 * 3"))),
        (
            [human("Hi"), human(" you "), gpt("Yo"), gpt("What?")],
            chat(("user", "Hi\nyou"), ("assistant", "Yo\nWhat?")),
        ),
        ([gpt("Hello"), human("Hi"), gpt("Yo")], LeftOut("no human begins")),
        ([{"from": "system", "value": "S"}, human("Hi"), gpt("Yo")], LeftOut("no human begins")),
        ([human("Hi"), gpt("")], LeftOut("empty answer")),
        ([human("Hi"), gpt(None)], LeftOut("empty answer")),
        ([human("Hi"), gpt(" [3] ")], LeftOut("empty answer")),
        ([human("Hi"), gpt("Yo"), human("And?")], LeftOut("ends with a question")),
    ],
)
def test_sharegpt_is_cleaned(turns, sample):
    assert read("sharegpt-clean", {"conversations": turns}) == sample


def test_an_empty_question_in_sharegpt_says_to_go_on():
    sample = read("sharegpt-clean", {"conversations": [human("Hi"), gpt("Yo"), human(None), gpt("More")]})
    assert sample.messages[2].text in ("...", "Please continue", "Go on", "")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"a": 1}, "the keys a fit no known layout"),
        ({}, "fit no known layout"),
        ({"instruction": "I", "output": "O", "messages": []}, "fit messages and alpaca"),
    ],
)
def test_what_cannot_be_recognised_must_be_stated(row, says):
    with pytest.raises(LlameroError, match=rf"^file:3: (?s:.*){says}(?s:.*)state `layout:`"):
        layouts.detect(row, where="file:3")


FLAT = dict.fromkeys(("message_id", "parent_id", "text", "role", "message_tree_id"))


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"instruction": "I", "response": "R"}, "instruction-response"),
        ({"instruction": "I", "response": "R", "context": "C"}, "dolly"),
        ({"conversations": []}, "sharegpt"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        (FLAT, "oasst-flat"),
        ({"instruction": "I", "output": "O", "text": "T"}, "alpaca"),
        ({"prompt": "P", "chosen": [], "rejected": [], "messages": []}, "preference"),
        ({"prompt": "P", "answer": "A"}, "pair"),
        ({"prompt": f"{ALPACA}\n\n### Instruction:\nP\n\n### Response:", "answer": "A"}, "alpaca-rendered"),
    ],
)
def test_of_two_layouts_the_more_specific_is_recognised(row, layout):
    assert layouts.detect(row, where="x:1") == layout


def test_no_set_of_keys_belongs_to_two_layouts():
    sets = [keys for layout in LAYOUTS.values() for keys in layout.keys]
    assert len(sets) == len(set(sets))


@pytest.mark.parametrize("row", [{"role": "prompter", "text": "Hi", "message_id": "x"}, {"role": "user", "text": "Hi"}])
def test_single_messages_are_not_taken_for_texts(row):
    with pytest.raises(LlameroError, match=r"x:1: a single message.*\n  fix: give whole trees"):
        layouts.detect(row, where="x:1")


def test_an_unknown_layout_is_answered_with_the_nearest():
    with pytest.raises(LlameroError, match="did you mean `sharegpt`"):
        layouts.layout_named("share_gpt")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_can_be_sent_to_another_process(name):
    assert pickle.loads(pickle.dumps(LAYOUTS[name])) == LAYOUTS[name]


TURN = {"role": "user", "content": "U"}
ANSWER = {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("layout", "row", "says"),
    [
        ("alpaca", {"instruction": "I"}, "`output` is missing; the row has instruction"),
        ("alpaca", {"instruction": None, "output": "O"}, "`instruction` is null"),
        ("alpaca", {}, "the row has no keys"),
        ("alpaca", {"\ud83d": "I"}, r"the row has \\ud83d$"),
        ("alpaca", {str(number): "I" for number in range(1000)}, r"18, 19 …$"),
        ("alpaca", {"instruction": 3, "output": "O"}, "`instruction` must be text, is int 3"),
        ("alpaca", {"instruction": "I", "input": ["x"], "output": "O"}, "`input` must be text, is list"),
        ("alpaca", {"instruction": "I", "output": "  \n"}, "answer is empty"),
        ("alpaca-gpt4", {"instruction": "I", "input": 3, "output": "O"}, "`input` must be text, is int"),
        ("orca", {"question": "Q", "response": "ok \ud83d"}, r"`response` holds half a character .* at 3"),
        ("pair", {"prompt": "P"}, "`answer` is missing"),
        ("dolphin", {"instruction": "I", "output": "O"}, "`input` is missing"),
        ("dolly", {"instruction": "I", "context": ["C"], "response": "R"}, "`context` must be text, is list"),
        ("dolly", {"instruction": "I", "context": "", "response": ""}, "answer is empty"),
        ("instruction-response", {"USER": "U"}, "`instruction` is missing; the row has USER"),
        ("instruction-response", {"ASSISTANT": "A"}, "`user` is missing; the row has ASSISTANT"),
        ("instruction-response", {"USER": 3, "ASSISTANT": "A"}, "`USER` must be text, is int 3"),
        ("text", {"text": {"a": 1}}, "`text` must be text, is dict"),
        ("sharegpt", {"conversations": []}, "`conversations` must be a list of turns"),
        ("sharegpt", {"conversations": "hi"}, "`conversations` must be a list of turns, is str"),
        ("sharegpt", {}, "`conversations` must be a list of turns, is NoneType"),
        ("sharegpt", {"conversations": [3]}, r"`conversations\.0` must be an object, is int 3$"),
        ("sharegpt", {"conversations": [{"from": "bing", "value": "x"}]}, r"`conversations\.0\.from` is str 'bing'"),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "x"}]}, r"`conversations\.0\.from` is list"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, r"`value` is missing.*in `conversations\.0`"),
        (
            "sharegpt",
            {"conversations": [gpt("A"), human("U")]},
            r"assistant speaks after nobody \(in `conversations.0`",
        ),
        ("sharegpt", {"conversations": [human("U"), human("V")]}, "^no assistant turn"),
        ("sharegpt-clean", {"conversations": ["hi"]}, r"`conversations\.0` must be an object, is str 'hi'"),
        ("sharegpt-clean", {"conversations": [human("U"), {"from": "bing"}]}, r"`conversations\.1\.from` is str"),
        ("messages", {"messages": [TURN, {"role": "tool", "content": "x"}]}, r"`messages\.1\.role` is str 'tool'"),
        ("messages", {"messages": [TURN, {"content": "x"}]}, r"`messages\.1\.role` is NoneType None"),
        ("messages", {"messages": [{**TURN, "content": None}]}, r"`content` is null.*in `messages\.0`"),
        ("messages", {"messages": [{**TURN, "content": [{"type": "image"}]}]}, r"`messages\.0\.content` has parts"),
        ("messages", {"messages": [{**TURN, "content": "\udc00"}]}, r"`content` holds half a char.*`messages\.0`"),
        ("messages", {"messages": [{**TURN, "loss_weight": 0.5}]}, r"`messages\.0\.loss_weight` is float 0\.5"),
        ("messages", {"messages": [{**TURN, "loss_weight": [1]}]}, r"`messages\.0\.loss_weight` is"),
        ("messages", {"messages": [TURN]}, "^no assistant turn"),
        ("messages", {"messages": [TURN, {**ANSWER, "loss_weight": 0}]}, "^no assistant turn"),
        ("messages", {"messages": [TURN, TURN, ANSWER]}, r"user speaks after user \(in `messages\.1`\)"),
        ("messages", {"messages": [TURN, {**ANSWER, "content": ""}]}, r"the assistant says nothing \(in `messages\.1`"),
        (
            "messages",
            {"messages": [TURN, ANSWER, {"role": "system", "content": "S"}]},
            r"a system message that is not the first \(in `messages\.2`\)",
        ),
        ("orca-chat", {"conversation": []}, "`conversation` must be a list of turns"),
        ("orca-chat", {"conversation": ["Q"]}, r"`conversation\.0` must be an object, is str 'Q'"),
        ("orca-chat", {"conversation": [{"input": "Q"}]}, r"`output` is missing.*in `conversation\.0`"),
        ("dialogue", {"data": "Compose a letter."}, "`data` must be a list of turns, is str 'Compose"),
        ("dialogue", {"data": ["Q"]}, "^no assistant turn"),
        ("dialogue", {"data": ["Q", 3]}, r"`data\.1` must be text, is int 3"),
        ("dialogue", {"data": ["Q", " "]}, r"the assistant says nothing \(in `data\.1`\)"),
        ("preference", {"prompt": "P", "rejected": "R"}, "`chosen` is missing"),
        ("preference", {"prompt": "P", "chosen": []}, "`chosen` must be a list of turns"),
        ("preference", {"prompt": "P", "chosen": ""}, "the assistant says nothing"),
        ("preference", {"chosen": [TURN, ANSWER, TURN], "rejected": []}, "^no assistant turn"),
        ("preference", {"input": {"messages": [TURN]}, "preferred_output": [3]}, r"`preferred_output\.0` must be an"),
        ("oasst", {"message_id": "x", "text": "Hi"}, "a message of OASST outside of a tree"),
        ("oasst-flat", {"message_id": "x", "text": "Hi"}, "a single message"),
    ],
)
def test_a_malformed_row_names_the_key_and_the_value(layout, row, says):
    with pytest.raises(BadRowError, match=says):
        read(layout, row)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "input", "output", "samples"]), inner)
    ),
    max_leaves=8,
)
KEYS = sorted({key for layout in LAYOUTS.values() for keys in layout.keys for key in keys} | {"METADATA", "meta"})


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "oasst-flat"])
@given(row=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6))
def test_any_row_is_read_or_refused_as_a_bad_row(name, row):
    try:
        samples = LAYOUTS[name].read(row, Options())
    except BadRowError:
        return
    assert all(isinstance(sample, Chat | Document | LeftOut) for sample in samples)


REAL = [
    ("instruct/alpaca/alpaca_en_demo.json", None, 999),
    ("instruct/alpaca/alpaca_tiny.json", "alpaca", None),
    ("instruct/alpaca/identity.json", None, None),
    ("instruct/alpaca/alpaca_en_demo.json", "alpaca-gpt4", 999),
    ("instruct/code_alpaca/code_alpaca_2k.json", None, None),
    ("instruct/lima/lima.json", None, None),
    ("instruct/dolly/dolly.jsonl", "alpaca-rendered", None),
    ("instruct/sharegpt/dummy_conversation.json", None, None),
    ("instruct/sharegpt/dummy_conversation.json", "sharegpt-clean", None),
    ("instruct/sharegpt/sharegpt_sample.json", "sharegpt", 50),
    ("instruct/sharegpt/sharegpt_sample.json", "sharegpt-clean", 50),
    ("instruct/messages/v1_sft_demo.jsonl", None, None),
    ("instruct/preference/dpo_en_demo.json", None, 300),
    ("instruct/orca/validation.jsonl", None, 284),
]
EMPTY_ANSWERS = {"instruct/code_alpaca/code_alpaca_2k.json": 2}


@NEEDS_SHARED
@pytest.mark.parametrize(("name", "layout", "count"), REAL, ids=[f"{name} {layout or ''}" for name, layout, _ in REAL])
def test_real_files_are_read_completely(name, layout, count):
    path = SHARED / name
    raw = path.read_text(encoding="utf-8")
    expected = json.loads(raw) if path.suffix == ".json" else [json.loads(line) for line in raw.splitlines()]
    located = list(rows.rows(path))
    assert [row.row for row in located] == expected
    assert count in (None, len(expected))
    layout = layout or layouts.detect(expected[0], where=name)
    bad = []
    for row in located:
        assert row.row is not None
        try:
            sample = read(layout, row.row)
        except BadRowError as error:
            bad.append(f"{row.where}: {error}")
            continue
        assert isinstance(sample, Chat)
        assert sample.messages[-1].role == "assistant"
        assert sample.messages[-1].learned
    assert [problem.split(": ", 1)[1] for problem in bad] == ["the answer is empty"] * EMPTY_ANSWERS.get(name, 0)


@NEEDS_SHARED
def test_the_chosen_side_of_real_preferences_is_learned():
    path = SHARED / "instruct/preference/dpo_en_demo.json"
    for row in json.loads(path.read_text(encoding="utf-8")):
        sample = read("preference", row)
        assert sample.messages[-1] == Message("assistant", row["chosen"]["value"])
        assert [message.text for message in sample.messages[:-1]] == [turn["value"] for turn in row["conversations"]]
        assert not any(message.learned for message in sample.messages[:-1])


@NEEDS_SHARED
def test_the_parts_of_a_real_corpus_are_texts():
    found = {}
    for raw in rows.rows(SHARED / "longtext/redpajama_sample"):
        assert raw.row is not None
        assert layouts.detect(raw.row, where=raw.where) == "text"
        sample = read("text", raw.row)
        found.setdefault(Path(raw.where).name.split(".")[0], set()).add((sample.language, sample.domain))
    assert {language for language, _ in found["sample_wiki1"]} >= {"bg"}
    assert len(found) == 7
