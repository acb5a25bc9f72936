"""Renders a stranger's chat template: in jinja2's sandbox, and in bounded time and memory.

The sandbox keeps a template from Python's internals. What it leaves open is closed here: passes of loops,
calls and what filters look at are counted, and what makes long text out of short is measured first.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loopcontrols
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS = 2 * 10**6
"""Passes of loops, calls, and values looked at, in one rendering."""
CHARACTERS = 2**22
"""Characters of one text, rendered or in between."""
WIDTH = 100
"""Columns to which a text may be indented or filled up."""

_ABSENT = ("slice", "batch", "urlize", "xmlattr", "wordwrap", "center", "filesizeformat", "random")
"""Filters of jinja2 that chat templates have no use for, and that make much of little."""
_CHEAP = ("length", "count", "first", "last", "default", "d")
_WIDE = ("ljust", "rjust", "center", "zfill", "expandtabs", "indent")
_COMPUTED = re.compile(r"\d{3}|\*|\{[^}]*\{")


class Raised(Exception):
    """Carries the message that a template gave to `raise_exception`."""


class Template:
    """Is a compiled chat template.

    Raises:
      ValueError: The template's syntax is wrong.
    """

    def __init__(self, source: str):
        self._environment = _Environment()
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template cannot be read: {_said(error)}") from error

    def render(self, **variables: Any) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text, and the characters that `{% generation %}` blocks made, start and end of each.

        Raises:
          Raised: The template called `raise_exception`.
          ValueError: The template failed, or wanted what it must not have.
        """
        state = self._environment.state = _State()
        try:
            for part in self._template.generate(**variables):
                state.append(part)
        except SecurityError as error:
            raise ValueError(f"the chat template is refused: {error}") from error
        except Raised:
            raise
        except Exception as error:  # a template can raise whatever an expression can
            raise ValueError(f"the chat template failed: {_said(error)}") from error
        return "".join(state.parts), state.generated


class _State:
    """Holds what one rendering has made so far, and how much work it was."""

    def __init__(self):
        self.steps, self.length = 0, 0
        self.parts: list[str] = []
        self.generated: list[tuple[int, int]] = []

    def work(self, steps: int) -> None:
        self.steps += steps
        if self.steps > STEPS:
            raise SecurityError(f"it takes more than {STEPS} steps for one conversation")

    def append(self, part: str) -> None:
        self.length = _bounded(self.length + len(part))
        self.parts.append(part)

    def look_at(self, *values: Any) -> None:
        """Counts the parts of values; lists may hold one another, so that few are many when written out."""
        for value in values:
            _length(value, self)


