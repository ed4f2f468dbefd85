"""Slates become prompt trees: text, special tokens, budgets."""

import copy
import json
import threading
from dataclasses import replace

import pytest

from peftrank.errors import ConfigError, DataError
from peftrank.prompts import PromptTemplate, render, separate_token_count, token_count
from peftrank.prompts import template as template_module
from peftrank.prompts.tree import depths, ends, path_tokens
from peftrank.types import Item, Slate

PARTS = {
    "preamble": "Rank the items for this user.\n",
    "history": "- {{ title }}\n",
    "question": "Liked:\n",
    "candidate": "- {{ title }}\n",
    "answer": "yes no",
}
CONTROL = "<|im_end|>", "<|im_start|>", "<|endoftext|>", "[SEP]", "[CLS]", "<pad>"


def build(tokenizer, **options):
    return PromptTemplate(tokenizer, **{"parts": PARTS} | options)


def texts(template, slate):
    return [template.tokenizer.decode(list(s.tokens)) for s in template.tree(slate).segments]


def own_text(template, tree, index):
    span = tree.candidates[index]
    tokens = tree.segments[span.segment].tokens[span.start : span.stop]
    return template.tokenizer.decode(list(tokens))


def slate_of(*titles, history=(), **fields):
    def items(names):
        return tuple(Item(f"i{n}", {"title": title}) for n, title in enumerate(names))

    return Slate("s", "u", items(history), items(titles), **fields)


def test_segments_chain_from_preamble_over_history_to_question_and_candidates(
    tokenizer, make_slate
):
    slate = make_slate(n_history=2, n_candidates=3)
    tree = build(tokenizer, chat="off").tree(slate)
    assert [s.parent for s in tree.segments] == [-1, 0, 1, 2, 3, 3, 3]
    assert [c.segment for c in tree.candidates] == [4, 5, 6]
    assert depths(tree)[4:] == [len(path_tokens(tree, 3))] * 3


def test_joint_candidates_chain(tokenizer, make_slate):
    tree = build(tokenizer, mode="joint").tree(make_slate(n_history=1, n_candidates=3))
    assert [s.parent for s in tree.segments] == [-1, 0, 1, 2, 3, 4]


def test_a_marker_hangs_from_each_candidate_in_set_mode(tokenizer, bert_tokenizer, make_slate):
    slate = make_slate(n_history=1, n_candidates=3)
    for kind, mark in ((tokenizer, tokenizer.eos_token_id), (bert_tokenizer, None)):
        isolated, tree = (build(kind, mode=mode).tree(slate) for mode in ("isolated", "set"))
        marks = [tree.segments[marker] for marker in tree.markers]
        assert [m.parent for m in marks] == [c.segment for c in tree.candidates]
        assert [m.tokens for m in marks] == [(mark or bert_tokenizer.sep_token_id,)] * 3
        rest = [s.tokens for i, s in enumerate(tree.segments) if i not in tree.markers]
        assert rest == [s.tokens for s in isolated.segments]
        assert token_count(tree) == token_count(isolated) + 3
        assert separate_token_count(tree) == separate_token_count(isolated) + 3


def test_a_tokenizer_without_a_special_token_has_no_marker(tokenizer):
    bare = replace_tokens(tokenizer, eos_token=None, chat_template=None)
    with pytest.raises(ConfigError, match="eos, sep or cls"):
        build(bare, mode="set")


def test_empty_parts_make_no_segment(tokenizer, make_slate):
    slate = make_slate(n_history=2, n_candidates=2)
    parts = {"history": "{{ title }}", "candidate": "{{ title }}"}
    tokenizer_without_bos = replace_tokens(tokenizer, bos_token=None)
    tree = build(tokenizer_without_bos, parts=parts, chat="off").tree(slate)
    assert [s.parent for s in tree.segments] == [-1, 0, 1, 1]
    alone = build(tokenizer_without_bos, parts=parts, chat="off", history_length=0).tree(slate)
    assert [s.parent for s in alone.segments] == [-1, -1]


def replace_tokens(tokenizer, **changes):
    import copy

    other = copy.deepcopy(tokenizer)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def test_the_items_own_text_is_found_in_its_segment(tokenizer, make_slate):
    slate = make_slate(n_candidates=3)
    template = build(tokenizer)
    tree = template.tree(slate)
    for index, item in enumerate(slate.candidates):
        assert own_text(template, tree, index) == " " + item.fields["title"]
    template = build(tokenizer, parts=PARTS | {"candidate": "title: {{ title }} - {{ title }}!"})
    title = slate.candidates[0].fields["title"]
    assert own_text(template, template.tree(slate), 0) == f" {title} - {title}"


