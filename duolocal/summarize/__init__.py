"""Summaries of documents by the hundred: resumable, nothing lost.

`Summarizer` is the job, `Output` the file that it can be resumed from, `Record` what is kept of each document.
"""

from duolocal.settings import SUMMARY_SAMPLING
from duolocal.summarize.estimate import Estimate, FileEstimate, estimate
from duolocal.summarize.events import Began, Ended, Looked, Opened, Planned, Progress
from duolocal.summarize.job import Event, Summarizer, summarize
from duolocal.summarize.output import Output
from duolocal.summarize.prompts import PRESETS, Prompt, make_prompt, prompt_of
from duolocal.summarize.records import Record, Timings

__all__ = [
    "PRESETS",
    "SUMMARY_SAMPLING",
    "Began",
    "Ended",
    "Estimate",
    "Event",
    "FileEstimate",
    "Looked",
    "Opened",
    "Output",
    "Planned",
    "Progress",
    "Prompt",
    "Record",
    "Summarizer",
    "Timings",
    "estimate",
    "make_prompt",
    "prompt_of",
    "summarize",
]
