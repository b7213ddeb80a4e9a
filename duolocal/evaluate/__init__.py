"""Does a model still do what it does with a dense 16-bit cache? Tasks to be answered, and distributions compared.

    lineup = Lineup.load(source, [Setting(heads="0.5", kv="k8v4")], context=4096)

Owns a set of weights with several caches (`engines`), tasks with an answer (`passkey`, `tasks`), how they are asked and
counted (`grid`), perplexity and KL against dense (`compare`) and the check of one's own document (`check`). Printing is
the command line's business; so is the reading of files.
"""

from duolocal.evaluate.engines import Choice, Lineup, Setting, combinations
from duolocal.evaluate.grid import Outcome, Score, ask, score
from duolocal.evaluate.passkey import passkey_prompts
from duolocal.evaluate.prompts import Prompt

__all__ = [
    "Choice",
    "Lineup",
    "Outcome",
    "Prompt",
    "Score",
    "Setting",
    "ask",
    "combinations",
    "passkey_prompts",
    "score",
]