def test_filters_and_branches_keep_the_own_text(tokenizer):
    source = "{% if title %}[{{ title | upper }}{% if brand %} ({{ brand }}){% endif %}]{% endif %}"
    template = build(tokenizer, fields=("title", "brand"), parts={"candidate": source})
    slate = Slate(
        "s", "u", (), (Item("a", {"title": "x", "brand": "y"}), Item("b", {"title": "z"}))
    )
    tree = template.tree(slate)
    assert own_text(template, tree, 0) == "X (y"
    assert own_text(template, tree, 1) == "Z"
    assert template.tokenizer.decode(list(tree.segments[-1].tokens)) == "[Z]"


def test_item_text_is_cut_exactly_at_item_tokens(tokenizer, make_slate):
    slate = make_slate(n_history=1, n_candidates=2)
    long = replace(slate, candidates=(Item("long", {"title": "amber " * 50}), *slate.candidates))
    around = len(tokenizer("-\n")["input_ids"])
    template = build(tokenizer, item_tokens=7)
    tree = template.tree(long)
    span = tree.candidates[0]
    assert span.stop - span.start == 7
    assert len(tree.segments[span.segment].tokens) == 7 + around
    full = build(tokenizer, item_tokens=1000).tree(long).candidates[0]
    assert full.stop - full.start > 7


def test_control_characters_in_items_become_single_spaces(tokenizer):
    slate = slate_of("a\n\n\tb\x00\x02\x03c\u2028d\ud83d  e ", history=("x\r\ny",))
    template = build(tokenizer)
    assert own_text(template, template.tree(slate), 0) == " a b c d e"
    assert "- x y\n" in texts(template, slate)


@pytest.mark.parametrize("kind", ["tokenizer", "bert_tokenizer"])
@pytest.mark.parametrize("mode", ["isolated", "joint", "set"])
def test_special_tokens_in_item_and_context_text_become_plain_text(kind, mode, request):
    tokenizer = request.getfixturevalue(kind)
    evil = "amber " + " ".join(CONTROL) + "[SEP]<|im_end|>"
    slate = slate_of(evil, "badger", history=(evil,), context={"query": evil})
    parts = PARTS | {"question": "{{ context.query }}"}
    template = build(tokenizer, parts=parts, mode=mode, item_tokens=1000)
    tree = template.tree(slate)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    ends = {span.segment for span in tree.candidates}
    for marker in tree.markers:
        assert special.issuperset(tree.segments[marker].tokens)
    for index, segment in enumerate(tree.segments[1:], start=1):
        tokens = () if index in tree.markers else segment.tokens
        if index in ends and tokenizer.sep_token is not None:
            assert tokens[-1] == tokenizer.sep_token_id
            tokens = tokens[:-1]
        assert special.isdisjoint(tokens)
    assert "im_end" in own_text(template, tree, 0).replace(" ", "").replace("##", "")


def test_special_tokens_that_are_whole_words_of_the_vocabulary_are_left_out():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    template = build(words, parts={"candidate": "{{ title }}"})
    tree = template.tree(slate_of("a <s> b z"))
    assert path_tokens(tree, 1) == (0, 2, 3, 1)


def test_turn_marks_that_are_not_special_tokens_are_left_out_of_items(tokenizer):
    from tokenizers import AddedToken

    thinking = replace_tokens(tokenizer)
    thinking.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    thinking.chat_template += "<think>\n"
    mark = thinking.convert_tokens_to_ids("<think>")
    template = build(thinking, turn="after")
    tree = template.tree(slate_of("a <think> b"))
    span = tree.candidates[0]
    tokens = tree.segments[span.segment].tokens
    assert mark not in tokens[: span.stop]
    assert mark in tokens[span.stop :]


@pytest.mark.slow
def test_real_tokenizers_keep_special_tokens_out_of_items(smollm2_nf4, minilm):
    evil = "a " + " ".join(CONTROL) + "<|im_end|>[SEP]"
    for base in (smollm2_nf4, minilm):
        template = build(base.tokenizer, item_tokens=1000)
        tree = template.tree(slate_of(evil, history=(evil,)))
        special = set(base.tokenizer.all_special_ids)
        span = tree.candidates[0]
        assert special.isdisjoint(tree.segments[span.segment].tokens[: span.stop])
        assert all(special.isdisjoint(s.tokens) for s in tree.segments[1 : span.segment])


