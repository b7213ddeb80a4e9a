"""The options of `duolocal tune`."""

from duolocal.commands.models import MODEL
from duolocal.commands.parsing import Command

_MORE = """\
What a model without a known head pattern and KV format could do with less memory is measured once and remembered: its
heads are ranked, then KV formats are compared with 16 bits. Each is kept as soon as it is done, so that a run after an
interrupted one does what is missing. --heads auto and --kv auto use both from then on.
"""
COMMANDS = (
    Command(
        "tune",
        "measure a model once: which heads and which KV format save memory",
        "tune_view:tune",
        (MODEL,),
        epilog=_MORE,
    ),
)
