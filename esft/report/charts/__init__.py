"""The pictures of a report, one family a file: each SVG and the numbers in it as CSV."""
