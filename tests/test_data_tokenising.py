"""Pairs as tokens: special tokens once each, templates, turns, what is cut, and what is kept."""

import datetime
import json

import numpy as np
import pytest

pytest.importorskip("transformers")
from tiny_llama import CHAT, save_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_triton.data import Pair, PairTokenizer, TokenRows, tokenise_files

USER, ASSISTANT, END, HI, YES, NO, ONE, TWO = 2, 3, 4, 10, 12, 13, 5, 6
GENERATION = (  # an assistant's <end> is outside of what the template marks
    "{% for m in messages %}{{ '<' + m['role'] + '> ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


CHAT_ROW = dict(prompt=[user("hi")], chosen=[assistant("yes")], rejected=[assistant("no no")])


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The tokenizer of the tiny Llama, a token a word."""
    return AutoTokenizer.from_pretrained(save_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture
def templated(words):
    """Set the template of that tokenizer, until the test is over."""

    def set_template(template):
        words.chat_template = template
        return words

    yield set_template
    words.chat_template = CHAT


def characters(pre_tokenizer=None, *, bos=False, eos=False, decoder=None):
    """A tokenizer of a token a character, with what Llama 2 does before a text and around it."""
    vocab = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", *"\u2581\u0120\n\u010aabcd:"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    single = [*["<s>"] * bos, "$A", *["</s>"] * eos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def encode(tokenizer, row, **options):
    """The row's tokens, or the error."""
    options = dict(max_length=100) | options
    (result,) = PairTokenizer(tokenizer, **options)([Pair("f:7", **row)])
    if isinstance(result, ValueError):
        raise result
    return result


def text_of(tokenizer, row):
    return [
        "".join(tokenizer.convert_ids_to_tokens(row[name]))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    ]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_begins_and_eos_ends_a_plain_pair_once_each(bos, eos):
    tokenizer = characters(bos=bos, eos=eos)
    row = encode(tokenizer, dict(prompt="ab", chosen="c", rejected="d</s>"))
    assert text_of(tokenizer, row) == ["<s>" * bos + "ab", "c</s>", "d</s>"]
    rendered = dict(prompt="<s>ab", chosen="c</s>\n", rejected="d")
    row = encode(tokenizer, rendered)
    assert text_of(tokenizer, row) == ["<s>ab", "c</s>\n", "d</s>"]


METASPACE = {
    "always": pre_tokenizers.Metaspace(prepend_scheme="always"),
    "first": pre_tokenizers.Metaspace(prepend_scheme="first"),
    "bytes": pre_tokenizers.ByteLevel(add_prefix_space=True),
}


@pytest.mark.parametrize("scheme", METASPACE)
def test_no_space_is_scored_that_is_not_there(scheme):
    tokenizer = characters(METASPACE[scheme], bos=True)
    space = "\u0120" if scheme == "bytes" else "\u2581"
    row = encode(tokenizer, dict(prompt="a:", chosen="b c", rejected=" d"))
    assert text_of(tokenizer, row) == [f"<s>{space}a:", f"b{space}c</s>", f"{space}d</s>"]


def test_a_normaliser_that_puts_a_space_before_every_text_is_seen_too():
    tokenizer = characters()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.backend_tokenizer.decoder = decoders.Replace("\u2581", " ")
    row = encode(tokenizer, dict(prompt="a", chosen="b c", rejected=" d"))
    assert text_of(tokenizer, row) == ["\u2581a", "b\u2581c</s>", "\u2581d</s>"]


def test_a_prompt_without_a_token_is_an_error_and_with_bos_is_none():
    row = dict(prompt="", chosen="b", rejected="c")
    with pytest.raises(ValueError, match="f:7: the prompt must have a token at least"):
        encode(characters(), row)
    assert encode(characters(bos=True), row)["prompt_ids"] == [1]


def test_only_the_assistants_turns_of_an_answer_are_scored(words):
    chosen = [assistant("yes"), user("one"), assistant("two two")]
    row = encode(words, CHAT_ROW | dict(chosen=chosen))
    assert row["prompt_ids"] == [USER, HI, END, ASSISTANT]
    assert row["chosen_ids"] == [YES, END, USER, ONE, END, ASSISTANT, TWO, TWO, END]
    assert row["chosen_mask"] == [1, 1, 0, 0, 0, 0, 1, 1, 1]
    assert row["rejected_mask"] == [1] * 3
    row = encode(words, CHAT_ROW | dict(chosen=[assistant("yes"), user("one")]))
    assert row["chosen_mask"] == [1, 1, 0, 0, 0]


def test_the_templates_own_mask_goes_before(templated):
    words = templated(GENERATION)
    chosen = [assistant("yes"), user("one"), assistant("two two")]
    row = encode(words, CHAT_ROW | dict(chosen=chosen))
    assert row["chosen_ids"] == [YES, END, USER, ONE, END, ASSISTANT, TWO, TWO, END]
    assert row["chosen_mask"] == [1, 0, 0, 0, 0, 0, 1, 1, 0]  # the template leaves <end> out


def test_a_template_that_writes_turns_otherwise_later_is_an_error(templated):
    chosen = [assistant("yes"), user("one"), assistant("two")]
    latest = (
        "{% if not add_generation_prompt and messages[-1]['content'] == 'two' %}one {% endif %}"
    )
    with pytest.raises(ValueError, match="f:7: the prompt's tokens must begin those of the whole"):
        encode(templated(latest + CHAT), CHAT_ROW | dict(chosen=chosen))
    # An assistant's turn is shortened once another message follows, as thoughts are.
    last_only = CHAT.replace(
        "m['content'] +", "('many' if m['content'] == 'yes' and not loop.last else m['content']) +"
    )
    with pytest.raises(ValueError, match="f:7: the turn's tokens must begin those of the whole"):
        encode(templated(last_only), CHAT_ROW | dict(chosen=chosen))


def test_a_template_that_raises_is_an_error_with_its_message(templated):
    system = dict(prompt=[{"role": "system", "content": "one"}, user("hi")])
    picky = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    words = templated(picky + CHAT)
    encode(words, CHAT_ROW)
    with pytest.raises(ValueError, match="f:7: the chat template does not take the row: no system"):
        encode(words, CHAT_ROW | system)
    with pytest.raises(ValueError, match="f:7: the chat template does not take the row: 'nobody'"):
        encode(templated("{{ nobody.name }}" + CHAT), CHAT_ROW)
    with pytest.raises(ValueError, match="f:7: the pair is conversational and the tokenizer has"):
        encode(templated(None), CHAT_ROW)


def test_tools_are_written_by_the_template_or_refused(templated):
    tools = [{"type": "function", "function": {"name": "one"}}]
    with pytest.raises(ValueError, match="f:7: the row has tools, which"):
        encode(templated(CHAT), CHAT_ROW | dict(tools=tools))
    writes = "{% for t in tools or [] %}{{ t['function']['name'] + ' ' }}{% endfor %}" + CHAT
    row = encode(templated(writes), CHAT_ROW | dict(tools=tools))
    assert row["prompt_ids"] == [ONE, USER, HI, END, ASSISTANT]


def test_a_template_that_prints_the_date_prints_that_of_the_run(templated):
    words = templated("{{ 'one ' if strftime_now('%d') == '03' else 'two ' }}" + CHAT)
    for day, token in ((3, ONE), (4, TWO)):
        row = encode(words, CHAT_ROW, date=datetime.date(2024, 5, day))
        assert row["prompt_ids"][0] == token


def test_answers_are_cut_and_foreign_ids_refused(words):
    row = encode(words, CHAT_ROW, max_length=5)
    assert (row["chosen_ids"], row["chosen_mask"]) == ([YES], [1])
    assert (row["chosen_is_cut"], row["rejected_is_cut"]) == (True, True)
    assert encode(words, CHAT_ROW, max_length=3)["prompt_ids"] == [USER, HI, END]
    assert not encode(words, CHAT_ROW, max_length=6)["chosen_is_cut"]
    with pytest.raises(ValueError, match=r"f:7: token ids must be in \[0, 13\)"):
        encode(words, CHAT_ROW, vocab_size=13)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        PairTokenizer(words, max_length=0)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_folder_has_the_rows_of_all_files_and_views_of_them(words, tmp_path):
    plain = [dict(prompt="hi", chosen="yes " * n, rejected="no") for n in range(5)]
    paths = [write(tmp_path / "a.jsonl", plain), write(tmp_path / "b.jsonl", [CHAT_ROW])]
    rows = tokenise_files(paths, tmp_path / "tokens", words, max_length=5, progress=False)
    assert [row["source"] for row in rows][4:] == [f"{paths[0]}:5", f"{paths[1]}:1"]
    assert rows[3]["chosen_ids"] == [YES, YES, YES, END]
    assert rows.scored.tolist() == [[1, 2], [2, 2], [3, 2], [4, 2], [4, 2], [1, 1]]
    assert rows.lengths[4].tolist() == [5, 3]
    assert rows.report.answers_cut == 3
    some = rows.select([4, 0])
    assert [row["source"] for row in some] == [f"{paths[0]}:5", f"{paths[0]}:1"]
    assert some[1:][0] == rows[0] == TokenRows(tmp_path / "tokens")[0]
    limited = tokenise_files(
        paths, tmp_path / "tokens", words, max_length=5, limit=1, progress=False
    )
    assert [row["source"] for row in limited] == [f"{paths[0]}:1", f"{paths[1]}:1"]


def test_tokens_are_kept_until_what_decides_them_changes(words, tmp_path, monkeypatch):
    path, folder = write(tmp_path / "a.jsonl", [CHAT_ROW]), tmp_path / "tokens"
    calls = []
    made = PairTokenizer.__call__
    monkeypatch.setattr(
        PairTokenizer, "__call__", lambda self, pairs: calls.append(1) or made(self, pairs)
    )

    def tokenise(**options):
        options = dict(max_length=9) | options
        return len(calls), tokenise_files([path], folder, words, progress=False, **options)[0]

    row = tokenise()[1]
    assert tokenise(date=datetime.date(1999, 1, 1)) == (1, row)
    assert len(calls) == 1
    tokenise(max_length=8)
    write(path, [CHAT_ROW, CHAT_ROW])
    tokenise(max_length=8)
    assert len(calls) == 3
    (folder / "header.json").write_text("{")
    tokenise(max_length=8)
    assert len(calls) == 4


def test_bad_rows_are_an_error_or_left_out_and_counted(words, tmp_path):
    bad = [{"prompt": "hi"}, CHAT_ROW | {"prompt": [user("hi")], "tools": [{"name": "f"}]}]
    good = [dict(prompt="hi", chosen="yes", rejected="no")] * 2
    path = write(tmp_path / "a.jsonl", [good[0], *bad, good[1]])

    def tokenise(**options):
        options = dict(max_length=9, progress=False) | options
        return tokenise_files([path], tmp_path / "tokens", words, **options)

    with pytest.raises(ValueError, match=r"a\.jsonl:2: a row must have chosen"):
        tokenise()
    assert not list(tmp_path.glob("tokens*"))  # nothing half done
    rows = tokenise(skip_bad_rows=True)
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:4"]
    assert rows.report.bad == 2
    said = "\n".join(rows.report.lines())
    assert "2 rows left out, since they cannot be used:" in said
    assert "a.jsonl:2: a row must have chosen" in said
    assert "a.jsonl:3: the row has tools" in said
    assert len(tokenise(skip_bad_rows=True, limit=2)) == 2  # of the good ones
    write(path, bad)
    with pytest.raises(ValueError, match=r"no pairs in .*a\.jsonl:1: a row must have chosen"):
        tokenise(skip_bad_rows=True)


def test_memory_does_not_hold_the_rows(words, tmp_path):
    path = write(tmp_path / "a.jsonl", [dict(prompt="hi", chosen="yes " * 90, rejected="no")] * 50)
    rows = tokenise_files([path], tmp_path / "tokens", words, max_length=99, progress=False)
    mapped = [value for value in vars(rows).values() if isinstance(value, np.memmap)]
    assert sum(m.nbytes for m in mapped) > 50 * 5 * 90
    held = [value for value in vars(rows).values() if type(value) is np.ndarray]
    assert sum(value.nbytes for value in held) == 8 * len(rows)