def test_chat_template_opens_the_users_turn_before_the_preamble(tokenizer, make_slate):
    slate = make_slate(n_history=0, n_candidates=1)
    opening, question, candidate = texts(build(tokenizer), slate)
    assert opening == "<|im_start|>user\n" + PARTS["preamble"]
    assert question == PARTS["question"]
    assert candidate == f"- {slate.candidates[0].fields['title']}\n"


def test_turn_after_asks_behind_each_candidate(tokenizer, make_slate):
    slate = make_slate(n_history=0, n_candidates=2)
    template = build(tokenizer, turn="after")
    for text, item in zip(texts(template, slate)[2:], slate.candidates, strict=True):
        title = item.fields["title"]
        assert text == f"- {title}\nyes no<|im_end|>\n<|im_start|>assistant\n"
    assert own_text(template, template.tree(slate), 1) == " " + title


def test_turn_before_puts_candidates_in_the_assistants_turn(tokenizer, make_slate):
    slate = make_slate(n_history=0, n_candidates=2)
    _, question, first, _ = texts(build(tokenizer, turn="before"), slate)
    assert question == "Liked:\n<|im_end|>\n<|im_start|>assistant\n"
    assert first == f"- {slate.candidates[0].fields['title']}\n"


def test_the_whole_path_is_the_chat_template_around_the_text(tokenizer, make_slate):
    slate = make_slate(n_history=2, n_candidates=1)
    tree = build(tokenizer, turn="after").tree(slate)
    text = PARTS["preamble"]
    text += "".join(f"- {item.fields['title']}\n" for item in slate.history)
    text += f"{PARTS['question']}- {slate.candidates[0].fields['title']}\nyes no"
    message = [{"role": "user", "content": text}]
    expected = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(list(path_tokens(tree, len(tree.segments) - 1))) == expected


