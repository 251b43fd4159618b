"""Between text and token ids: tokenizers, chat templates, streaming detokenization, stop strings."""
