"""The output head of a quantized model: a float linear layer whose logits do not depend on batch or threads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quota import ops


class HeadLinear(nn.Linear):
    """Replaces `lm_head`; its state is that of the layer it replaces. Library matrix products choose their order of
    summation by shape and thread count, so the same token would get other logits in another batch. Computed in float32,
    returned in the dtype of x."""

    @classmethod
    def replacing(cls, linear: nn.Linear) -> HeadLinear:
        new = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    @torch.no_grad()
    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] -> [..., N]."""
        y = ops.float_linear(input.reshape(-1, self.in_features).float(), self._packed())
        if self.bias is not None:
            y = y + self.bias.float()
        return y.view(*input.shape[:-1], self.out_features).to(input.dtype)

    def _packed(self) -> ops.FloatWeight:
        state = (self.weight.data_ptr(), self.weight.dtype, self.weight._version)
        found = self.__dict__.get("_quota_packed")
        if found is None or found[0] != state:
            found = self.__dict__["_quota_packed"] = (state, ops.FloatWeight(self.weight.detach()))
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_quota_packed"}