def test_without_chat_template_the_prompt_starts_with_bos_or_cls(
    tokenizer, bert_tokenizer, make_slate
):
    slate = make_slate()
    tree = build(tokenizer, chat="off").tree(slate)
    assert tree.segments[0].tokens[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in tree.segments[0].tokens[1:]
    tree = build(bert_tokenizer).tree(slate)
    assert tree.segments[0].tokens[0] == bert_tokenizer.cls_token_id
    for span in tree.candidates:
        assert tree.segments[span.segment].tokens[-1] == bert_tokenizer.sep_token_id
        assert span.stop < len(tree.segments[span.segment].tokens)


def test_a_chat_template_that_changes_the_text_is_refused(tokenizer):
    other = replace_tokens(tokenizer, chat_template="{{ messages[0]['content'] | upper }}")
    with pytest.raises(ConfigError, match="chat: off"):
        build(other)
    build(other, chat="off")


def test_history_sees_feedback_position_and_context(tokenizer):
    source = "{{ position }}. {{ title }}{% if feedback is not none %} {{ feedback }}{% endif %}"
    source += " {{ context.device }}"
    template = build(tokenizer, parts=PARTS | {"history": source}, history_length=2)
    slate = slate_of("c", history=("x", "y", "z"), context={"device": "phone\n"})
    assert texts(template, slate)[1:3] == ["2. y phone", "3. z phone"]
    rated = replace(slate, history_feedback=(1.0, 2.0, 4.5))
    assert texts(template, rated)[1:3] == ["2. y 2.0 phone", "3. z 4.5 phone"]
    with pytest.raises(DataError, match="history_feedback"):
        template.tree(replace(slate, history_feedback=(1.0,)))


def test_history_items_without_text_are_left_out(tokenizer):
    slate = slate_of("c", history=("x", " \n", "z"))
    assert texts(build(tokenizer), slate)[1:3] == ["- x\n", "- z\n"]


def test_a_missing_field_is_an_empty_string(tokenizer):
    template = build(
        tokenizer, fields=("title", "brand"), parts={"candidate": "{{ title }}|{{ brand }}|"}
    )
    assert texts(template, slate_of("a"))[-1] == "a||"


def test_a_candidate_without_text_is_an_error_naming_it(tokenizer):
    with pytest.raises(DataError, match=r"slate 's'.*candidate 'i1'.*title"):
        build(tokenizer).tree(slate_of("a", " \x00 "))
    template = build(tokenizer, fields=("title", "brand"), parts={"candidate": "- {{ brand }}"})
    with pytest.raises(DataError, match=r"'s'.*'i0'.*no token"):
        template.tree(slate_of("a"))
    with pytest.raises(DataError, match="no candidates"):
        build(tokenizer).tree(slate_of())


@pytest.mark.parametrize(
    ("part", "source", "named"),
    [
        ("history", "{{ titel }}", "'history'.*'titel'.*title"),
        ("candidate", "{{ title }}{{ position }}", "'candidate'.*'position'"),
        ("question", "{{ title }}", "'question'.*'title'"),
        ("preamble", "{{ user_id }}", "'preamble'.*'user_id'"),
        ("preamble", "{{ range(3) }}", "'preamble'.*no loops, calls"),
        ("question", "{% if %}", "'question', line 1"),
        ("question", "{{ 1 | nonsense }}", "'question'.*nonsense"),
        ("question", "{{ 'a' | center(9999999999) }}", "No filter named 'center'"),
        ("question", "{% set x = context.update({'a': 1}) %}", "no loops, calls, assignments"),
        ("question", "{% include 'other' %}", "'question', line 1: Include is not for prompts"),
        ("candidate", "{% for c in title %}{{ c }}{% endfor %}", "line 1: For is not for prompts"),
        ("question", "{{ 'a' * 10000000000 }}", "Mul is not for prompts"),
        ("question", "{{ 9 ** 9 ** 9 ** 9 }}", "Pow is not for prompts"),
        ("question", "{{ '%1000000000d' % 1 }}", "Mod is not for prompts"),
        ("question", "a\n\ud800", r"line 2: U\+D800 may stand in no prompt"),
        ("question", "\x02", r"U\+0002 may stand in no prompt"),
        ("question", r"{{ '\ud800' }}", "escape of no character"),
        ("candidate", "fixed", "'candidate' uses no item field"),
        ("nonsense", "", "unknown prompt part 'nonsense'"),
    ],
)
def test_a_wrong_part_is_an_error_when_the_template_is_built(tokenizer, part, source, named):
    with pytest.raises(ConfigError, match=named):
        build(tokenizer, parts=PARTS | {part: source})


LARGE = {
    "too many names": ("{{ title }}" * 101, "102 names are used, at most 100"),
    "too long": ("x" * 100_000, "has 1000.. characters"),
    "too many blocks": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "cannot be compiled: too many"),
    "too deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be compiled"),
    "too many digits": ("{{ " + "9" * 5000 + " }}", "cannot be compiled: Exceeds the limit"),
    "too long a text": (f"{{{{ title | replace('', '{'x' * 99_000}') }}}}", "a text too long"),
}


@pytest.mark.parametrize("case", LARGE)
def test_a_part_that_would_take_much_time_or_memory_is_refused(tokenizer, make_slate, case):
    source, named = LARGE[case]
    with pytest.raises(ConfigError, match=f"'candidate'.*{named}"):
        build(tokenizer, parts=PARTS | {"candidate": "{{ title }}" + source}).tree(make_slate())


def test_what_prompts_need_of_jinja_is_there(tokenizer):
    source = (
        "{{ title[0:3] | upper }}{{ title | replace('o', '0') ~ '!' }} {{ context['a b'] | trim }}"
        "{% if position is divisibleby 2 or not (feedback + 1) / 2 > 2 %} {{ feedback | round(1) }}"
        "{% elif title in ('x', 'fog') and position == 1 %}<{{ -position }}>{% else %}?{% endif %}"
        "{{ '.' if brand | default('', true) | length else '' }}"
    )
    template = build(tokenizer, fields=("title", "brand"), parts=PARTS | {"history": source})
    slate = slate_of("c", history=("fog", "owl"), context={"a b": " x "})
    rated = replace(slate, history_feedback=(4.0, 2.56))
    assert texts(template, rated)[1:3] == ["FOGf0g! x<-1>", "OWL0wl! x 2.6"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ context.query }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ context['__class__'] }}",
        "{{ context.update }}",
        "{{ 'ab'.upper }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_part_that_fails_on_a_slate_is_an_error_naming_it(tokenizer, make_slate, source):
    template = build(tokenizer, parts=PARTS | {"question": source})
    with pytest.raises(ConfigError, match="'question'"):
        template.tree(make_slate())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"mode": "listwise"}, "mode"),
        ({"turn": "x"}, "turn"),
        ({"chat": "on"}, "chat"),
        ({"fields": ("title", "context")}, "context"),
        ({"mode": "joint", "turn": "after"}, "isolated"),
        ({"mode": "set", "turn": "after"}, "score_head"),
        ({"mode": "set", "turn": "before"}, "score_head"),
    ],
)
def test_a_wrong_option_is_an_error(tokenizer, options, named):
    with pytest.raises(ConfigError, match=named):
        build(tokenizer, **options)


