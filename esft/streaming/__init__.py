"""Run a sample through a checkpoint one decoder layer at a time.

`esft.streaming.streamed` is the way in; the rest are its parts.
"""
