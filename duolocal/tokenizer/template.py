"""ChatTemplate: a model's jinja template, rendered in a sandbox.

Owns the environment that Hugging Face templates expect (transformers' `apply_chat_template`): trimmed blocks,
`raise_exception`, `strftime_now`, `tojson`, loop controls and the `generation` tag. Knows no tokens.
A template comes with a download, so it is treated as hostile: no attribute reaches Python, the output is bounded,
`range` has a budget, and the operators `*`, `**` and `%` cannot build a huge value. Not bounded: the time of
nested loops over other values, and the memory of filters that pad or repeat.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from duolocal.errors import TokenizerError

_RANGE_BUDGET = 1_000_000  # numbers that all calls of range may count in one rendering
_OUTPUT_BASE = 1_000_000  # characters a template may write beside the contents
_PRODUCT = 1_000_000  # largest factor, and length of a repeated string
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")  # a width that is computed or has four digits
_CONTENT_COPIES = 4  # times a template may write every content


class _TemplateStop(Exception):
    """Raised by the template itself (`raise_exception`) or by one of our bounds; holds one line."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if not _small(operator, left, right):
            raise _TemplateStop(f"it uses {operator!r} to build a huge value")
        return super().call_binop(context, operator, left, right)


def _small(operator: str, left: Any, right: Any) -> bool:
    """Say whether a product, power, remainder or %-format is sure to be small."""
    numbers = [side for side in (left, right) if isinstance(side, int | float)]
    if any(abs(number) > _PRODUCT for number in numbers):
        return False
    if operator == "%" and isinstance(left, str):
        return _WIDE_FORMAT.search(left) is None
    if operator == "*" and len(numbers) == 1:
        return len(right if numbers[0] is left else left) * abs(numbers[0]) <= _PRODUCT
    return len(numbers) == 2 and operator != "**"


def _raise_exception(message: object) -> NoReturn:
    raise _TemplateStop(" ".join(str(message).split()))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _budgeted_range() -> Callable[..., range]:
    left = _RANGE_BUDGET

    def counted(*bounds: int) -> range:
        nonlocal left
        numbers = range(*bounds)
        # len() of an astronomic range raises OverflowError: compare by the bounds
        left -= max(0, (numbers.stop - numbers.start) // numbers.step) + 1
        if left < 0:
            raise _TemplateStop(f"its loops count past {_RANGE_BUDGET:,}")
        return numbers

    return counted


class ChatTemplate:
    """A compiled template; `render` returns the conversation as one string.

    The clock is read once, when the template is made: a conversation rendered twice is the same twice, also
    across midnight.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], *, now: datetime | None = None) -> None:
        self.source = source
        self._tokens = dict(tokens)  # "bos_token": "<s>", ...
        self._now = now or datetime.now()
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._now.strftime
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(f"the chat template cannot be read ({_reason(error)})") from error

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the conversation as the model expects it.

        Raises TokenizerError where the template refuses the conversation, breaks, or writes more than four
        times the contents and a million characters.
        """
        limit = _OUTPUT_BASE + _CONTENT_COPIES * sum(len(message["content"]) for message in messages)
        values: dict[str, Any] = {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "range": _budgeted_range(),
            **self._tokens,
        }
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > limit:
                    raise _TemplateStop(f"it writes more than {limit:,} characters")
        except _TemplateStop as error:
            raise TokenizerError(f"the chat template refuses this conversation: {error}") from error
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise TokenizerError(f"the chat template fails on this conversation ({_reason(error)})") from error
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
