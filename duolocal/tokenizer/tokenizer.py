"""Tokenizer: the one interface to text and ids, whatever the model brought.

Owns special tokens, the space before text, the end-of-turn ids and chat pieces. The encoding of ordinary text is
the backend's (`library`, `sentencepieces`); reading files is `load`'s.
"""

from collections.abc import Iterable, Sequence

from duolocal.errors import TokenizerError
from duolocal.tokenizer.chat import (
    ChatPiece,
    Message,
    render_pieces,
    settle,
    special_pattern,
    split_special,
)
from duolocal.tokenizer.parts import TokenizerParts
from duolocal.tokenizer.stream import TextStream
from duolocal.tokenizer.template import ChatTemplate


class Tokenizer:
    """Turns text and conversations into token ids, and ids into text.

    Invariant: an id of a special token appears only where a template, `bos` or `special` asked for it, never
    because a text contains its name.
    """

    def __init__(self, parts: TokenizerParts, *, vocab_size: int | None = None) -> None:
        self._parts = parts
        self._backend = parts.backend
        self._bytes = parts.token_bytes
        self._pattern = special_pattern(parts.specials)
        self.vocab_size = max(vocab_size or 0, len(parts.token_bytes))  # the model's may be padded
        self.bos_id = parts.bos_id
        self.adds_bos = parts.adds_bos  # whether plain text starts with BOS
        self.fingerprint = parts.fingerprint  # hex; the same for the same map between text and ids
        self.origin = parts.origin  # for people
        self._template: ChatTemplate | None = None
        self._template_error: TokenizerError | None = None
        if parts.template is not None:
            try:
                self._template = ChatTemplate(parts.template, parts.template_tokens)
            except TokenizerError as error:
                self._template_error = error  # plain completion works all the same
        self.eos_ids = parts.eos_ids | self._end_of_turn()
        self._hidden = parts.hidden_ids | self.eos_ids

    @property
    def chat_template(self) -> str | None:
        """The template as the model's files have it, None where they have none."""
        return self._parts.template

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_pieces` can be used."""
        return self._template is not None

    def encode(self, text: str, *, bos: bool = False, special: bool = False, continues: bool = False) -> list[int]:
        """Return the token ids of `text`.

        `bos` puts BOS first if plain text of this model starts with one (`adds_bos`). `special` turns the names
        of special tokens inside the text into their ids; without it they are ordinary text. `continues` says
        that the text goes on from earlier text: no BOS, no space before it.

        Ten megabytes are encoded in parts; the ids are those of the whole text, since a cut is made only where it
        cannot change them (`cuts`). A text without a space or line break is encoded in one. A character that the
        vocabulary cannot write, and a lone surrogate, become U+FFFD.
        """
        text = _well_formed(text)
        pieces = [ChatPiece(text)] if text else []
        if special:
            specials = self._parts.specials
            pieces = settle(list(split_special(text, specials, self._pattern)), specials)
        ids = [] if continues else self._bos(bos)
        return ids + self.encode_pieces(pieces, continues=continues)

    def _bos(self, wanted: bool) -> list[int]:
        return [self.bos_id] if wanted and self.adds_bos and self.bos_id is not None else []

    def decode(self, token_ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """Return the text of `token_ids`; bytes that are no UTF-8 become U+FFFD.

        `continues` keeps a leading space, as text that goes on from earlier text needs it. Raises TokenizerError
        for an id outside the vocabulary.
        """
        data = b"".join([self._visible(i) if skip_special else self._token(i) for i in token_ids])
        if self._parts.strips_space and not continues:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def stream(self, *, skip_special: bool = True, continues: bool = False) -> TextStream:
        """Return a TextStream, whose texts joined are `decode` of the same ids with the same arguments."""
        return TextStream(
            self._visible if skip_special else self._token,
            strip_space=self._parts.strips_space and not continues,
        )

    def _token(self, token_id: int) -> bytes:
        if 0 <= token_id < len(self._bytes):
            return self._bytes[token_id]
        if 0 <= token_id < self.vocab_size:
            return b""  # padding of the model's vocabulary
        raise TokenizerError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")

    def _visible(self, token_id: int) -> bytes:
        return b"" if token_id in self._hidden else self._token(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that `token_id` stands for, special tokens by their names."""
        return self._token(token_id)

    def chat_pieces(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[ChatPiece]:
        """Return the conversation, rendered by the model's template, as pieces.

        The pieces of message i's content have `message == i`; a content may be stripped by the template, and
        a blank one is template text. Encode them, or a slice, with `encode_pieces`. Raises TokenizerError where
        there is no template or it refuses the conversation (many accept no system message, or want roles to
        alternate).
        """
        if self._template is None:
            raise self._template_error or TokenizerError(
                "this model brings no chat template, so it cannot chat; use plain completion or a chat model"
            )
        well_formed = [Message(message.role, _well_formed(message.content)) for message in messages]
        pieces = render_pieces(
            self._template, well_formed, self._parts.specials, add_generation_prompt=add_generation_prompt
        )
        if self._parts.template_needs_bos and (not pieces or pieces[0].special_id != self.bos_id):
            assert self.bos_id is not None
            bos = ChatPiece(self._token(self.bos_id).decode(), special_id=self.bos_id)
            pieces = settle([bos, *pieces], self._parts.specials)
        return pieces

    def encode_pieces(self, pieces: Sequence[ChatPiece], *, continues: bool = False) -> list[int]:
        """Return the ids of chat pieces; neighbouring texts are joined before they are encoded.

        For all pieces of a conversation without special strings in its contents these are the ids of
        transformers' `apply_chat_template`. `continues` says that the pieces are a slice that goes on from
        earlier pieces. Where a slice begins or ends at a special token (on either side of it), the ids of
        the parts joined are the ids of the whole: `encode_pieces(p[:k]) + encode_pieces(p[k:],
        continues=True) == encode_pieces(p)`. A cut between two texts keeps the text but may change the
        ids beside it.
        """
        ids: list[int] = []
        run: list[str] = []
        prefixed = False
        for index, piece in enumerate(pieces):
            if piece.special_id is not None:
                ids += self._encode_run(run, prefix=prefixed)
                run = []
                ids.append(piece.special_id)
                continue
            if not run:
                prefixed = self._wants_prefix(piece, first=index == 0, continues=continues)
            run.append(piece.text)
        return ids + self._encode_run(run, prefix=prefixed)

    def _wants_prefix(self, piece: ChatPiece, *, first: bool, continues: bool) -> bool:
        if first and not continues:
            return self._backend.prefix != "none"
        return self._backend.prefix == "sections" and (piece.after_special or not first)

    def _encode_run(self, run: list[str], *, prefix: bool) -> list[int]:
        text = _well_formed("".join(run))
        return self._backend.encode(text, prefix=prefix) if text else []

    def _end_of_turn(self) -> frozenset[int]:
        """Return the special token that the template writes after an answer, found by rendering one."""
        if self._template is None:
            return frozenset()
        probe = [Message("user", "question"), Message("assistant", "answer")]
        specials = self._parts.specials
        try:
            pieces = render_pieces(self._template, probe, specials, add_generation_prompt=False)
        except TokenizerError:
            return frozenset()  # said when someone chats
        answered = max((i for i, piece in enumerate(pieces) if piece.message == 1), default=len(pieces))
        after = [piece.special_id for piece in pieces[answered + 1 :] if piece.special_id is not None]
        return frozenset(i for i in after[:1] if i != self.bos_id)


def _well_formed(text: str) -> str:
    """Return `text` with lone surrogates, which no UTF-8 can hold, replaced by U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
