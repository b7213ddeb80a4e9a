"""Options are declared once: what is derived from the declarations agrees with them, for every command."""

import importlib
import inspect
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal import cli
from duolocal.commands.parsing import parser_of
from duolocal.errors import SettingsError
from duolocal.options import (
    ANY,
    REQUIRED,
    TOKENS,
    change,
    choice,
    declared_in,
    find,
    flag,
    listed,
    option,
    values_in,
    words_of,
)
from duolocal.settings import (
    ACTIVATIONS,
    DTYPES,
    KERNELS,
    OUTER_WEIGHTS,
    PREFILLS,
    SPECULATE,
    WEIGHTS,
    LoadSettings,
    Sampling,
)
from tests.terminal_fakes import FakeSession
from tests.test_terminal_chat import make_chat

ROOT = Path(__file__).parents[1]
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1).filter(str.strip)
NUMBERS = st.integers(1, 2**31 - 1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "model": TEXTS,
    "context": NUMBERS,
    "kv": TEXTS,
    "heads": TEXTS,
    "sink_size": st.integers(0, 2**31 - 1),
    "recent_size": NUMBERS,
    "chunk_size": NUMBERS,
    "device": TEXTS,
    "dtype": st.sampled_from(DTYPES),
    "rope": st.text(st.characters(codec="utf-8")),
    "threads": st.integers(1, 256),
    "kernels": st.sampled_from(KERNELS),
    "activations": st.sampled_from(ACTIVATIONS),
    "speculate": st.sampled_from(SPECULATE),
    "weights": st.sampled_from(WEIGHTS),
    "outer_weights": st.sampled_from(OUTER_WEIGHTS),
    "kv_device_memory": st.integers(0, 2**50),
    "select": st.sampled_from(["off", "auto"]) | NUMBERS.map(str),
    "prefill": st.sampled_from(PREFILLS),
}


def load_settings(words: list[str]) -> LoadSettings:
    """Read the settings of a chat."""
    found = cli.read(["chat", *words])
    assert found is not None
    settings = found[1][1]
    assert isinstance(settings, LoadSettings)
    return settings


def commands() -> list[Any]:
    return [pytest.param(command, id=name) for name, command in cli.COMMANDS.items()]


