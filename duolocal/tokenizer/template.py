"""ChatTemplate: a model's jinja template, rendered in a sandbox.

Owns the environment that Hugging Face templates expect (transformers' `apply_chat_template`): trimmed blocks,
`raise_exception`, `strftime_now`, `tojson`, loop controls and the `generation` tag. Knows no tokens.
A template comes with a download, so it is treated as hostile: no attribute reaches Python, and time, memory and output
are bounded (`template_bounds`).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from duolocal.errors import TokenizerError
from duolocal.tokenizer.template_bounds import BoundedEnvironment, Bounds, TemplateStop

_RANGE_BUDGET = 1_000_000  # numbers that all calls of range may count in one rendering
_OUTPUT_BASE = 1_000_000  # characters a template may write beside the contents
_SOURCE = 200_000  # characters of a template; the longest that models bring have about 20,000
_SECONDS = 2.0  # of processor time for a rendering, beside what the messages may take
_MESSAGE_SECONDS = 0.005
_MESSAGE_WEIGHT = 8  # items and names of a message
_DATE_FORMAT = 200  # characters
_CONTENT_COPIES = 4  # times a template may write every content


def _raise_exception(message: object) -> NoReturn:
    raise TemplateStop(" ".join(str(message).split()))


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
            raise TemplateStop(f"its loops count past {_RANGE_BUDGET:,}")
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
        if len(source) > _SOURCE:
            raise TokenizerError(f"the chat template has {len(source):,} characters, wanted at most {_SOURCE:,}")
        self._environment = environment = BoundedEnvironment()
        environment.add_filter("tojson", _tojson)
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self._strftime
        try:
            self._template = environment.from_string(source)
        except Exception as error:
            raise TokenizerError(f"the chat template cannot be read ({_reason(error)})") from error

    def _strftime(self, layout: str) -> str:
        if len(layout) > _DATE_FORMAT:
            raise TemplateStop(f"it formats the date with {len(layout)} characters, wanted at most {_DATE_FORMAT}")
        return self._now.strftime(layout)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """Return the conversation as the model expects it.

        Raises TokenizerError where the template refuses the conversation, breaks, or writes more than four
        times the contents and a million characters, or computes for too long.
        """
        limit = _OUTPUT_BASE + _CONTENT_COPIES * sum(len(message["content"]) for message in messages)
        limit += _MESSAGE_WEIGHT * len(messages)
        self._environment.bounds = Bounds(limit, _SECONDS + _MESSAGE_SECONDS * len(messages))
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
                    raise TemplateStop(f"it writes more than {limit:,} characters")
        except TemplateStop as error:
            raise TokenizerError(f"the chat template refuses this conversation: {error}") from error
        except Exception as error:
            raise TokenizerError(f"the chat template fails on this conversation ({_reason(error)})") from error
        return "".join(pieces)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
