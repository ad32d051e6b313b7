"""Rows of files: what holds them, the forms that people have, and every complaint by its line."""

import gzip
import json
import re

import pytest

from dpo_triton.data import Pair, parse_pair, read_pairs

PLAIN = dict(prompt="one and", chosen=" two", rejected=" too many of them")


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHAT = dict(prompt=[user("hi")], chosen=[assistant("yes")], rejected=[assistant("no")])


def pair_of(row):
    pair = parse_pair("f:1", json.dumps(row))
    return pair.prompt, pair.chosen, pair.rejected


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("is_zipped", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows"])
def test_what_a_file_holds_is_seen_from_its_content(name, is_zipped, tmp_path):
    rows = [CHAT | {"prompt": [user("你好")]}, PLAIN, CHAT]
    path = tmp_path / name
    path.write_bytes(gzip.compress(lines(rows)) if is_zipped else lines(rows))
    pairs = list(read_pairs(path))
    assert pairs == [Pair(f"{path}:{n}", **row) for n, row in enumerate(rows, start=1)]
    assert list(read_pairs(path, limit=2)) == pairs[:2]


def test_a_blank_line_is_no_row_and_keeps_the_line_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(PLAIN)}\n\n{json.dumps(PLAIN)}\n")
    assert [pair.source for pair in read_pairs(path)] == [f"{path}:2", f"{path}:4"]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_array_is_read_in_pieces_with_the_line_of_each_row(
    indent, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr("dpo_triton.data._reading.CHUNK", chunk)
    rows = [PLAIN, CHAT, PLAIN | {"chosen": 'a "]" and a \\ in it'}]
    text = json.dumps(rows, indent=indent)
    path = tmp_path / "rows.json"
    path.write_text(f"\ufeff\n{text}\n", encoding="utf-8")
    pairs = list(read_pairs(path))
    assert [pair[1:4] for pair in pairs] == [tuple(row.values()) for row in rows]
    numbers = [int(pair.source.rpartition(":")[2]) for pair in pairs]
    begins = [n for n, line in enumerate(text.splitlines(), start=2) if line == " {"]
    assert numbers == (begins if indent else [2, 2, 2])


FORMS = {
    "plain": (PLAIN, ("one and", " two", " too many of them")),
    "messages": (CHAT, ([user("hi")], [assistant("yes")], [assistant("no")])),
    "whole conversations, and the prompt as a string": (
        dict(
            prompt="hi",
            chosen=[user("hi"), assistant("yes")],
            rejected=[user("hi"), assistant("no")],
        ),
        ([user("hi")], [assistant("yes")], [assistant("no")]),
    ),
    "whole conversations, and the prompt as messages": (
        dict(
            prompt=[user("hi")],
            chosen=[user("hi"), assistant("yes")],
            rejected=[user("hi"), assistant("no")],
        ),
        ([user("hi")], [assistant("yes")], [assistant("no")]),
    ),
    "a string and messages": (
        dict(prompt="hi", chosen=[assistant("yes")], rejected=[assistant("no")]),
        ([user("hi")], [assistant("yes")], [assistant("no")]),
    ),
    "messages and strings": (
        dict(prompt=[user("hi")], chosen="yes", rejected="no"),
        ([user("hi")], [assistant("yes")], [assistant("no")]),
    ),
    "no prompt, messages": (
        dict(
            chosen=[user("hi"), assistant("yes"), user("one"), assistant("two")],
            rejected=[user("hi"), assistant("yes"), user("one"), assistant("no")],
        ),
        (
            [user("hi"), assistant("yes"), user("one")],
            [assistant("two")],
            [assistant("no")],
        ),
    ),
    "no prompt, text": (
        dict(chosen="Human: hi\n\nAssistant: yes two", rejected="Human: hi\n\nAssistant: yet"),
        ("Human: hi\n\nAssistant:", " yes two", " yet"),
    ),
    "ShareGPT": (
        dict(
            conversations=[{"from": "human", "value": "hi"}],
            chosen={"from": "gpt", "value": "yes"},
            rejected={"from": "gpt", "value": "no"},
        ),
        ([user("hi")], [assistant("yes")], [assistant("no")]),
    ),
    "parts of text": (
        dict(
            prompt=[user([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}])],
            chosen=[assistant([{"type": "text", "text": "yes"}])],
            rejected=[assistant("no")],
        ),
        ([user("hi")], [assistant("yes")], [assistant("no")]),
    ),
    "a system beside": (
        CHAT | {"system": "be brief"},
        (
            [{"role": "system", "content": "be brief"}, user("hi")],
            [assistant("yes")],
            [assistant("no")],
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form):
    row, expected = FORMS[form]
    assert pair_of(row) == expected
    assert pair_of(row | {"score_chosen": 5.0, "id": "x"}) == expected  # what says nothing


def test_tools_and_what_else_a_message_has_reach_the_template():
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    row = CHAT | {"chosen": [call, {"role": "tool", "content": "3"}, assistant("3")]}
    for given in (tools, json.dumps(tools)):
        pair = parse_pair("f:1", json.dumps(row | {"tools": given}))
        assert pair.tools == tools
    assert pair.chosen[0] == call | {"content": ""}


BAD = {
    "{": "a row must be one JSON object",
    "[]": "a row must be a JSON object, got list",
    "null": "got NoneType",
    '{"prompt": "a", "chosen": "b"}': "must have rejected, got prompt, chosen",
    '{"prompt": "a", "chosen": "b", "rejected": null}': "must have rejected",
    '{"prompt": "a", "chosen": "b", "rejected": 3}': "text or messages in rejected, got int",
    '{"prompt": [], "chosen": "b", "rejected": "c"}': "in prompt, got an empty list",
    '{"prompt": "a", "chosen": "b", "rejected": [{"role": "user", "content": "c"}]}': "of one kind",
    '{"chosen": "b", "rejected": "c"}': "begin alike and then differ",
    '{"chosen": "a b", "rejected": "a b"}': "begin alike|must have",
    '{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}': "half of a surrogate pair",
    json.dumps(PLAIN | {"tools": [{"name": "f"}]}): "tools needs a chat template",
    json.dumps(PLAIN | {"system": "x"}): "system needs a chat template",
    json.dumps(CHAT | {"images": ["a.png"]}): "must have no images, which",
    json.dumps(CHAT | {"chat_template_kwargs": {"thinking": False}}): "no chat_template_kwargs",
    json.dumps(CHAT | {"tools": "{"}): "tools must be a list",
    json.dumps(CHAT | {"chosen": [{"role": "assistant"}]}): "must have text in chosen",
    json.dumps(CHAT | {"chosen": ["yes"]}): "must have messages in chosen",
    json.dumps(CHAT | {"chosen": [{"content": "a"}]}): "must have a role in chosen",
    json.dumps(CHAT | {"chosen": [user("a")]}): "begin with an assistant's message",
    json.dumps(CHAT | {"chosen": [assistant("a"), {"role": "critic", "content": "b"}]}): "critic",
    json.dumps(CHAT | {"chosen": [assistant([{"type": "image"}])]}): "parts of text.*got image",
    json.dumps(
        CHAT | {"prompt": [{"role": "system", "content": "a"}], "system": "b"}
    ): "drop either",
    json.dumps(
        dict(
            prompt="other", chosen=[user("a"), assistant("b")], rejected=[user("a"), assistant("c")]
        )
    ): "must have its prompt in both",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:40])
def test_a_malformed_row_is_an_error_that_names_file_and_line(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n{text}\n")
    with pytest.raises(ValueError, match=f"rows\\.jsonl:2: .*({BAD[text]})") as raised:
        list(read_pairs(path))
    assert "\n" not in str(raised.value)
    assert len(list(read_pairs(path, limit=1))) == 1


def test_bytes_that_are_no_utf_8_and_deep_nesting_are_errors_of_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    for bad in (b"\xff\xfe\xff", b"[" * 100_000):
        path.write_bytes(lines([PLAIN]) + bad + b"\n")
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: a row must be"):
            list(read_pairs(path))


@pytest.mark.parametrize("what", ["cut", "corrupt", "cut at once"])
def test_a_broken_gzip_file_is_an_error_that_says_where(what, tmp_path):
    content = gzip.compress(lines([PLAIN | {"chosen": f"{n}" * 50} for n in range(3000)]))
    broken = {
        "cut": content[: len(content) // 2],
        "corrupt": content[:2000] + bytes(200) + content[2200:],
        "cut at once": content[:5],
    }[what]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=re.escape(str(path)) + r".*(cut or corrupt|must be)"):
        list(read_pairs(path))


@pytest.mark.parametrize(
    "text", ['[{"prompt": "a"', "[1 2", '[{"prompt": }]'], ids=["cut", "comma", "value"]
)
def test_an_array_that_is_no_json_is_an_error_of_its_line(text, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("\n" + text)
    with pytest.raises(ValueError, match=r"rows\.json:2: (the array must be JSON|a row must)"):
        list(read_pairs(path))
