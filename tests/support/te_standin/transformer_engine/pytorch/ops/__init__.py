"""Names that Megatron's annotations use; the fused MLP made of them is off."""

import torch


class FusibleOperation(torch.nn.Module):
    pass


class Sequential(torch.nn.Sequential):
    pass
