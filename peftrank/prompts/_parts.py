"""Jinja2 source of one part of a prompt -> text before, of, and after the item.

It knows neither tokens nor slates. Templates may come with a downloaded adapter, so they run in
Jinja2's immutable sandbox, without globals. Item and context texts are untrusted data: they are
cleaned here, and the caller encodes everything a part renders as plain text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from jinja2 import StrictUndefined, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peftrank.errors import ConfigError

# Control characters, whitespace, and lone surrogates (which JSON can carry and tokenizers refuse).
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
# Marks around substituted item text. No cleaned value can contain them, being control characters.
_OPEN, _CLOSE = "\x02", "\x03"
_MARKS = re.compile(f"[{_OPEN}{_CLOSE}]")
NOT_ITEM = frozenset({"context", "feedback", "position"})


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
        if _MARKS.search(source):
            raise ConfigError(
                f"prompt part {name!r} contains the control character U+0002 or U+0003"
            )
        environment = _environment()
        try:
            tree = environment.parse(source)
            self.uses = frozenset(meta.find_undeclared_variables(tree))
            _mark_item_text(tree)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"prompt part {name!r}, line {error.lineno}: {error.message} Given: {source!r}"
            ) from error
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


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
    )
    environment.globals.clear()
    del environment.filters["random"]  # equal slates must give equal prompts
    environment.filters[_mark.__name__] = _mark
    return environment


def _mark(value: object) -> str:
    """Returns the printed value between marks; the filter put around every item expression."""
    if isinstance(value, StrictUndefined):
        return str(value)  # raises, naming the variable
    text = clean(str(value))
    return f"{_OPEN}{text}{_CLOSE}" if text else ""


def _mark_item_text(tree: nodes.Template) -> None:
    """Puts the `_mark` filter around every printed expression that may hold item text."""
    for output in tree.find_all(nodes.Output):
        output.nodes = [
            nodes.Filter(node, _mark.__name__, [], [], None, None) if _may_hold(node) else node
            for node in output.nodes
        ]


def _may_hold(node: nodes.Expr) -> bool:
    names = {found.name for found in node.find_all(nodes.Name)}
    if isinstance(node, nodes.Name):
        names.add(node.name)
    return not names <= NOT_ITEM
