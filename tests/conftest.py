"""What must be so before any test imports anything."""

import os

# Triton's interpreter runs the kernels without a GPU; Triton reads this when it is first imported.
os.environ["TRITON_INTERPRET"] = "1"
