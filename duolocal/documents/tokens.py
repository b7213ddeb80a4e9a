"""How many tokens documents are for a model, before anything is prefilled: needs its tokenizer only."""

from dataclasses import dataclass

from duolocal.documents.model import Document
from duolocal.engine.session import document_ids
from duolocal.tokenizer import Tokenizer


@dataclass(frozen=True)
class Counted:
    """A document without its text, and its tokens as the context would hold it."""

    name: str
    source: str  # the path of the file
    kind: str
    encoding: str
    pages: int | None
    num_bytes: int
    num_characters: int
    num_tokens: int
    notes: tuple[str, ...]
    digest: str


def count_document(document: Document, tokenizer: Tokenizer, *, first: bool) -> Counted:
    """Count the tokens that a document takes of a new chat; first: with what the template writes before it."""
    return Counted(
        name=document.name,
        source=str(document.path),
        kind=document.kind,
        encoding=document.encoding,
        pages=document.pages,
        num_bytes=document.num_bytes,
        num_characters=len(document.text),
        num_tokens=len(document_ids(tokenizer, document.name, document.text, first=first)),
        notes=document.notes,
        digest=document.digest,
    )