@pytest.mark.parametrize("command", commands())
@pytest.mark.parametrize("columns", ["50", "200"])
def test_help_names_every_option_with_its_help(command: Any, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    parser = parser_of(command)
    shown = parser.format_help()
    joined = " ".join(shown.split())
    for part in command.parts:
        for item in part.items:
            declared = declared_in(item)
            assert declared.metavar or declared.positional or declared.kind.is_flag
            names = (declared.metavar or item.name,) if declared.positional else (flag(item.name), *declared.also)
            assert all(re.search(rf"(?m)^  .*(?<![\w-]){re.escape(name)}(?![\w-])", shown) for name in names)
            assert " ".join(declared.help.split()) in joined
    assert "\x1b" not in shown and "%%" not in shown
    to_copy = [parser.format_usage().strip(), *command.epilog.splitlines()]
    assert max(len(line) for line in shown.splitlines() if line not in to_copy) <= int(columns)


@pytest.mark.parametrize("command", commands())
def test_an_option_stands_once(command: Any) -> None:
    names = [item.name for part in command.parts for item in part.items]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("command", commands())
def test_what_a_command_runs_takes_what_it_reads(command: Any) -> None:
    module, _, name = command.run.partition(":")
    run = getattr(importlib.import_module(f"duolocal.terminal.{module}"), name)
    taken = [parameter.annotation for parameter in inspect.signature(run).parameters.values()]
    assert taken == [part.owner for part in command.parts]


@given(given=st.fixed_dictionaries({}, optional=VALUES))
def test_options_ask_for_the_same_settings(given: dict[str, Any]) -> None:
    settings = LoadSettings(**given)
    words = settings.options()
    assert load_settings(words) == settings
    assert replace(LoadSettings(), **values_in(LoadSettings, words)) == settings


def test_every_field_is_tried() -> None:
    assert list(VALUES) == [item.name for item in fields(LoadSettings)]


def test_what_begins_with_a_dash_is_asked_for_again() -> None:
    settings = LoadSettings(model="-m.gguf", heads="--kv", rope="")
    assert load_settings(settings.options()) == settings
    assert words_of(settings, without=("model",)) == ["--heads=--kv", "--rope", ""]


def test_old_sessions_options_that_are_gone_are_passed_over() -> None:
    assert values_in(LoadSettings, ["--gone", "x", "--context", "4096", "--sink-size", "0"]) == {
        "context": 4096,
        "sink_size": 0,
    }


@pytest.mark.parametrize("name", [item.name for item in fields(LoadSettings)])
def test_set_knows_every_setting_that_needs_a_restart(name: str) -> None:
    chat, _ = make_chat(FakeSession())
    value = {"context": "4K", "kv_device_memory": "1GiB", "select": "auto"}.get(name)
    default = getattr(LoadSettings(), name)
    value = value or (default if isinstance(default, str) else "4")
    with pytest.raises(SettingsError) as raised:
        chat.handle(f"/set {name} {value}")
    said = str(raised.value)
    assert said.startswith(f"{name} is fixed while the model is loaded; restart with: duolocal chat ")
    assert f"{flag(name)} {value}" in said


def test_set_refuses_what_a_restart_would_refuse() -> None:
    chat, _ = make_chat(FakeSession())
    with pytest.raises(SettingsError, match=r"^context is '12Q': give a number of tokens"):
        chat.handle("/set context 12Q")
    with pytest.raises(SettingsError, match=r"restart with: .* --dtype VALUE$"):
        chat.handle("/set dtype")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.2", 0.2),
        ("top_k", "5", 5),
        ("top_p", "1", 1.0),
        ("min_p", "0.1", 0.1),
        ("repetition_penalty", "1.3", 1.3),
        ("seed", "7", 7),
        ("max_tokens", "2K", 2048),
        ("stop", "END 'a b'", ("END", "a b")),
    ],
)
def test_every_sampling_setting_can_be_set_and_typed_again(name: str, text: str, value: Any) -> None:
    sampling = change(Sampling(), name, text)
    assert getattr(sampling, name) == value
    assert change(Sampling(), name, find(sampling, name).write(value)) == sampling
    assert (
        getattr(change(sampling, name, "none"), name) == (() if name == "stop" else None)
        if name
        in (
            "seed",
            "max_tokens",
            "stop",
        )
        else True
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1, "temperature is -1: give 0 (greedy) or more"),
        ("temperature", True, "temperature is True: give 0 (greedy) or more"),
        ("top_p", float("nan"), "top_p is nan: give a number above 0, up to 1"),
        ("top_p", 0, "top_p is 0: give a number above 0, up to 1"),
        ("top_k", -1, "top_k is -1: give a whole number, 0 (off) or more"),
        ("min_p", -0.1, "min_p is -0.1: give a number from 0 (off) to 1"),
        ("repetition_penalty", 0, "repetition_penalty is 0: give a number above 0"),
        ("seed", -4, "seed is -4: give a whole number from 0 to 2**63 - 1"),
        ("max_tokens", 0, "max_tokens is 0: give 1 or more"),
        ("max_tokens", "many", "max_tokens is 'many': give 1 or more"),
        ("seed", 2**63, "seed is 9223372036854775808: give a whole number from 0 to 2**63 - 1"),
        ("stop", ("",), "stop is ('',): give a text that is not empty"),
        ("stop", "END", "stop is 'END': give a text that is not empty"),
    ],
)
def test_settings_made_in_python_are_checked_too(field: str, value: Any, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Sampling(**{field: value})
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    "text", ["@file", "%s %(prog)s", "{context}", "[bold]x[/bold]", "a=b", "--not an option", "naïve 🦙", "-5"]
)
def test_what_is_typed_passes_through_literally(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = cli.read(["chat", "--prompt", text, "--doc", text, "--stop", text])
    assert found is not None
    options, _, sampling, _ = found[1]
    assert (options.prompt, options.doc, sampling.stop) == (text, (text,), (text,))
    assert cli.main(["chat", f"--context={text}"]) == 2
    assert capsys.readouterr().err.startswith(f"duolocal: --context is {text!r}: give a number of tokens")


def test_the_last_of_two_counts_and_an_equals_sign_takes_any_value() -> None:
    assert load_settings(["--kv", "16", "--kv=int4"]).kv == "int4"
    found = cli.read(["chat", "--prompt=-x"])
    assert found is not None and found[1][0].prompt == "-x"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contxt"], "unknown option --contxt: `duolocal --help` lists the options"),
        (["bench", "decde"], "unknown command 'bench decde': did you mean decode?"),
        (["heads", "--kv", "16"], "`duolocal heads` needs a command after it: give one of show, identify, list"),
        (["models", "--kv", "16"], "unknown option --kv: `duolocal models --help` lists the options"),
        (["eval", "check"], "the following arguments are required: --doc"),
        (["chat", "--reader", "quick"], "--reader is 'quick': give one of full, retrieve"),
        (
            ["summarize", "a", "--out", " "],
            "--out is empty: give the file for the summaries, or - for JSON lines on stdout",
        ),
        (
            ["bench", "decode", "--select", "few"],
            "--select is 'few': give a number of tokens such as 131072, 32K or 1M",
        ),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert (cli.main(words), *capsys.readouterr()) == (2, "", f"duolocal: {message}\n")


@pytest.mark.parametrize("words", [["--help"], ["-h"], [], ["bench", "-h"], ["models", "--help"], ["plan", "-h"]])
def test_help_is_printed_and_nothing_done(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("usage: duolocal") and shown.err == ""


def test_the_table_in_the_readme_is_what_is_declared() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/options_table.py"), "--check"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lists_keep_each_value_once_and_name_what_is_wrong() -> None:
    @dataclass(frozen=True)
    class Lists:
        words: tuple[str, ...] = option(listed(ANY, ("a", "b"), empty=True), "words", default=REQUIRED)
        sizes: tuple[int, ...] = option(listed(TOKENS, ascending=True), "sizes", default=(512, 2048))
        kind: str = option(choice("x", "y", "z"), "kind", default="x")

    def read(name: str, text: str) -> Any:
        return find(Lists(words=()), name).parse(text, flag(name))

    assert read("sizes", "2K, 512,2048") == (512, 2048)
    assert (read("words", "b,a,b"), read("words", "none")) == (("b", "a"), ())
    for name, text, message in (
        ("sizes", "1,,2", "--sizes is '1,,2': a value is missing; give one, or several with commas between"),
        ("words", "a,c", "--words has 'c': give a list of a, b"),
        ("kind", "w", "--kind is 'w': give one of x, y, z"),
        ("kind", "", "--kind is empty: give one of x, y, z"),
    ):
        with pytest.raises(SettingsError) as raised:
            read(name, text)
        assert str(raised.value) == message
