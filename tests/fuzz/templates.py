"""Chat templates as an enemy would write them: known attacks, generated programs, and damage to real templates."""

import random

from tests.fuzz.damage import damaged_text
from tests.tokenizer_files import LLAMA2, LLAMA3, MISTRAL, QWEN25, SMOLLM2, THINKS

REAL = (LLAMA2, LLAMA3, MISTRAL, QWEN25, SMOLLM2, THINKS)
NS = "{% set ns = namespace(x='ab', y=[1, 2]) %}"
ATTACKS = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ (messages|attr('append'))({}) }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum(n=10000000) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ '%s'|format(self.__init__.__globals__) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ '{:{w}}'.format('x', w=10**9) }}",
    "{{ '{x:>{w}}'.format_map({'x': 1, 'w': 1000000000}) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '%*d'|format(1000000000, 1) }}",
    "{{ 'x'|center(1000000000) }}",
    "{{ 'x'.center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ '1'.zfill(1000000000) }}",
    "{{ '\t'.expandtabs(1000000000) }}",
    "{{ 'x' * 1000000000 }}",
    "{{ [0] * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000)|replace('x', 'y' * 100000) }}",
    "{{ ('x' * 100000).join(['a'] * 100000) }}",
    "{{ (['a'] * 100000)|join('x' * 100000) }}",
    "{{ 'x\n'|indent(1000000000, true) }}",
    "{{ ('\n' * 100000)|indent(100000, true) }}",
    "{{ [1]|tojson(indent=1000000000) }}",
    "{{ [1]|batch(1000000000, 'x')|list }}",
    "{{ [1]|slice(1000000000)|list }}",
    "{{ 'a b'|wordwrap(1, wrapstring='x' * 1000000) }}",
    "{{ 'x'|urlize }}",
    "{{ range(100000000) | list }}",
    "{{ range(1000000) | list | string }}",
    "{{ range(999999)|sum }}",
    "{% for i in range(999) %}{% for j in range(999) %}{% for k in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% for c in 'x' * 9999 %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in m * 9999 recursive %}{{ loop('x' * 9999) }}{% endfor %}",
    "{% for a in 'xy' recursive %}{{ loop('xy') }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    NS + "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}{{ ns.x|length }}",
    NS + "{% for i in range(60) %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y }}",
    NS + "{% for i in range(60) %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.y|tojson }}",
    NS
    + "{% for i in range(60) %}{% set ns.y = {'a': ns.y, 'b': ns.y} %}{% endfor %}{{ ns.y == ns.y }}{{ ns.y|string }}",
    NS + "{% for i in range(60) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ {ns.y: 1} }}",
    NS + "{% for i in range(60) %}{% set ns.y = ns.y + ns.y %}{% endfor %}{{ ns.y|length }}",
    NS + "{% for i in range(60) %}{% set ns.y = dict(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.y }}",
    NS + "{% for i in range(3000) %}{% set ns.y = [ns.y] %}{% endfor %}{{ ns.y }}",
    NS + "{% set ns.x = ns %}{{ ns }}{{ ns|tojson }}",
    NS + "{% for i in range(900000) %}{% set ns.x = ns.x ~ 'x' %}{% endfor %}{{ ns.x }}",
    "{% set x = messages %}{% for i in range(20) %}{% set x = x + x %}{% endfor %}{{ x|length }}",
    "{{ [[1] * 1000] * 1000 == [[1] * 1000] * 1000 }}",
    "{{ ('a' * 1000000) in ('a' * 1000000) }}",
    "{{ 'x'|default('y'|center(100000000)) }}",
    "{{ (('9' * 100000)|int) ** 2 }}",
    "{{ ('9' * 4300)|int * ('9' * 4300)|int }}",
    "{{ 1.5|round(1000000000) }}",
    "{{ strftime_now('%' ~ '9' * 9 ~ 'd') }}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{{ raise_exception('two\nlines \x1b[31m') }}",
    "{{ raise_exception('x' * 1000000) }}",
    "{{ nothing.at.all }}",
    "{{ 1 // 0 }}",
    "{{ 1.0e308 * 10 }}{{ 10.0 ** 400 }}",
    "{{ messages[10 ** 6] }}",
    "{{ 'x'.encode('utf-16') }}",
    "{{ 'x'.__format__('>1000000000') }}",
    "{{ 'abc'|map('upper')|map('center', 1000000000)|list }}",
    "{{ ['a']|map('replace', 'a', 'b' * 1000000)|list|length }}",
    "{% filter center(1000000000) %}x{% endfilter %}",
    "{% call(x) raise_exception('x') %}{% endcall %}",
    "{{ joiner('x' * 1000000)() }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.reset }}",
    "{% generation %}{% endgeneration %}{% break %}",
    "{% for i in [1] %}{% continue %}{% endfor %}",
    "{% autoescape true %}{{ '<' * 100 }}{% endautoescape %}",
    "{% raw %}{{ x }}{% endraw %}{# comment #}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% block a %}x{% endblock %}{{ self.a() * 100 }}",
    "{% extends 'x' %}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "{{ " + "not " * 3000 + "1 }}",
    "{{ " + "1 + " * 5000 + "1 }}",
    "{{ " + "a." * 3000 + "b }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{% for a in [1] %}" * 40 + "x" + "{% endfor %}" * 40,
    "{% if x %}" * 99,
    "{{ 1e999999999 }}{{ 0x" + "f" * 10000 + " }}",
    "{{ " + "9" * 10000 + " }}",
    "{{ '" + "\\" * 99 + "' }}",
    "{{ x" + "|upper" * 2000 + " }}",
    "{{ ['a','b']|sort(attribute='x' * 1000)|list }}",
    "{{ [3, 1]|sort|string|list|unique|list|random }}",
    "{{ {'a': 1}|dictsort|xmlattr }}",
    "{{ messages|groupby('role')|list }}",
    "{{ messages|pprint }}",
    "\x00\x01\ud800",
)
VALUES = (
    "messages",
    "'ab'",
    "1",
    "ns.x",
    "ns.y",
    "range(30)",
    "[ns.x, 2]",
    "{'a': ns.y}",
    "m",
    "none",
    "loop",
    "bos_token",
)
FILTERS = """
    length upper list string trim tojson join first last sort reverse unique sum map('upper') select replace('a','bb')
    default('x') int items dictsort indent batch(3) format(1) escape safe attr('x') selectattr('role') center(80)
""".split()  # noqa: SIM905
METHODS = (
    "strip()",
    "split('a')",
    "replace('a', 'bbb')",
    "join(['x', 'y'])",
    "upper()",
    "items()",
    "get('a')",
    "__class__",
)


