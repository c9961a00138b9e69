"""Classes of quantised tensors, for isinstance alone: no tensor here is one."""

import torch


class QuantizedTensor(torch.Tensor):
    pass


class Float8Tensor(QuantizedTensor):
    pass


class MXFP8Tensor(QuantizedTensor):
    pass


class Float8BlockwiseQTensor(QuantizedTensor):
    pass


class NVFP4Tensor(QuantizedTensor):
    pass
