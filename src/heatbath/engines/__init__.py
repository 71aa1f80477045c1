"""Where completions come from. Tokens in, tokens out."""
