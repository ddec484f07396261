"""A compiler for pretrained transformers: capture, rewrite, check, save, serve."""
