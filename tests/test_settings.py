import pytest
from hypothesis import given
from hypothesis import strategies as st

from duolocal.errors import SettingsError
from duolocal.kernels.cpu import structs
from duolocal.settings import LoadSettings
from duolocal.sizes import MAX_THREADS, format_tokens, parse_bytes, parse_threads, parse_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("131072", 131072),
        ("131_072", 131072),
        ("131,072", 131072),
        ("32K", 32768),
        ("32k", 32768),
        ("1M", 1048576),
        ("1.5K", 1536),
        (" 8 K ", 8192),
    ],
)
def test_tokens_are_read_as_people_type_them(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("12Q", "--context is '12Q': give a number of tokens such as 131072, 32K or 1M"),
        ("", "--context is '': give a number of tokens such as 131072, 32K or 1M"),
        ("-5", "--context is '-5': give a number of tokens such as 131072, 32K or 1M"),
        ("1GiB", "--context is '1GiB': give a number of tokens such as 131072, 32K or 1M"),
        (
            "1.3",
            "--context is '1.3', which is no whole number: give a number of tokens such as 131072, 32K or 1M",
        ),
        ("0", "--context is '0': give between 1 and 2,147,483,647 tokens"),
        ("9999999M", "--context is '9999999M': give between 1 and 2,147,483,647 tokens"),
    ],
)
def test_tokens_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        parse_tokens(text)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24g", 24 * 2**30),
        ("24GB", 24 * 10**9),
        ("512", 512),
        ("512 B", 512),
        ("1.5MiB", 3 * 2**19),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text, "--memory") == size


def test_bytes_that_cannot_be_read() -> None:
    with pytest.raises(SettingsError, match="--memory is '3 cows': give a size such as 24GiB"):
        parse_bytes("3 cows", "--memory")


@given(st.integers(1, 2**31 - 1))
def test_format_and_parse_are_inverse(tokens: int) -> None:
    assert parse_tokens(format_tokens(tokens)) == tokens


def test_options_name_only_what_was_chosen() -> None:
    assert LoadSettings(model="a").options() == ["--model", "a"]
    settings = LoadSettings(model="a", context=65536, kv="int8", sink_size=0, rope="yarn:4")
    assert settings.options() == (
        ["--model", "a", "--context", "64K", "--kv", "int8", "--sink-size", "0", "--rope", "yarn:4"]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp3"}, "--dtype is 'fp3': give one of auto, float32, bfloat16, float16, float64"),
        ({"recent_size": 0}, "--recent-size is 0: give 1 or more"),
        ({"kv": " "}, "--kv is empty: leave it out or give auto"),
        ({"model": ""}, "--model is empty: give a name from `duolocal models`, or a path"),
        ({"kv": 16}, "--kv is 16: leave it out or give auto"),
        ({"threads": "2"}, "--threads is '2': give 1 or more"),
        ({"kv_device_memory": "4GiB"}, "--kv-device-memory is '4GiB': give 0 or more"),
        ({"select": 128}, "--select is 128: give off, auto, or a number of tokens as text"),
    ],
)
def test_settings_that_cannot_be_used(change: dict, message: str) -> None:
    with pytest.raises(SettingsError) as raised:
        LoadSettings(**{"model": "a", **change})
    assert str(raised.value) == message


def test_threads_are_a_number_that_a_pool_can_have() -> None:
    assert (parse_threads("1"), parse_threads(" 16 "), MAX_THREADS) == (1, 16, structs.MAX_THREADS)
    for text in ("0", "-1", "1.5", "two", "", str(MAX_THREADS + 1)):
        with pytest.raises(SettingsError, match=r"--threads is .*: give a number from 1 to 256"):
            parse_threads(text)
