"""Notices that an answer goes round in circles.

Small models do: at temperature 0 SmolLM2-135M has been seen to fill every answer to its end with one sentence. A
repetition penalty strong enough against it also forbids the digits and names that a summary has to repeat.
"""

import re

_LONGEST_CYCLE = 64  # tokens
_LEAST_REPEATED = 32  # tokens that repeat those before them, for a cycle of any length
_LEAST_SAID_AGAIN = 40  # characters of sentences in a row that have been said before
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？\n]+")
_END = re.compile(r"[.!?。！？\n]")


class Repeats:
    """Watches an answer as it grows.

    It goes round in circles where its last tokens are the same few three times over, or where two or more sentences in
    a row have all been said before.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._runs = [0] * (_LONGEST_CYCLE + 1)  # by period: last tokens that equal the one a period before
        self._lengths: list[int] = []  # of the text after each token
        self._text = ""
        self._next = 0  # where the first sentence that is not finished yet begins
        self._said: set[str] = set()
        self._again: list[int] = []  # where the last sentences begin, as far as all of them had been said before
        self._number: int | None = None  # where a number before a sentence begins

    def push(self, token_id: int, text: str) -> int | None:
        """Take a token and the text it added; return how many characters of the answer are worth keeping, or None."""
        self._ids.append(token_id)
        self._text += text
        self._lengths.append(len(self._text))
        kept = self._cycle()
        return self._sentences() if kept is None else kept

    def _cycle(self) -> int | None:
        found = None
        newest = len(self._ids) - 1
        for period in range(1, min(_LONGEST_CYCLE, newest) + 1):
            same = self._ids[newest] == self._ids[newest - period]
            self._runs[period] = self._runs[period] + 1 if same else 0
            if found is None and self._runs[period] >= max(_LEAST_REPEATED, 2 * period):
                found = self._lengths[newest - self._runs[period]]
        return found

    def finish(self) -> int | None:
        """Take the end of the answer; return as `push` does."""
        return self._sentences(ended=True)

    def _sentences(self, *, ended: bool = False) -> int | None:
        if not _END.search(self._text, self._next):
            return None  # at once: looking for a sentence takes the square of the length where there is none
        for match in _SENTENCE.finditer(self._text, self._next):
            if match.end() == len(self._text) and not ended:
                break  # its end may go on: "1." becomes "1.5"
            self._next = match.end()
            words = " ".join(match.group().casefold().split())
            if not any(map(str.isalpha, words)):
                self._number = match.start() if self._number is None else self._number
                continue  # the number of a line in a list says nothing
            start, self._number = match.start() if self._number is None else self._number, None
            if words not in self._said:
                self._said.add(words)
                self._again.clear()
                continue
            self._again.append(start)
            if len(self._again) > 1 and match.end() - self._again[0] >= _LEAST_SAID_AGAIN:
                return self._again[0]
        return None
