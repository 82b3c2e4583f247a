"""PyTorch and NumPy fall-backs of the Triton kernels of vLLM's V2 model runner.

They let the V2 runner work on a CPU whose Triton cannot compile for it, without
``TRITON_INTERPRET=1``. ``v2_runner.enable_v2_runner`` puts them in force, ``registry``
lists them, ``refusal`` answers for kernels that have none.
"""
