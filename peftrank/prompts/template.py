"""Slate -> prompt tree: renders the parts of a template, tokenizes them, and keeps to the budget.

A slate is read as preamble -> history items -> question -> candidates, each a segment of its own.
It knows no tensors and no model; what it must know of the base is the tokenizer and the longest
path the base can read.

Item and context texts are untrusted. Whatever a part renders is encoded as plain text, so that a
title holding `<|im_end|>` or `[SEP]` cannot end a turn; special tokens come from the tokenizer's
chat template and from its bos, cls and sep tokens alone.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from peftrank.config import PARTS
from peftrank.errors import ConfigError, DataError
from peftrank.prompts._parts import NOT_ITEM, Part, PartText, clean
from peftrank.prompts.tree import CandidateTokens, grow, windows
from peftrank.types import Item, PromptTree, Slate

MODES = ("isolated", "joint", "set")
TURNS = ("none", "after", "before", "list")
CHATS = ("auto", "off")
_SENTINEL = "peftrank-user-text"
# Fast tokenizers keep `split_special_tokens` as state of the tokenizer, and refuse to change it
# while another thread encodes. Templates may share a tokenizer, so there is one lock for all.
_LOCK = threading.Lock()

Tokens = tuple[int, ...]

_KNOWN_TEXTS = 32_768
"""Texts whose tokens are kept, for each tokenizer: about 15 MB of titles, 100 MB at the most."""
_LONGEST_KNOWN = 256
"""Characters; a longer text is tokenized anew each time."""
_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[frozenset[int], dict[str, Tokens]]] = (
    WeakKeyDictionary()
)
"""Tokens of texts, by tokenizer and the tokens that none may become; shared by all templates."""


class PromptTemplate:
    """Turns slates into prompt trees. Immutable; may be used by several threads."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        parts: Mapping[str, str],
        mode: str = "isolated",
        fields: Sequence[str] = ("title",),
        history_length: int = 20,
        history_step: int = 1,
        item_tokens: int = 32,
        window: int = 20,
        max_tokens: int = 2048,
        chat: str = "auto",
        turn: str = "none",
        max_depth: int | None = None,
    ):
        """Compiles a template.

        Args:
            tokenizer: The base's.
            parts: Jinja2 source of `preamble`, `history`, `question`, `candidate`, `answer`,
                `choice`; an absent one is empty. Each sees `context`; history, candidate and answer
                also see the item's `fields` by name, and history `feedback` (a number or None) and
                `position` (1 = the oldest item of the slate's history).
            mode: `isolated`: candidates do not see each other. `joint`: each sees those before it.
                `set`: candidates do not, but the marker behind each sees the other markers
                (Set-Encoder, arXiv 2404.06912). The marker is the tokenizer's eos, sep or cls
                token, the first that it has; no item's text can become it.
            fields: Item fields the parts may use. One an item lacks is an empty string.
            history_length: At most this many of the newest history items are read.
            history_step: Where older items are left out, which of so many oldest that could be read
                is the first: the one whose text has the smallest checksum. With 1 that is the
                oldest, and every new item moves it; with more a user's prompts begin alike for a
                while, for which `Ranker(prefix_bytes=...)` and packing save work.
            item_tokens: An item's own text is cut at this many tokens; the text around it is not.
            window: With turn `list`, the most candidates in a list, 2 to 26; see `tree.windows`.
            max_tokens: Budget of what is read together: of a path from the root to its end,
                whatever the number of paths; in mode `set` of the whole tree.
            chat: `auto`: wrap in the tokenizer's chat template where it has one. `off`: never.
            turn: What the readout needs. `none`: candidates stand in the user's turn. `after`: each
                is followed by `answer`, the end of the user's turn and the start of the
                assistant's. `before`: the question is, and candidates stand in the assistant's.
                `list`: candidates of mode `joint` are named by letters, and behind a list of them
                come `choice`, the end of the user's turn and the start of the assistant's.
            max_depth: Tokens of the longest path the base can read; None for no limit.

        Raises:
            ConfigError: an unknown part, name or choice, a syntax error, or a chat template that
                cannot be divided at the user's text.
        """
        self.tokenizer = tokenizer
        self.parts = {name: parts.get(name, "") for name in PARTS}
        self.mode, self.turn, self.chat = mode, turn, chat
        self.fields = tuple(fields)
        self.history_length, self.item_tokens = history_length, item_tokens
        self.history_step = history_step
        self.window, self.max_tokens, self.max_depth = window, max_tokens, max_depth
        self._check(parts)
        self._compiled = self._compile()
        self._opening, self._closing, self._ending = self._turn_tokens()
        self._forbidden = _control_ids(tokenizer)
        self._marker = self._marker_tokens()
        self._known = _known.setdefault(tokenizer, {}).setdefault(self._forbidden, {})

    @property
    def candidate_fields(self) -> frozenset[str]:
        """The item fields that the candidate part uses."""
        return self._compiled["candidate"].uses.intersection(self.fields)

    def describe(self) -> dict[str, Any]:
        """Returns JSON values that, passed as `**described` with a tokenizer, rebuild it."""
        return {
            "parts": dict(self.parts),
            "mode": self.mode,
            "fields": list(self.fields),
            "history_length": self.history_length,
            "history_step": self.history_step,
            "item_tokens": self.item_tokens,
            "window": self.window,
            "max_tokens": self.max_tokens,
            "chat": self.chat,
            "turn": self.turn,
            "max_depth": self.max_depth,
        }

    def tree(self, slate: Slate) -> PromptTree:
        """Returns the slate's prompt tree.

        The oldest history is left out, `history_step` items or fewer at once, until what is read
        together fits `max_tokens` and the deepest path fits `max_depth`; candidates never are.
        History items without any text are left out too.

        Raises:
            DataError: a candidate without text, no candidates, feedback that does not fit the
                history, or too many tokens even without history.
            ConfigError: a part fails on this slate.
        """
        trunk, leaves, asked, _ = self._lay_out(slate)
        return grow(
            slate.slate_id,
            trunk,
            leaves,
            mode=self.mode,
            marker=self._marker,
            answer=asked,
            window=self.window if self.turn == "list" else None,
        )

    def history_read(self, slate: Slate) -> tuple[int, ...]:
        """Returns which history items the slate's prompt tree holds, by index; see `tree`."""
        return self._lay_out(slate)[3]

    def _lay_out(
        self, slate: Slate
    ) -> tuple[list[Tokens], list[CandidateTokens], Tokens, tuple[int, ...]]:
        """Returns the trunk's segments, the candidates, what ends a list, and the history read."""
        if not slate.candidates:
            raise DataError(f"slate {slate.slate_id!r} has no candidates")
        context = {name: clean(text) for name, text in slate.context.items()}
        preamble = self._compiled["preamble"].text({"context": context})
        question = self._compiled["question"].text({"context": context})
        history = self._history(slate, context)
        candidates = [self._candidate(slate, item, context) for item in slate.candidates]
        answers = [self._answer(item, context) for item in slate.candidates]
        choice = ""
        if self.turn == "list":
            candidates = self._named(candidates)
            choice = self._compiled["choice"].text({"context": context})
        pieces = (piece for item in (*history.values(), *candidates) for piece in item)
        ids = self._encode({preamble, question, choice, *answers, *pieces})

        root = self._opening + ids[preamble]
        asked = ids[question] + (self._closing if self.turn == "before" else ())
        leaves = []
        for item, text, answer in zip(slate.candidates, candidates, answers, strict=True):
            tokens, start, stop = self._item(ids, text)
            if start == stop:
                raise DataError(
                    f"slate {slate.slate_id!r}: candidate {item.item_id!r} renders to "
                    f"{''.join(text)!r}, which holds no token of its own text. The candidate part "
                    "of the template must use a field this item has."
                )
            closing = self._closing if self.turn == "after" else ()
            tokens += ids[answer] + closing + self._ending
            leaves.append(CandidateTokens(tokens, start, stop))
        trunk = [self._item(ids, text).tokens for text in history.values()]
        behind = ids[choice] + self._closing if self.turn == "list" else ()
        fixed = len(root) + len(asked) + len(behind)
        kept = self._fit(slate, fixed, trunk, leaves)
        if len(kept) < len(slate.history):
            kept = kept[_first(kept, self.history_step) :]
        read = tuple(history)[len(trunk) - len(kept) :]
        return [root, *kept, asked], leaves, behind, read

    def _check(self, parts: Mapping[str, str]) -> None:
        choices = (
            ("mode", self.mode, MODES),
            ("turn", self.turn, TURNS),
            ("chat", self.chat, CHATS),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ConfigError(f"prompt {name} is {value!r}; expected one of {allowed}")
        if unknown := sorted(set(parts) - set(PARTS)):
            raise ConfigError(f"unknown prompt part {unknown[0]!r}; expected {', '.join(PARTS)}")
        if taken := sorted(NOT_ITEM.intersection(self.fields)):
            raise ConfigError(
                f"prompt.fields names {taken[0]!r}, which means something else in a template. "
                "Rename this item field in the data."
            )
        if not 2 <= self.window <= len(ascii_uppercase):
            raise ConfigError(f"prompt.window is {self.window}; expected 2 to 26, one per letter")
        if self.turn == "list" and self.mode != "joint":
            raise ConfigError(
                "a readout that asks for a letter (identifier) reads candidates as a list and "
                f"needs prompt.mode: joint; given: {self.mode}"
            )
        if self.mode == "joint" and self.turn == "after":
            raise ConfigError(
                "a readout that asks after each candidate (yes_no) needs prompt.mode: isolated; "
                "given: joint"
            )
        if self.mode == "set" and self.turn != "none":
            raise ConfigError(
                "prompt.mode: set compares candidates at a marker behind each, where no text is "
                "predicted, so readouts of text (yes_no, likelihood) cannot read it. Use "
                "readout.name: score_head, or prompt.mode: isolated."
            )

    def _compile(self) -> dict[str, Part]:
        item = {"context", *self.fields}
        seen = {
            "preamble": {"context"},
            "history": item | {"feedback", "position"},
            "question": {"context"},
            "candidate": item,
            "answer": item,
            "choice": {"context"},
        }
        compiled = {name: Part(name, self.parts[name], seen[name]) for name in PARTS}
        if not compiled["candidate"].uses.intersection(self.fields):
            raise ConfigError(
                f"prompt part 'candidate' uses no item field: {self.parts['candidate']!r}. "
                f"It must use one of prompt.fields: {', '.join(self.fields)}"
            )
        return compiled

    def _turn_tokens(self) -> tuple[Tokens, Tokens, Tokens]:
        """Returns what opens the prompt, hands over to the assistant, and ends each candidate."""
        tokenizer = self.tokenizer
        if self.chat == "auto" and tokenizer.chat_template is not None:
            before, after = _chat_text(tokenizer)
            return _special(tokenizer, before), _special(tokenizer, after), ()
        if tokenizer.cls_token is not None and tokenizer.sep_token is not None:
            return (tokenizer.cls_token_id,), (), (tokenizer.sep_token_id,)
        bos = tokenizer.bos_token_id
        return (() if bos is None else (bos,)), (), ()

    def _marker_tokens(self) -> Tokens:
        """Returns the token that stands behind each candidate in mode `set`."""
        if self.mode != "set":
            return ()
        tokenizer = self.tokenizer
        for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id):
            if token in self._forbidden:
                return (token,)
        raise ConfigError(
            "prompt.mode: set needs a marker that no text can become, and this base's tokenizer "
            "has no eos, sep or cls token. Use prompt.mode: isolated."
        )

    def _values(self, item: Item, context: Mapping[str, str]) -> dict[str, object]:
        values: dict[str, object] = {name: clean(item.fields.get(name, "")) for name in self.fields}
        return {**values, "context": context}

    def _history(self, slate: Slate, context: Mapping[str, str]) -> dict[int, PartText]:
        """Returns the text of each history item that has any, by its index in the slate."""
        feedback = slate.history_feedback or (None,) * len(slate.history)
        if len(feedback) != len(slate.history):
            raise DataError(
                f"slate {slate.slate_id!r} has {len(slate.history)} history items but "
                f"{len(feedback)} values in history_feedback"
            )
        texts = {}
        first = max(0, len(slate.history) - self.history_length)
        for index in range(first, len(slate.history)):
            values = self._values(slate.history[index], context)
            if any(values[name] for name in self.fields):
                values.update(feedback=feedback[index], position=index + 1)
                texts[index] = self._compiled["history"].render(values)
        return texts

    def _candidate(self, slate: Slate, item: Item, context: Mapping[str, str]) -> PartText:
        values = self._values(item, context)
        if not any(values[name] for name in self.fields):
            raise DataError(
                f"slate {slate.slate_id!r}: candidate {item.item_id!r} has no text in any of the "
                f"fields {', '.join(self.fields)}. Give it one, or name others in prompt.fields."
            )
        return self._compiled["candidate"].render(values)

    def _answer(self, item: Item, context: Mapping[str, str]) -> str:
        if self.turn != "after":
            return ""
        return self._compiled["answer"].text(self._values(item, context))

    def _named(self, candidates: Sequence[PartText]) -> list[PartText]:
        """Returns the texts of candidates behind the letters that they have in their lists."""
        letters = {0: "A"}
        for members in windows(len(candidates), self.window):
            letters.update(zip(members, ascii_uppercase[1:], strict=False))
        named = []
        for index, text in enumerate(candidates):
            apart = "" if "".join(text)[:1].isspace() else " "
            named.append(text._replace(before=f"\n[{letters[index]}]{apart}{text.before}"))
        return named

    def _item(self, ids: Mapping[str, Tokens], text: PartText) -> CandidateTokens:
        before, own, after = (ids[piece] for piece in text)
        own = own[: self.item_tokens]
        return CandidateTokens(before + own + after, len(before), len(before) + len(own))

    def _encode(self, texts: Iterable[str]) -> dict[str, Tokens]:
        """Returns the tokens of each text, none of which controls anything."""
        found, new = {}, []
        for text in texts:
            tokens = self._known.get(text)
            if tokens is None:
                new.append(text)
            else:
                found[text] = tokens
        if not new:
            return found
        with _LOCK:
            rows = self.tokenizer(
                new, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            for text, row in zip(new, rows, strict=True):
                # A vocabulary of whole words or sentence pieces may still spell out a special one.
                found[text] = tuple(token for token in row if token not in self._forbidden)
                if len(text) <= _LONGEST_KNOWN:
                    self._known[text] = found[text]
            while len(self._known) > _KNOWN_TEXTS:
                del self._known[next(iter(self._known))]  # the oldest
        return found

    def _fit(
        self, slate: Slate, fixed: int, history: list[Tokens], leaves: list[CandidateTokens]
    ) -> list[Tokens]:
        """Returns the newest history with which the tree keeps to both budgets."""
        sizes = [len(leaf.tokens) + len(self._marker) for leaf in leaves]
        total = deepest = fixed + sum(sizes)
        if self.turn == "list":
            lists = windows(len(sizes), self.window)
            deepest = fixed + sizes[0] + max(sum(sizes[i] for i in each) for each in lists)
        elif self.mode != "joint":
            deepest = fixed + max(sizes)
        together = total if self.mode == "set" else deepest
        room = self.max_tokens - together
        if self.max_depth is not None:
            room = min(room, self.max_depth - deepest)
        if room < 0:
            advice = ""
            if self.turn == "list":
                advice = ", or lower prompt.window"
            elif self.mode != "isolated":
                advice = (
                    f", or split the candidate list, which is read as a whole in prompt.mode: "
                    f"{self.mode}; in prompt.mode: isolated it may have any length"
                )
            raise DataError(
                f"slate {slate.slate_id!r} takes {together} tokens and {deepest} on its longest "
                f"path without any history: {fixed} for preamble and question, {sum(sizes)} for "
                f"{len(sizes)} candidates, {max(sizes)} for the longest. Allowed: "
                f"{self.max_tokens} (prompt.max_tokens) and {self.max_depth or 'any number'} (what "
                "the base can read). Raise prompt.max_tokens, lower prompt.item_tokens, shorten "
                f"the template{advice}."
            )
        kept = len(history)
        for tokens in reversed(history):
            room -= len(tokens)
            if room < 0:
                break
            kept -= 1
        return history[kept:]


def _first(history: Sequence[Tokens], step: int) -> int:
    """Returns which of the first `step` items the history is to begin with; half of it stays.

    A checksum of the text chooses, not the place: so the choice stays while the item is among
    them, also where the slate holds the newest items of a longer history.
    """
    among = history[: min(step, (len(history) + 1) // 2)]
    texts = [b"".join(t.to_bytes(4, "little") for t in tokens) for tokens in among]
    return min(range(len(texts)), key=lambda i: zlib.crc32(texts[i]), default=0)


def _special(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Returns the tokens of trusted text, special tokens included."""
    with _LOCK:
        return tuple(
            tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
        )


def _chat_text(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Returns what the chat template puts before and after one message of the user."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _SENTINEL}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # Qwen3: the answer is read at once
        date_string="26 Jul 2024",  # Llama 3: a prompt must not change from day to day
    )
    before, found, after = text.partition(_SENTINEL)
    if not found or _SENTINEL in after:
        raise ConfigError(
            "the tokenizer's chat template does not repeat the user's text exactly once, so it "
            "cannot be wrapped around a prompt tree. Set prompt.chat: off."
        )
    return before, after


def _control_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the tokens that no text of an item may become: special ones and turn marks."""
    added = tokenizer.added_tokens_decoder.items()
    chat = tokenizer.chat_template or ""
    # Qwen's <think> is a turn mark but no special token.
    marks = {i for i, token in added if token.content in chat and not token.content.isspace()}
    special = {i for i, token in added if token.special}.union(tokenizer.all_special_ids)
    other_uses = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if tokenizer.unk_token_id not in other_uses:  # an unknown word stays one
        special.discard(tokenizer.unk_token_id)
    return frozenset(special | marks)