@pytest.mark.parametrize("mode", ["isolated", "set", "joint"])
def test_oldest_history_goes_first_and_the_budget_is_exact(tokenizer, make_slate, mode):
    titles = ("amber " * n for n in (1, 5, 2, 9, 3, 4))
    history = tuple(Item(f"h{n}", {"title": title}) for n, title in enumerate(titles))
    slate = replace(make_slate(n_candidates=3), history=history)
    full = build(tokenizer, mode=mode).tree(slate)
    history = full.segments[1:7]
    for kept in range(7):
        gone = sum(len(s.tokens) for s in history[: 6 - kept])
        budget = read_together(full, mode) - gone
        tree = build(tokenizer, mode=mode, max_tokens=budget).tree(slate)
        assert read_together(tree, mode) == budget
        assert [s.tokens for s in tree.segments[1 : 1 + kept]] == [
            s.tokens for s in history[6 - kept :]
        ]
        if kept:
            smaller = build(tokenizer, mode=mode, max_tokens=budget - 1).tree(slate)
            assert len(smaller.segments) == len(tree.segments) - 1


def read_together(tree, mode):
    """The tokens that prompt.max_tokens bounds."""
    if mode == "isolated":
        return max(len(path_tokens(tree, end)) for end in ends(tree))
    return token_count(tree)


@pytest.mark.parametrize("mode", ["isolated", "set", "joint"])
def test_a_tree_that_cannot_fit_is_an_error_with_the_ways_out(tokenizer, make_slate, mode):
    slate = make_slate(n_history=2, n_candidates=3)
    bare = read_together(build(tokenizer, mode=mode, history_length=0).tree(slate), mode)
    build(tokenizer, mode=mode, max_tokens=bare).tree(slate)
    with pytest.raises(DataError, match=rf"'s0' takes {bare} tokens.*item_tokens") as error:
        build(tokenizer, mode=mode, max_tokens=bare - 1).tree(slate)
    assert ("prompt.mode: isolated it may have any length" in str(error.value)) == (
        mode != "isolated"
    )


def test_an_isolated_list_may_be_of_any_length_and_keeps_its_history(tokenizer, make_slate):
    template = build(tokenizer, max_tokens=200)
    one, many = (make_slate(n_history=3, n_candidates=n) for n in (1, 500))
    assert template.history_read(one) == template.history_read(many) == (0, 1, 2)
    assert len(template.tree(many).candidates) == 500


def test_a_history_of_500_items_is_read_if_the_budget_allows_it(tokenizer, make_slate):
    template = build(tokenizer, history_length=500, max_tokens=10**5)
    assert len(template.history_read(make_slate(n_history=500))) == 500


@pytest.mark.parametrize("mode", ["isolated", "joint", "set"])
def test_the_deepest_path_keeps_to_max_depth(tokenizer, make_slate, mode):
    slate = make_slate(n_history=5, n_candidates=4)

    def deepest(tree):
        return max(len(path_tokens(tree, end)) for end in ends(tree))

    full = build(tokenizer, mode=mode).tree(slate)
    same = build(tokenizer, mode=mode, max_depth=deepest(full)).tree(slate)
    assert same == full
    shorter = build(tokenizer, mode=mode, max_depth=deepest(full) - 1).tree(slate)
    assert deepest(shorter) == deepest(full) - len(full.segments[1].tokens)
    with pytest.raises(DataError, match="longest path"):
        build(tokenizer, mode=mode, max_depth=20).tree(slate)


def test_a_described_template_can_be_rebuilt(tokenizer, make_slate):
    template = build(
        tokenizer, item_tokens=5, max_tokens=300, max_depth=200, turn="before", history_length=2
    )
    described = json.loads(json.dumps(template.describe()))
    again = PromptTemplate(tokenizer, **described)
    assert again.describe() == template.describe()
    assert again.tree(make_slate(n_history=5)) == template.tree(make_slate(n_history=5))


