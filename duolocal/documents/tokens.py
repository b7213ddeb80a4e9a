"""How many tokens documents are for a model, before anything is prefilled: needs its tokenizer only."""

from dataclasses import dataclass

from duolocal.documents.model import Document
from duolocal.engine.session import document_content
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


def count_document(document: Document, tokenizer: Tokenizer) -> Counted:
    """Count the tokens of a document with the lines that name it.

    The template around it, and what stands between two documents, are a few tokens more.
    """
    return Counted(
        name=document.name,
        source=str(document.path),
        kind=document.kind,
        encoding=document.encoding,
        pages=document.pages,
        num_bytes=document.num_bytes,
        num_characters=len(document.text),
        num_tokens=len(tokenizer.encode(document_content(document.name, document.text), continues=True)),
        notes=document.notes,
        digest=document.digest,
    )