class _Generation(Extension):
    """Parses `{% generation %}`, which marks what an assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text, state = caller(), self.environment.state  # pyright: ignore[reportAttributeAccessIssue]
        state.generated.append((state.length, state.length + len(text)))
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """Is the sandbox, counting, with the names that chat templates use."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self):
        extensions = [_Generation, loopcontrols]
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=self._looked_at
        )
        self.state = _State()
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._counted(name, f) for name, f in self.filters.items() if name not in _ABSENT
        }
        self.filters |= {"__step": self._step, "__join": self._join}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Puts a count at the start of each loop and macro, and a measure around each `~`."""
        tree = super()._parse(source, name, filename)
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            node.body.insert(0, nodes.ExprStmt(_filter("__step", nodes.Const(0))))
        for node in list(tree.find_all(nodes.Concat)):
            node.nodes = [_filter("__join", nodes.List(node.nodes))]
        for node in tree.find_all(nodes.Node):
            node.lineno = node.lineno or 1
        return tree.set_environment(self)  # pyright: ignore[reportReturnType]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Measures what `+`, `*`, `**` and `%` would make."""
        self.state.look_at(left, right)
        if operator == "%" and isinstance(left, str):
            _measure("format", left, (right,))
        elif operator in ("*", "**"):
            values = [value for value in (left, right) if not isinstance(value, int | float)]
            times = [abs(value) for value in (left, right) if isinstance(value, int | float)]
            if values:
                _bounded(_length(values) * int(max(times, default=1)))
            elif max(times) > 2**64 or (operator == "**" and abs(right) > 64):
                raise SecurityError("it makes huge numbers")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, *args: Any, **options: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Counts and measures a call."""
        bound = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner, args = getattr(bound, "__self__", None), tuple(map(self._listed, args))
        given = (*args, *options.values())
        self.state.look_at(*given)
        if isinstance(owner, str | bytes):
            self.state.look_at(owner)
            _measure(bound.__name__, owner, given)
        return super().call(context, function, *args, **options)

    def _counted(self, name: str, function: Any) -> Any:
        if name in _CHEAP:
            return function
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def counted(*args: Any, **options: Any) -> Any:
            before, (owner, *given) = args[:first], map(self._listed, args[first:])
            self.state.look_at(owner, *given, *options.values())
            _measure(name, owner, (*given, *options.values()))
            return function(*before, owner, *given, **options)

        return counted

    def _listed(self, value: Any) -> Any:
        """Returns a list for what would come one by one, once it is known to be short."""
        if not isinstance(value, Iterator) or isinstance(value, LoopContext):
            return value
        found, length = [], 0
        for part in value:
            length = _bounded(length + _length(part, self.state))
            found.append(part)
        return found

    @jinja2.pass_context
    def _step(self, _context: Any, _value: Any) -> None:
        self.state.work(1)

    def _looked_at(self, value: Any) -> Any:
        self.state.look_at(value)
        return value

    def _join(self, parts: list[Any]) -> str:
        self.state.look_at(*parts)
        return "".join(map(str, parts))


def _filter(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None)


def _measure(name: str, owner: Any, given: tuple[Any, ...]) -> None:
    """Refuses a method or filter of this name whose text would be too long."""
    size = _length(list(given))
    if name in _WIDE:
        if max((value for value in given if isinstance(value, int)), default=0) > WIDTH:
            raise SecurityError(f"{name} is asked for more than {WIDTH} columns")
        _bounded((str(owner).count("\n") + str(owner).count("\t")) * (WIDTH + size))
    elif name == "replace" and len(given) > 1:
        _bounded(str(owner).count(str(given[0])) * size)
    elif name == "translate":
        _bounded(len(owner) * size)
    elif name == "join":
        parts, between = owner, given[:1]
        if isinstance(owner, str | bytes) and given:
            parts, between = given[0], owner
        _bounded((len(parts) if hasattr(parts, "__len__") else 1) * _length(between))
    elif name in ("format", "format_map"):
        if _COMPUTED.search(str(owner)):
            raise SecurityError("it formats to a width that is large or computed")
        _bounded((str(owner).count("{") + str(owner).count("%")) * size)


def _length(value: Any, state: _State | None = None) -> int:
    """Returns how long a value is when written out, about; its parts count as steps."""
    total, waiting, state = 0, [value], state or _State()
    while waiting:
        value = waiting.pop()
        size = len(value) if isinstance(value, str | bytes) else 1
        state.work(1 + size // 1000)
        total = _bounded(total + size)
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | range):
            waiting += value
    return total


def _bounded(length: int) -> int:
    if length > CHARACTERS:
        raise SecurityError(f"it makes a text of more than {CHARACTERS} characters")
    return length


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """Writes JSON, without the escapes for HTML that jinja2's own filter makes."""
    _measure("indent", "", (indent,))
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: Any = "") -> None:
    raise Raised(str(message))


def _now(form: str) -> str:
    _measure("format", form, ())
    return datetime.datetime.now().strftime(form)


def _said(error: BaseException) -> str:
    line = getattr(error, "lineno", None)
    said = (str(error).splitlines() or [type(error).__name__])[0]
    return f"{said} (line {line} of the template)" if line else said
