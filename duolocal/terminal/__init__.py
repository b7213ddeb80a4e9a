"""The terminal: the chat, its commands and what they show. The only package besides the CLI that prints."""
