"""The `esft` command: one thin command a file, argument -> library call -> printing."""
