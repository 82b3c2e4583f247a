"""Medusa tree speculation (arXiv 2401.10774) as a vLLM plugin.

Importing this package imports neither torch nor vLLM: vLLM calls its entry points
while it is itself half imported.
"""

__version__ = "0.1.0"
