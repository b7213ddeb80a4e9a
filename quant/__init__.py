"""Floor 2: number formats of weights and of KV blocks."""
