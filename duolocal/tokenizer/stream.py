"""TextStream: token ids in, text out, never half a character.

Owns the bytes of an unfinished character and nothing else; which bytes an id stands for is the tokenizer's.
"""

import codecs
from collections.abc import Callable


class TextStream:
    """Turns ids into text as they come.

    Invariant: the texts of all pushes and the flush, joined, are `Tokenizer.decode` of the ids. Each push costs
    the length of its own token.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, strip_space: bool) -> None:
        self._bytes_of = bytes_of
        self._strip_space = strip_space  # until the first byte has passed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes; "" while a character is unfinished."""
        data = self._bytes_of(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """Return U+FFFD for an unfinished character, or ""; what is pushed later goes on from here."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
