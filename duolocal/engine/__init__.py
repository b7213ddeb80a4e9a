"""Floor 6: the engine (token ids in, token ids out) and the chat session over it."""