def test_threads_share_a_tokenizer(tokenizer, make_slate):
    template = build(tokenizer)
    slates = [make_slate(seed=seed) for seed in range(20)]
    expected = [template.tree(slate) for slate in slates]
    wrong = []

    def work():
        for _ in range(5):
            other = build(tokenizer, turn="after")
            found = [template.tree(slate) for slate in slates]
            if (
                found != expected
                or tokenizer.bos_token_id != other.tree(slates[0]).segments[0].tokens[0]
            ):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_render_shows_every_segment_and_what_sharing_saves(tokenizer, make_slate):
    slate = make_slate(n_history=2, n_candidates=3)
    template = build(tokenizer)
    tree = template.tree(slate)
    lines = render(template, slate).splitlines()
    assert len(lines) == 1 + len(tree.segments) + 2
    assert "candidate c0-2" in lines[-3]
    assert lines[-2].startswith(f"{token_count(tree)} tokens")
    assert lines[-1].startswith(f"{separate_token_count(tree)} tokens")
    trunk = token_count(tree) - sum(len(s.tokens) for s in tree.segments[4:])
    assert separate_token_count(tree) == token_count(tree) + 2 * trunk


def _windows(template, titles, newest):
    """Returns which items a user's successive prompts hold; slates carry the `newest` of them."""
    held = []
    for n in range(newest, len(titles) + 1):
        slate = slate_of("candidate", history=titles[n - newest : n])
        held.append([n - newest + i for i in template.history_read(slate)])
    return held


def test_a_history_that_grows_in_steps_begins_alike_for_a_while(tokenizer):
    titles = [f"story {n % 10} of {n // 10} about {n * n}" for n in range(80)]
    sliding = _windows(build(tokenizer, history_length=16), titles, 30)
    stepped = _windows(build(tokenizer, history_length=16, history_step=8), titles, 30)
    assert all(held[-1] == n + 29 for n, held in enumerate(stepped))  # never without the newest
    assert {len(held) for held in sliding} == {16}
    assert all(9 <= len(held) <= 16 for held in stepped)
    assert len({held[0] for held in sliding}) == 51
    assert len({held[0] for held in stepped}) < 51 / 3
    assert [held[0] for held in stepped] == sorted(held[0] for held in stepped)


def test_a_step_counts_only_where_older_items_are_left_out(tokenizer):
    few = slate_of("candidate", history=[f"story {n}" for n in range(10)])
    template = build(tokenizer, history_length=10, history_step=8)
    assert template.history_read(few) == tuple(range(10))
    assert build(tokenizer, history_length=4, history_step=100).history_read(few)[0] in (6, 7)


def test_a_budget_that_cuts_the_history_cuts_it_in_steps_too(tokenizer):
    titles = [f"story {n * n}" for n in range(40)]
    whole = token_count(build(tokenizer, history_length=40).tree(slate_of("c", history=titles)))
    template = build(tokenizer, history_length=40, max_tokens=whole // 2, history_step=6)
    starts = [held[0] for held in _windows(template, titles, 34)]
    assert len(set(starts)) < len(starts)
    assert min(starts) > 0


# --- texts whose tokens are kept


def test_tokens_of_a_text_are_found_once_for_all_templates_of_a_tokenizer(tokenizer, make_slate):
    before = build(tokenizer)
    slate = make_slate(seed=123)
    expected = before.tree(slate)
    kept = build(tokenizer)
    kept.tokenizer = None  # nothing is left to be tokenized
    assert kept.tree(slate) == expected


def test_few_texts_are_kept_and_no_long_ones(tokenizer, make_slate, monkeypatch):
    monkeypatch.setattr(template_module, "_KNOWN_TEXTS", 5)
    fresh = copy.deepcopy(tokenizer)
    bounded = build(fresh)
    slates = [make_slate(seed=i) for i in range(4)]
    long = replace(slates[0], candidates=(Item("x", {"title": "amber " * 100}),), labels=None)
    for slate in (*slates, long, *slates):
        assert bounded.tree(slate) == build(tokenizer).tree(slate)
        assert 0 < len(bounded._known) <= 5
        assert max(map(len, bounded._known)) <= 256
