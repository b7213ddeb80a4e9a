"""Documents: files, folders and archives as text, with the source of every passage.

Reads plain text, Markdown, code, HTML, PDF, DOCX, PPTX, XLSX, EPUB, CSV and JSON (docs/documents.md). Knows nothing of
models; of tokens only `tokens` does.
"""

from duolocal.documents.finding import Found, Gathered, Skipped, gather
from duolocal.documents.load import MAX_BYTES, decode_document, load_document
from duolocal.documents.loading import Loaded, load_all
from duolocal.documents.model import Document, Part

__all__ = [
    "MAX_BYTES",
    "Document",
    "Found",
    "Gathered",
    "Loaded",
    "Part",
    "Skipped",
    "decode_document",
    "gather",
    "load_all",
    "load_document",
]
