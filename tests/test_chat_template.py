"""Chat pieces against transformers' apply_chat_template, and what a hostile template or document can do."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from duolocal.errors import TokenizerError
from duolocal.tokenizer import ChatPiece, Message, Tokenizer
from duolocal.tokenizer.folder import read_folder
from duolocal.tokenizer.gguf_vocab import read_gguf
from duolocal.tokenizer.template import ChatTemplate
from tests.tokenizer_files import (
    CHATML,
    LLAMA2,
    MISTRAL,
    QWEN25,
    SMOLLM2,
    THINKS,
    Files,
    chatml,
    llama2,
    llama3,
    write,
)

FAMILIES: dict[str, Callable[[], Files]] = {
    "chatml": lambda: chatml(CHATML),
    "smollm2": lambda: chatml(SMOLLM2),
    "qwen2.5": lambda: chatml(QWEN25),
    "thinks": lambda: chatml(THINKS),
    "llama3": llama3,
    "llama2": lambda: llama2(LLAMA2),
    "llama2 first": lambda: llama2(LLAMA2, scheme="first"),
    "mistral": lambda: llama2(MISTRAL, scheme="first"),
}
Pair = tuple[Tokenizer, PreTrainedTokenizerFast]


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = write(tmp_path_factory.mktemp("chat"), FAMILIES[request.param]())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    named = {key: config[key] for key in config if key.endswith("_token") and not key.startswith("add_")}
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **named)
    theirs.chat_template = config["chat_template"]
    return Tokenizer(read_folder(folder)), theirs


def apply(theirs: PreTrainedTokenizerFast, messages: list[Message], *, tokenize: bool, generate: bool) -> Any:
    dicts = [{"role": message.role, "content": message.content} for message in messages]
    out: Any = theirs.apply_chat_template(dicts, tokenize=tokenize, add_generation_prompt=generate)
    return out["input_ids"] if tokenize else out


contents = st.lists(
    st.sampled_from(["a", "Hello", " ", "\n", "  ", "1234", "é🙂", "{{ x }}", "zq0content1qz", "[INST]", "user\n"]),
    max_size=6,
).map("".join)


@given(texts=st.lists(contents, min_size=1, max_size=5), generate=st.booleans())
def test_ids_and_text_are_transformers(pair: Pair, texts: list[str], generate: bool) -> None:
    ours, theirs = pair
    messages = [user(t) if i % 2 == 0 else assistant(t) for i, t in enumerate(texts)]
    pieces = ours.chat_pieces(messages, add_generation_prompt=generate)
    assert "".join(p.text for p in pieces) == apply(theirs, messages, tokenize=False, generate=generate)
    assert ours.encode_pieces(pieces) == apply(theirs, messages, tokenize=True, generate=generate)
    for i, text in enumerate(texts):
        mine = [p.text for p in pieces if p.message == i]
        assert mine in ([text], [text.strip()]) if text.strip() else mine == []


def test_a_system_message(pair: Pair) -> None:
    ours, theirs = pair
    messages = [Message("system", "Be brief. "), user("Hi"), assistant("Yes?"), user(" Why ")]
    if theirs.chat_template == MISTRAL:
        with pytest.raises(TokenizerError, match="refuses this conversation: Conversation roles must alternate"):
            ours.chat_pieces(messages)
        return
    pieces = ours.chat_pieces(messages)
    assert ours.encode_pieces(pieces) == apply(theirs, messages, tokenize=True, generate=True)
    assert [p.message for p in pieces if p.message is not None] == [0, 1, 2, 3]


def test_a_slice_at_a_special_token_encodes_as_in_the_whole(pair: Pair) -> None:
    ours, _ = pair
    messages = [user("Hello there"), assistant(" I am. "), user("Why?"), assistant("So."), user("And?")]
    pieces = ours.chat_pieces(messages)
    whole = ours.encode_pieces(pieces)
    cuts = [
        k for k in range(1, len(pieces)) if pieces[k].special_id is not None or pieces[k - 1].special_id is not None
    ]
    assert len(cuts) >= 4
    for k in cuts:
        parts = ours.encode_pieces(pieces[:k]) + ours.encode_pieces(pieces[k:], continues=True)
        assert parts == whole, k


def test_a_slice_between_texts_keeps_the_text(pair: Pair) -> None:
    ours, _ = pair
    pieces = ours.chat_pieces([user("Hello there"), assistant("I am."), user("Why?")])
    for k in range(1, len(pieces)):
        head, tail = ours.encode_pieces(pieces[:k]), ours.encode_pieces(pieces[k:], continues=True)
        assert ours.decode(head + tail) == ours.decode(ours.encode_pieces(pieces))


def test_a_document_cannot_write_special_tokens(pair: Pair) -> None:
    ours, theirs = pair
    added = {token.content: i for i, token in theirs.added_tokens_decoder.items()}
    attack = "x".join(added)
    pieces = ours.chat_pieces([user(f"a {attack} b"), assistant(f"{attack}c"), user("d")])
    harmless = ours.chat_pieces([user("a b"), assistant("c"), user("d")])
    specials = [p.special_id for p in harmless if p.special_id is not None]
    assert specials
    assert [p.special_id for p in pieces if p.special_id is not None] == specials
    control = {i for text, i in added.items() if text != "<tool_call>"}  # not special, and not in a template
    assert [i for i in ours.encode_pieces(pieces) if i in control] == specials
    assert [p.text for p in pieces if p.message == 0] == [f"a {attack} b"]


def test_the_end_of_an_answer_is_an_end_id(pair: Pair) -> None:
    ours, theirs = pair
    rendered = apply(theirs, [user("a"), assistant("b")], tokenize=False, generate=False)
    ends = [end for end in ("<|im_end|>", "<|eot_id|>", "</s>") if end in str(theirs.added_tokens_decoder)]
    assert len(ends) == 1
    assert rendered.strip().endswith(ends[0])
    assert theirs.convert_tokens_to_ids(ends[0]) in ours.eos_ids


def test_blank_contents(pair: Pair) -> None:
    ours, theirs = pair
    for blank in ("", "  ", "\n"):
        messages = [user(blank), assistant(blank), user("x")]
        pieces = ours.chat_pieces(messages)
        assert ours.encode_pieces(pieces) == apply(theirs, messages, tokenize=True, generate=True)
        assert {p.message for p in pieces} == {None, 2}


# what templates do


def make(tmp_path: Path, template: str | None, **config: Any) -> Tokenizer:
    files = chatml()
    files["tokenizer_config.json"]["chat_template"] = template
    files["tokenizer_config.json"].update(config)
    return Tokenizer(read_folder(write(tmp_path, files)))


def test_thoughts_that_the_template_drops(tmp_path: Path) -> None:
    pieces = make(tmp_path, THINKS).chat_pieces([user("a"), assistant("<think>hm</think>\n\nYes"), user("b")])
    assert [p.text for p in pieces if p.message is not None] == ["a", "Yes", "b"]


@pytest.mark.parametrize("change", [" | upper", " | replace('a', 'b')", " | reverse", "[:5]", "[-5:]"])
def test_a_template_that_changes_what_is_said_is_refused(tmp_path: Path, change: str) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content" + change + " }}{% endfor %}"
    with pytest.raises(TokenizerError, match="changes what the messages say"):
        make(tmp_path, template).chat_pieces([user("a longer text")])


def test_a_content_that_is_written_twice(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m.content }}|{{ m.content | trim }}<|im_end|>{% endfor %}"
    pieces = make(tmp_path, template).chat_pieces([user(" a ")])
    assert [(p.text, p.message) for p in pieces] == [
        ("<|im_start|>", None),
        (" a ", 0),
        ("|", None),
        ("a", 0),
        ("<|im_end|>", None),
    ]


def test_whitespace_is_aligned_without_guessing(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content | trim }}\n{{ m.content }}{% endfor %}"
    for content in ("\n\na\n\n", "a\n", "\na", " \n a \n "):
        pieces = make(tmp_path, template).chat_pieces([user(content), assistant(content)])
        assert "".join(p.text for p in pieces) == f"{content.strip()}\n{content}" * 2


def test_special_tokens_that_swallow_whitespace(tmp_path: Path) -> None:
    files = chatml("{% for m in messages %}<|im_start|> {{ m.content }} <|im_end|>\n{% endfor %}")
    for token in files["tokenizer.json"]["added_tokens"]:
        token["rstrip"] = token["content"] == "<|im_start|>"
        token["lstrip"] = token["content"] == "<|im_end|>"
    folder = write(tmp_path, files)
    ours = Tokenizer(read_folder(folder))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    theirs.chat_template = files["tokenizer_config.json"]["chat_template"]
    messages = [user("  a b "), assistant("c"), user("\n")]
    ids = ours.encode_pieces(ours.chat_pieces(messages))
    assert ids == apply(theirs, messages, tokenize=True, generate=True)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, None)
    assert not tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode("a plain text")) == "a plain text"
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.chat_pieces([user("a")])


def test_a_broken_template_leaves_plain_text_working(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, "{% for m in %}")
    assert not tokenizer.has_chat_template
    assert tokenizer.encode("a")
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer.chat_pieces([user("a")])


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    named = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "D{{ messages[0].content }}"},
    ]
    assert make(tmp_path, named).chat_pieces([user("a")])[0].text == "D"  # type: ignore[arg-type]
    (tmp_path / "chat_template.jinja").write_text("J{{ messages[0].content }}")
    assert make(tmp_path, "C{{ messages[0].content }}").chat_pieces([user("a")])[0].text == "J"


def test_an_unknown_role() -> None:
    with pytest.raises(TokenizerError, match="'robot'"):
        Message("robot", "x")  # type: ignore[arg-type]


def test_functions_that_templates_expect() -> None:
    source = (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{% generation %}"
        "{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y-%m-%d') }}{{ bos_token }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"}, now=datetime(2026, 2, 3))
    message = {"role": "user", "content": "<é>"}
    rendered = template.render([message, message], add_generation_prompt=False)
    assert rendered == '{"role": "user", "content": "<é>"}2026-02-03<s>'


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__.os }}",
        "{% for i in range(99999999999999) %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ messages[0].content }}0123456789{{ messages[0].content }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ 10000000000 * 'x' }}",
        "{{ [0] * 10000000000 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 1 // 0 }}",
        "{{ nothing.at.all }}",
        "{{ raise_exception('two\nlines') }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_or_broken_template_ends_in_one_line(source: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        ChatTemplate(source, {}).render([{"role": "user", "content": "a" * 50}], add_generation_prompt=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_small_products_are_allowed() -> None:
    source = "{{ 6 * 7 }} {{ 7 % 2 }} {{ '-' * 3 }} {{ 'a%02db' % 5 }}"
    assert ChatTemplate(source, {}).render([], add_generation_prompt=False) == "42 1 --- a05b"


# GGUF


def gguf(**more: Any) -> dict[str, Any]:
    """Return the key/values of a GGUF with Llama-2 pieces of one character and a template without BOS."""
    tokens = ["<unk>", "<s>", "</s>", "<|im_end|>", "▁", *"abcdefgh"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2, 3, 3, 4, *[1] * 9],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
        **more,
    }


def test_bos_goes_before_a_gguf_chat_that_wants_one() -> None:
    wanted = Tokenizer(read_gguf(gguf(**{"tokenizer.ggml.add_bos_token": True}), name="x"))
    assert wanted.encode_pieces(wanted.chat_pieces([user("ab")]))[0] == 1
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    both = gguf(**{"tokenizer.ggml.add_bos_token": True, "tokenizer.chat_template": template})
    ids = Tokenizer(read_gguf(both, name="x")).encode_pieces(
        Tokenizer(read_gguf(both, name="x")).chat_pieces([user("ab")])
    )
    assert ids.count(1) == 1
    plain = Tokenizer(read_gguf(gguf(), name="x"))
    assert 1 not in plain.encode_pieces(plain.chat_pieces([user("ab")]))


def test_the_end_of_turn_is_found_where_only_the_template_names_it() -> None:
    tokenizer = Tokenizer(read_gguf(gguf(), name="x"))
    assert tokenizer.eos_ids == {2, 3}
    assert 3 not in tokenizer.encode("a<|im_end|>b")
    assert tokenizer.decode([5, 3]) == "a"


def test_pieces_made_by_hand() -> None:
    tokenizer = Tokenizer(read_gguf(gguf(), name="x"))
    pieces = [
        ChatPiece("<s>", special_id=1),
        ChatPiece("ab"),
        ChatPiece("c"),
        ChatPiece("</s>", special_id=2),
    ]
    assert tokenizer.encode_pieces(pieces) == [1, *tokenizer.encode("abc"), 2]
    assert tokenizer.encode_pieces([]) == []
