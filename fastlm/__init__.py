"""fastlm: train causal language models fast on the hardware you have.

Importing it loads neither Triton nor the compiled extension and touches no device.
"""

__version__ = "0.1.0"
