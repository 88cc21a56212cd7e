"""What `esft.plan` is made of: a rehearsal of a run without its weights, and what follows from it.

The model is built from its configuration on tensors that have shapes and no content
(`pretence.py`), prepared by the run's own method, and taken through the training step that the
run would do; a tracker sees each tensor come and go. So no formula of a family's activations is
kept here, and a family, or a method, needs nothing to be planned for.
"""
