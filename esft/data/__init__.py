"""Task sets: rows from files and the hub, tokens and masks, packing and sampling."""