def expression(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(8) if depth < 4 else 0
    if kind <= 1:
        return rng.choice(VALUES)
    a, b = expression(rng, depth + 1), expression(rng, depth + 1)
    if kind == 2:
        return f"({a} {rng.choice(('+', '~', '*', '%', '-', '//', '**', '==', 'in', 'and', '<'))} {b})"
    if kind == 3:
        return f"({a})|{rng.choice(FILTERS)}"
    if kind == 4:
        return f"({a}).{rng.choice(METHODS)}"
    if kind == 5:
        return f"[{a}, {b}]"
    if kind == 6:
        return f"({a})[{rng.choice(('0', '-1', ':1', '::-1', repr('role')))}]"
    return f"({a} if {b} else {a})"


def statements(rng: random.Random, depth: int = 0) -> str:
    out = []
    for _ in range(rng.randrange(1, 4)):
        kind = rng.randrange(7) if depth < 4 else 0
        inner = statements(rng, depth + 1) if kind > 2 else ""
        if kind <= 1:
            out.append("{{ " + expression(rng) + " }}")
        elif kind == 2:
            out.append("{% set ns." + rng.choice("xy") + " = " + expression(rng) + " %}")
        elif kind == 3:
            out.append("{% for m in " + expression(rng) + " %}" + inner + "{% endfor %}")
        elif kind == 4:
            out.append("{% if " + expression(rng) + " %}" + inner + "{% endif %}")
        elif kind == 5:
            out.append("{% set ns.x %}" + inner + "{% endset %}")
        else:
            out.append("{% macro f(n) %}" + inner + "{% endmacro %}{{ f(1) }}")
    return "".join(out)


def hostile_template(rng: random.Random) -> str:
    """Return one of the attacks, a generated program, or a real template that is damaged."""
    kind = rng.randrange(4)
    if kind == 0:
        return rng.choice(ATTACKS)
    if kind == 1:
        return damaged_text(rng.choice(ATTACKS), rng)
    if kind == 2:
        return NS + statements(rng)
    return damaged_text(rng.choice(REAL), rng)
