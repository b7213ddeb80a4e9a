"""Reading past the trained window: texts of any length with a model whose window is short (docs/reader.md).

    for event in Retriever(engine, tokenizer).read([text], ["Who built the mill?"]): ...

Owns the cutting of texts (`sentences`), the attention of questions to sentences (`attention`), what is carried along
(`passages`), the reading (`retrieve`) and answering from what was found (`session`). Files and terminals are the
callers' business.
"""

from duolocal.reader.passages import Passage
from duolocal.reader.retrieve import CHUNK_TOKENS, PASSAGE_TOKENS, Found, Retriever

__all__ = ["CHUNK_TOKENS", "PASSAGE_TOKENS", "Found", "Passage", "Retriever"]
