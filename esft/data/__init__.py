"""Task sets: rows from JSONL, tokens and masks, packing and sampling."""
