"""Tokenizers as data: vocabularies by token string, rows of embeddings that follow them, files written to match."""
