"""Jinja2 source of one part of a prompt -> text before, of, and after the item.

It knows neither tokens nor slates. Templates may come with a downloaded adapter, so a part is only
what prompts need of Jinja2: texts, conditions and a few filters, in its immutable sandbox. Without
loops, calls, assignments and products, what it takes to render one is bounded by its length and
that of the texts. Item and context texts are untrusted data: they are cleaned here, and the caller
encodes everything a part renders as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from jinja2 import StrictUndefined, TemplateSyntaxError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peftrank.errors import ConfigError

# Control characters, whitespace, and lone surrogates (which JSON can carry and tokenizers refuse).
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
# Marks around substituted item text. No cleaned value can contain them, being control characters.
_OPEN, _CLOSE = "\x02", "\x03"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
# What no text of a template may hold: the marks, and half characters, which tokenizers refuse.
_UNUSABLE = re.compile(f"[{_OPEN}{_CLOSE}\ud800-\udfff]")
NOT_ITEM = frozenset({"context", "feedback", "position"})
_LONGEST = 100_000
"""Characters of a part's source, and of what `replace` may put into one text."""
_MOST_NAMES = 100
_NODES = (
    nodes.Add, nodes.And, nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const, nodes.Div,
    nodes.Filter, nodes.FloorDiv, nodes.Getattr, nodes.Getitem, nodes.If, nodes.Keyword, nodes.List,
    nodes.Name, nodes.Neg, nodes.Not, nodes.Operand, nodes.Or, nodes.Output, nodes.Pos, nodes.Slice,
    nodes.Sub, nodes.TemplateData, nodes.Test, nodes.Tuple,
)  # fmt: skip
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "first", "float", "int", "last", "length",
    "lower", "string", "title", "trim", "truncate", "upper", "wordcount",
)  # fmt: skip


class PartText(NamedTuple):
    """A rendered part. `item` runs from the first to the last substituted item text."""

    before: str
    item: str
    after: str


class Part:
    """One compiled part of a template."""

    def __init__(self, name: str, source: str, variables: Collection[str]):
        """Compiles a part.

        Args:
            name: The part's name in the configuration, for errors.
            source: Jinja2.
            variables: The names the source may use.

        Raises:
            ConfigError: a syntax error or an unknown name.
        """
        self.name = name
        if len(source) > _LONGEST:
            raise ConfigError(
                f"prompt part {name!r} has {len(source)} characters; at most {_LONGEST} are read"
            )
        environment = _environment()
        try:
            tree = environment.parse(source)
            _check(tree, source)
            self.uses = frozenset(node.name for node in tree.find_all(nodes.Name))
            _mark_item_text(tree)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"prompt part {name!r}, line {error.lineno}: {error.message} "
                f"Given: {source[:200]!r}"
            ) from error
        except Exception as error:  # nested too deeply, a number of thousands of digits
            raise ConfigError(f"prompt part {name!r} cannot be compiled: {error}") from error
        unknown = sorted(self.uses - set(variables))
        if unknown:
            raise ConfigError(
                f"prompt part {name!r} uses unknown {', '.join(map(repr, unknown))}. It may use: "
                f"{', '.join(sorted(variables))}. Item fields must be named in prompt.fields."
            )

    def render(self, values: Mapping[str, object]) -> PartText:
        """Returns the part's text, divided at the item's own text.

        Raises:
            ConfigError: the template failed on these values, or asked for what it may not have.
        """
        try:
            text = self._template.render(values)
        except Exception as error:  # a template is the user's program: anything may go wrong in it
            raise ConfigError(f"prompt part {self.name!r} cannot be rendered: {error}") from error
        first, last = text.find(_OPEN), text.rfind(_CLOSE)
        if first < 0 or last < first:
            return PartText(_MARKS.sub("", text), "", "")
        before = text[:first].rstrip(" ")
        # Tokenizers join a space to the word behind it, so it belongs to the item's text.
        item = _MARKS.sub("", text[len(before) : last])
        return PartText(before, item, _MARKS.sub("", text[last:]))

    def text(self, values: Mapping[str, object]) -> str:
        """Returns the whole part as one text; raises as `render` does."""
        return "".join(self.render(values))


def clean(text: str) -> str:
    """Returns untrusted text on one line: blanks and control characters become single spaces."""
    return _BLANKS.sub(" ", text).strip()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox without any attribute of an object; `context.device` is a key."""

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        return False


def _environment() -> _Sandbox:
    environment = _Sandbox(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.globals.clear()
    environment.filters = {name: environment.filters[name] for name in _FILTERS}
    for own in (_mark, _replace, _round):
        environment.filters[own.__name__.removeprefix("_")] = own
    return environment


def _check(tree: nodes.Template, source: str) -> None:
    """Raises TemplateSyntaxError unless a part is made of what prompts may use."""
    if found := _UNUSABLE.search(source):
        line = source.count("\n", 0, found.start()) + 1
        raise TemplateSyntaxError(f"U+{ord(found[0]):04X} may stand in no prompt.", line)
    for node in tree.find_all(nodes.Node):
        if not isinstance(node, _NODES):
            what = type(node).__name__
            raise TemplateSyntaxError(
                f"{what} is not for prompts, which have texts, conditions, comparisons, + - / ~ "
                f"and filters, but no loops, calls, assignments, * or %.",
                node.lineno,
            )
        if isinstance(node, nodes.Const) and _UNUSABLE.search(str(node.value)):
            raise TemplateSyntaxError("a text holds an escape of no character.", node.lineno)
    if (used := len(list(tree.find_all(nodes.Name)))) > _MOST_NAMES:
        raise TemplateSyntaxError(f"{used} names are used, at most {_MOST_NAMES} may be.", 1)


def _replace(value: object, old: str, new: str) -> str:
    """Returns the text with a part replaced; the filter of this name, made bounded."""
    text = str(value)
    if text.count(old) * len(new) > _LONGEST:
        raise ValueError("replace makes a text too long")
    return text.replace(old, new)


def _round(value: float, precision: int = 0) -> float:
    """Returns the number with so many decimals; the filter of this name, without its methods."""
    return round(float(value), precision)


def _mark(value: object) -> str:
    """Returns the printed value between marks; the filter put around every item expression."""
    if isinstance(value, StrictUndefined):
        return str(value)  # raises, naming the variable
    text = clean(str(value))
    return f"{_OPEN}{text}{_CLOSE}" if text else ""


def _mark_item_text(tree: nodes.Template) -> None:
    """Puts the `mark` filter around every printed expression that may hold item text."""
    for output in tree.find_all(nodes.Output):
        output.nodes = [
            nodes.Filter(node, "mark", [], [], None, None) if _may_hold(node) else node
            for node in output.nodes
        ]


def _may_hold(node: nodes.Expr) -> bool:
    names = {found.name for found in node.find_all(nodes.Name)}
    if isinstance(node, nodes.Name):
        names.add(node.name)
    return not names <= NOT_ITEM
