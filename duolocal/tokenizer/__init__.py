"""Text to token ids and back, and a conversation to the ids its model was trained on.

`load_tokenizer` reads whatever the model brings (tokenizer.json, tokenizer.model or the vocabulary inside a
GGUF). This package knows nothing of tensors, engines or terminals.
"""

from duolocal.tokenizer.chat import ChatPiece, Message
from duolocal.tokenizer.load import load_tokenizer
from duolocal.tokenizer.stream import TextStream
from duolocal.tokenizer.tokenizer import Tokenizer

__all__ = ["ChatPiece", "Message", "TextStream", "Tokenizer", "load_tokenizer"]
