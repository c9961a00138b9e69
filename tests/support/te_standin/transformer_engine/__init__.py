"""A stand-in for TransformerEngine in plain torch, for tests alone: its modules, signatures, parameter names
and checks, none of its kernels.

With the folder above this one on sys.path before Megatron-Core is imported, Megatron's TransformerEngine
layers are built and run on CPU tensors (support/standin.py, support/pretend_cuda.py). Signatures are those of
2.9 (tests/invariance/test_standin_signatures.py compares them with later releases). What is not modelled
raises NotImplementedError: FP8 parameters, user buffers, fused or delayed weight gradients, attention that is
not packed and causal. FP8 arithmetic is not modelled either: layers in an FP8 context compute as ever, check
the sizes that FP8 needs, keep a cached copy of their weights, and are noted (pytorch/quantization.py).
"""

from transformer_engine import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.9.0"
