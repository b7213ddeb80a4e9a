"""A jinja environment for templates of strangers: no way to Python, and bounds on time, memory and output.

jinja2's sandbox keeps a template from attributes and modules, but not from work: `|center(1000000000)` takes a
gigabyte in one call, doubling a text sixty times takes all there is, and nested loops take for ever. Here

- a step of a loop, a call, a filter, an output and a literal each look at the clock;
- whatever an operation is given and makes is weighed: characters and items, counted as often as they are held. No
  value may weigh more than `Bounds.limit`, so that a single operation cannot take long or much;
- operations whose result may be far larger than what they are given are weighed before, and those that templates have
  no use for are not there.

Owns the environment. What a chat template is given and must return is `template.py`.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_CLOCK_STEPS = 32  # between two looks at the clock
_DEPTH = 50  # of lists in lists
_PRODUCT = 1_000_000  # largest factor, and length of a repeated string
_COUNT = 10_000  # largest number that a filter or method is given
_WIDTH = 100  # of an indentation
_PATTERN = 200  # characters to search for from the end, which takes their product with the text
_MANY_DIGITS = re.compile(r"\d+")
_FILTERS = frozenset(
    """
    abs attr capitalize count d default dictsort e escape first float forceescape format groupby indent int items join
    last length list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum
    title tojson trim truncate unique upper wordcount
    """.split()  # noqa: SIM905
)
_STRING_METHODS = frozenset(
    """
    capitalize casefold count endswith find format format_map index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex
    rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
    """.split()  # noqa: SIM905
)
_FROM_END = ("rfind", "rindex", "rpartition", "rsplit")


class TemplateStop(Exception):
    """Raised by the template itself (`raise_exception`) or by one of the bounds; says why."""


class Bounds:
    """What is left to one rendering."""

    def __init__(self, limit: int, seconds: float) -> None:
        self.limit = limit
        self._until_s = time.thread_time() + seconds
        self._seconds = seconds
        self._steps = 0

    def step(self) -> None:
        """Count a step; raise TemplateStop where the time is up."""
        self._steps += 1
        if self._steps % _CLOCK_STEPS == 0 and time.thread_time() > self._until_s:
            raise TemplateStop(f"it computes for more than {self._seconds:.0f} s")

    def weigh(self, *values: object) -> int:
        """Return how many characters and items the values hold; raise TemplateStop where they are too many."""
        weight = 0
        # A stack of what is left to look at, and how deep it lies.
        left: list[tuple[Iterator[object], int]] = [(iter(values), 0)]
        while left:
            inner, depth = left[-1]
            value = next(inner, left)
            if value is left:
                left.pop()
                continue
            weight += 1
            if isinstance(value, str | bytes):
                weight += len(value)
            elif isinstance(value, int):
                weight += value.bit_length() // 4
            elif (parts := _parts(value)) is not None:
                if depth == _DEPTH:
                    raise TemplateStop(f"it nests lists more than {_DEPTH} deep")
                left.append((parts, depth + 1))
            if weight > self.limit:
                raise TemplateStop(f"it makes a value of more than {self.limit:,} characters")
            self.step()
        return weight

    def spare(self, weight: int) -> None:
        """Raise TemplateStop where something of this weight would be too heavy."""
        if weight > self.limit:
            raise TemplateStop(f"it makes a value of more than {self.limit:,} characters")


def _parts(value: object) -> Iterator[object] | None:
    """Return what a container holds, keys before values; None for anything else."""
    if isinstance(value, dict):
        return (part for pair in value.items() for part in pair)
    if isinstance(value, list | tuple | set | frozenset | type({}.items()) | type({}.keys()) | type({}.values())):
        return iter(value)
    if isinstance(value, Namespace):
        return iter((value._Namespace__attrs,))
    return None


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks training targets; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own convention

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Watch(NodeTransformer):
    """Puts a filter of ours around what loops go through, joined texts and literals."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise TemplateStop("it has a recursive loop")
        self.generic_visit(node)
        node.iter = _through("_each", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _through("_join", nodes.List(node.nodes, lineno=node.lineno))

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _through("_weighed", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _through("_weighed", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _through("_weighed", node) if node.ctx == "load" else node


def _through(name: str, node: nodes.Node) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Each:
    """What a loop goes through, a step at a time; as long as it is."""

    def __init__(self, values: Iterable[object], bounds: Bounds) -> None:
        self._values = values
        self._bounds = bounds

    def __iter__(self) -> Iterator[object]:
        for value in self._values:
            self._bounds.step()
            yield value

    def __len__(self) -> int:
        return len(self._values)  # type: ignore[arg-type]


@jinja2.pass_context
def _output(context: Any, value: object) -> object:
    """Weigh what is written. It takes the context so that nothing is worked out when the template is compiled."""
    context.environment.bounds.weigh(value)
    return value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs templates; `bounds` are those of the rendering that runs."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # it would run operations on literals before there are bounds
            extensions=[_Generation, loopcontrols],
            finalize=_output,
        )
        self.bounds = Bounds(0, 0)
        for name in set(self.globals) - {"cycler", "dict", "joiner", "namespace"}:
            del self.globals[name]
        known, self.filters = self.filters, {}
        for name in _FILTERS:
            self.add_filter(name, known[name])
        self.filters |= {"_each": self._each, "_join": self._join, "_weighed": self._weighed}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Let templates use a filter, within the bounds."""
        before = _BEFORE.get(name)
        wants_first = getattr(function, "jinja_pass_arg", None)  # the environment, for example

        def bounded(*given: Any, **options: Any) -> Any:
            lead, arguments = (given[:1], given[1:]) if wants_first else ((), given)
            _check_numbers(arguments[1:], options)
            self.bounds.weigh(arguments, options)
            if before is not None:
                arguments = before(self.bounds, arguments, options)
            return self._whole(function(*lead, *arguments, **options))

        if wants_first:
            bounded.jinja_pass_arg = wants_first  # type: ignore[attr-defined]
        self.filters[name] = bounded

    def _whole(self, result: Any) -> Any:
        """Return the result of an operation, weighed; what comes one by one is taken one by one."""
        if isinstance(result, Iterator):
            return iter(_Each(result, self.bounds))
        self.bounds.weigh(result)
        return result

    def _each(self, values: Iterable[object]) -> _Each:
        return _Each(values, self.bounds)

    def _join(self, values: list[object]) -> str:
        self.bounds.weigh(values)
        return self._whole("".join(map(str, values)))

    def _weighed(self, value: object) -> object:
        self.bounds.weigh(value)
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a block or macro has written; each part has been weighed."""
        parts = list(parts)
        self.bounds.spare(sum(map(len, parts)))
        return "".join(parts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watch().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Say whether a template may read an attribute; of texts the methods listed here, of numbers none."""
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, int | float | bytes):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        bounds = __self.bounds
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # the sandbox wraps str.format
        bounds.weigh(args, kwargs)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            _check_numbers(args, kwargs)
            bounds.weigh(owner)
            if name in _FROM_END and args and isinstance(args[0], str) and len(args[0]) > _PATTERN:
                raise TemplateStop(f"it looks for more than {_PATTERN} characters from the end of a text")
            before = _BEFORE.get(name.removesuffix("_map"))
            if before is not None:
                flipped = (args[0], owner) if name == "join" and args else (owner, *args)
                flipped = before(bounds, flipped, kwargs)
                args = (flipped[0],) if name == "join" and args else flipped[1:]
        return __self._whole(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        bounds = self.bounds
        bounds.weigh(left, right)
        if operator == "%" and isinstance(left, str):
            _before_format(bounds, (left, right), {})
        elif operator != "+" and not _small(operator, left, right):
            raise TemplateStop(f"it uses {operator!r} to build a huge value")
        return self._whole(super().call_binop(context, operator, left, right))


def _small(operator: str, left: Any, right: Any) -> bool:
    """Say whether a product, power or remainder is sure to be small."""
    numbers = [side for side in (left, right) if isinstance(side, int | float)]
    if any(abs(number) > _PRODUCT for number in numbers):
        return False
    if operator == "*" and len(numbers) == 1:
        return len(right if numbers[0] is left else left) * abs(numbers[0]) <= _PRODUCT
    return len(numbers) == 2 and operator != "**"


def _check_numbers(arguments: Iterable[object], options: dict[str, object]) -> None:
    for value in (*arguments, *options.values()):
        if isinstance(value, int | float) and abs(value) > _COUNT:
            raise TemplateStop(f"it gives a function the number {value!r:.30}: wanted at most {_COUNT:,}")


# What must be known before an operation: given its arguments, the text or list it works on first.
_Arguments = tuple[Any, ...]


def _before_format(bounds: Bounds, arguments: _Arguments, options: dict[str, Any]) -> _Arguments:
    """Every field may hold every value once more, and be as wide as the digits in the format say."""
    layout = str(arguments[0])
    fields = layout.count("%") + layout.count("{")
    numbers = (int(digits[:9]) for digits in _MANY_DIGITS.findall(layout))
    if "*" in layout or re.search(r"\{[^}]*\{", layout):
        raise TemplateStop("it computes the width of a field")
    bounds.spare(len(layout) + sum(numbers) + fields * bounds.weigh(arguments[1:], options))
    return arguments


def _before_replace(bounds: Bounds, arguments: _Arguments, options: dict[str, Any]) -> _Arguments:
    text, old, new = (str(value) for value in (*arguments, *options.values(), "", "")[:3])
    bounds.spare(len(text) + text.count(old) * len(new))
    return arguments


def _before_join(bounds: Bounds, arguments: _Arguments, options: dict[str, Any]) -> _Arguments:
    """Take the parts one by one: they may come from a generator."""
    values = list(_Each(arguments[0], bounds))
    glue = next((value for value in (*arguments[1:], *options.values()) if isinstance(value, str)), "")
    bounds.spare(bounds.weigh(values) + len(values) * len(glue))
    return (values, *arguments[1:])


def _before_indent(bounds: Bounds, arguments: _Arguments, options: dict[str, Any]) -> _Arguments:
    for value in (*arguments[1:], *options.values()):
        size = len(value) if isinstance(value, str) else value if isinstance(value, int) else 0
        if size > _WIDTH:
            raise TemplateStop(f"it indents by {size}: wanted at most {_WIDTH}")
    return arguments


def _before_sum(bounds: Bounds, arguments: _Arguments, options: dict[str, Any]) -> _Arguments:
    """Sums of lists take the square of their length."""
    for value in (*arguments[1:], *options.values()):
        if isinstance(value, list | tuple | dict):
            raise TemplateStop("it sums lists")
    return arguments


_BEFORE: dict[str, Callable[[Bounds, _Arguments, dict[str, Any]], _Arguments]] = {
    "format": _before_format,
    "replace": _before_replace,
    "join": _before_join,
    "indent": _before_indent,
    "tojson": _before_indent,
    "sum": _before_sum,
}
