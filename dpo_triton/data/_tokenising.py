"""Pairs as tokens: templates or plain text, special tokens once each, the answers marked."""

import datetime
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ._formats import Message, Pair

Row = dict[str, Any]  # see PairTokenizer
# A tokenizer that puts a space before every text gets this before an answer, and it is cut off.
ANCHORS = ("\n", "|", "=", "\u200b")
GENERATION = re.compile(r"\{%-?\s*generation\b")
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class _Answer(NamedTuple):
    ids: list[int]  # after the prompt
    mask: list[int]  # 1 where an assistant speaks, else 0


class _Turn(NamedTuple):
    """Of a conversation in which an assistant speaks: its text up to there, and to the end."""

    before: str
    after: str


class PairTokenizer:
    """Tokenises pairs, many at a time.

    Plain text: the prompt begins with what the tokenizer puts before a text (bos), if it has not
    got it; the answer is tokenised apart, so that the prompt's tokens do not depend on it, without
    a space that is not there, and ends with eos, if it does not end so already.

    A conversation: what the chat template writes. Of the answer only the assistant's turns are
    scored: those that the template itself marks with `{% generation %}`, else those between the
    text with the header of a turn and the text with that turn, which must begin the whole.

    Args:
        tokenizer: of transformers, fast or slow.
        max_length: prompt and answer are cut from the right to so many tokens.
        vocab_size: of the model; an id beyond it is an error. None: not checked.
        date: what chat templates print that print today's; by default today's.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        vocab_size: int | None = None,
        date: datetime.date | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.vocab_size = vocab_size
        self.date = date or datetime.date.today()
        self._marks_turns = bool(GENERATION.search(str(tokenizer.chat_template)))
        self._templates: dict[bool, str] = {}  # with tools, without
        self._prefix = self._what_begins_a_text()
        self._anchor = self._what_keeps_a_space_away()
        self._ids: dict[str, list[int]] = {}  # of the batch's texts

    def __call__(self, pairs: Sequence[Pair]) -> list[Row | ValueError]:
        """Tokenise pairs.

        Returns:
            One for each pair, a row or what is wrong with it, by file and line. A row is what
            `dpo_triton.precompute` takes: prompt_ids, chosen_ids, rejected_ids, lists of ints;
            chosen_mask, rejected_mask, 1 at the scored ids of an answer, else 0; source;
            chosen_is_cut, rejected_is_cut, whether max_length cut that answer.
        """
        renderings = [self._attempt(self._render, pair) for pair in pairs]
        texts = {
            text: None
            for pair, rendered in zip(pairs, renderings, strict=True)
            if not isinstance(rendered, ValueError)
            for text in self._texts(pair, rendered)
        }
        every = self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
        self._ids = dict(zip(texts, every, strict=True))
        return [
            rendered
            if isinstance(rendered, ValueError)
            else self._attempt(self._row, pair, rendered)
            for pair, rendered in zip(pairs, renderings, strict=True)
        ]

    @staticmethod
    def _attempt(function: Any, pair: Pair, *args: Any) -> Any:
        """The result, or the ValueError with the pair's source."""
        try:
            return function(pair, *args)
        except ValueError as error:
            return ValueError(f"{pair.source}: {error}")

    def _render(self, pair: Pair) -> Any:
        """None of plain text; of a conversation the prompt's text and each answer's turns."""
        if isinstance(pair.prompt, str):
            return None
        if not self.tokenizer.chat_template:
            raise ValueError(
                "the pair is conversational and the tokenizer has no chat template; take a model "
                "whose tokenizer has one, or pairs of plain strings"
            )
        if pair.tools and "tools" not in self._dated_template(pair.tools):
            raise ValueError("the row has tools, which the chat template does not write")
        prompt_text = self._template(pair, pair.prompt, add_generation_prompt=True)
        answers = (pair.chosen, pair.rejected)
        return prompt_text, [self._turns(pair, answer) for answer in answers]

    def _turns(self, pair: Pair, answer: Any) -> list[_Turn]:
        """The last one's `after` is the whole text; its `before` too where nobody speaks there."""
        assert isinstance(pair.prompt, list)
        turns = []
        for i, message in enumerate(answer):
            is_scored = message["role"] == "assistant" and not self._marks_turns
            if is_scored or i + 1 == len(answer):
                so_far = [*pair.prompt, *answer[: i + 1]]
                after = self._template(pair, so_far)
                before = after
                if is_scored:
                    before = self._template(pair, so_far[:-1], add_generation_prompt=True)
                turns.append(_Turn(before, after))
        return turns

    def _template(self, pair: Pair, messages: list[Message], **options: Any) -> Any:
        """Text, or with return_dict tokens."""
        options = dict(tokenize=False) | options
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._dated_template(pair.tools),
                tools=pair.tools,
                **options,
            )
        except Exception as error:  # whatever the template's author raises, or forgot
            raise ValueError(
                f"the chat template does not take the row: {error or type(error).__name__}"
            ) from error

    def _dated_template(self, tools: list[Any] | None) -> str:
        """The tokenizer's chat template, in which today's date is written out."""
        template = self._templates.get(bool(tools))
        if template is None:
            template = str(self.tokenizer.get_chat_template(tools=tools))
            template = TODAY.sub(lambda found: repr(self.date.strftime(found[2])), template)
            self._templates[bool(tools)] = template
        return template

    def _texts(self, pair: Pair, rendered: Any) -> list[str]:
        """All that is to be tokenised."""
        if rendered is None:
            return [str(pair.prompt), self._anchor + pair.chosen, self._anchor + pair.rejected]  # type: ignore[operator]
        prompt_text, answers = rendered
        return [prompt_text, *(text for turns in answers for turn in turns for text in turn)]

    def _row(self, pair: Pair, rendered: Any) -> Row:
        if rendered is None:
            ids = self._ids[str(pair.prompt)]
            prompt_ids = ids if ids[: len(self._prefix)] == self._prefix else self._prefix + ids
            answers = [self._plain_answer(str(text)) for text in (pair.chosen, pair.rejected)]
        else:
            prompt_ids = self._ids[rendered[0]]
            answers = [
                self._answer(pair, answer, turns, prompt_ids)
                for answer, turns in zip((pair.chosen, pair.rejected), rendered[1], strict=True)
            ]
        if not prompt_ids:
            raise ValueError(
                "the prompt must have a token at least, since it predicts the answer's first; the "
                "tokenizer puts none (bos) before a text: write something"
            )
        for ids in (prompt_ids, *(answer.ids for answer in answers)):
            outside = [i for i in ids if i < 0 or i >= (self.vocab_size or i + 1)]
            if outside:
                raise ValueError(
                    f"token ids must be in [0, {self.vocab_size}), the model's vocabulary, got "
                    f"{outside[0]}; the tokenizer is another model's"
                )
        row: Row = dict(source=pair.source, prompt_ids=prompt_ids[: self.max_length])
        room = max(0, self.max_length - len(prompt_ids))
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            row[f"{name}_ids"], row[f"{name}_mask"] = answer.ids[:room], answer.mask[:room]
            row[f"{name}_is_cut"] = len(answer.ids) > room
        return row

    def _plain_answer(self, text: str) -> _Answer:
        ids = self._ids[self._anchor + text][self._anchor_length :]
        eos, eos_id = self.tokenizer.eos_token, self.tokenizer.eos_token_id
        if eos_id is not None and not text.rstrip().endswith(eos):
            ids = [*ids, eos_id]
        return _Answer(ids, [1] * len(ids))

    def _answer(
        self, pair: Pair, answer: Any, turns: list[_Turn], prompt_ids: list[int]
    ) -> _Answer:
        ids, first = self._ids[turns[-1].after], len(prompt_ids)
        self._check_beginning(prompt_ids, ids, "prompt")
        if self._marks_turns:
            assert isinstance(pair.prompt, list)
            encoded = self._template(
                pair,
                [*pair.prompt, *answer],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            mask = encoded["assistant_masks"]
            if encoded["input_ids"] != ids:
                raise ValueError("the chat template gives other tokens than its text")
        else:
            mask = [0] * len(ids)
            for before, after in turns:
                start, end = self._ids[before], self._ids[after]
                self._check_beginning(start, ids, "turn")
                self._check_beginning(end, ids, "turn")
                mask[len(start) : len(end)] = [1] * (len(end) - len(start))
        if 1 not in mask[first:]:
            raise ValueError("the chat template writes no token of an assistant in an answer")
        return _Answer(ids[first:], mask[first:])

    @staticmethod
    def _check_beginning(start: list[int], ids: list[int], of: str) -> None:
        if ids[: len(start)] != start:
            raise ValueError(
                f"the {of}'s tokens must begin those of the whole conversation, so that its "
                "answers can be told from the rest; the chat template writes it otherwise once "
                "more follows, or a token spans the border: pass plain strings"
            )

    def _what_begins_a_text(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text; what it puts after is left."""
        bare = self._bare("a")
        ids: list[int] = list(self.tokenizer("a").input_ids)
        starts = [i for i in range(len(ids)) if ids[i : i + len(bare)] == bare]
        return ids[: starts[0]] if starts else []

    def _what_keeps_a_space_away(self) -> str:
        """Text after which the tokenizer adds no space to an answer: none where it never does."""
        self._anchor_length = 0
        first = self.tokenizer.convert_ids_to_tokens(self._bare("a"))[:1]
        if not first or not str(first[0]).startswith(("\u2581", "\u0120")):  # ▁ and Ġ are spaces
            return ""
        for anchor in ANCHORS:
            alone, both = self._bare(anchor), self._bare(anchor + "a")
            tokens = self.tokenizer.convert_ids_to_tokens(both[len(alone) :])
            if both[: len(alone)] == alone and tokens == ["a"]:
                self._anchor_length = len(alone)
                return anchor
        raise ValueError(
            "the tokenizer puts a space before every text, and none of "
            f"{', '.join(map(repr, ANCHORS))} keeps it from an answer; load it with "
            "add_prefix_space=False"
        )

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
