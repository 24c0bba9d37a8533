"""FlatQuant's learnable parts: projection groups and head transforms, on the fake quantizers of `fake.py`.

Source: FlatQuant (learnable affine transforms in Kronecker form). Differences kept on purpose: one activation clip per
group (q, k and v share one transformed, quantized input), orthogonal deterministic initial matrices with plain
inverses, clips found by a search before they are learned. Row-vector convention: x -> x P, W -> W P^-T leaves x W^T
unchanged; P = left (x) right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from quota.calib.fake import clip_logit, fake_asymmetric, fake_symmetric, search_clip, search_weight_clip
from quota.calib.precision import exactly
from quota.core.formats import DEFAULT, Format, Scheme
from quota.quant.affine import quantize_weight
from quota.quant.fixed import fixed_factor, fixed_kronecker, rounded_factor
from quota.quant.pack import unpack_int4
from quota.quant.transform import apply_kronecker, hadamard

# How a group or a head transform computes: "learn" quantizes with the live parameters, "float" applies the transforms
# without quantizing (equivalence), "rtn" quantizes without transforms or clips (the baseline), "frozen" runs the
# exported integers.
MODES = ("learn", "float", "rtn", "frozen")


class HeadTransforms(nn.Module):
    """Per-layer head-dimension transforms: P_v merges into v rows and o columns, P_h acts on q and k after RoPE
    (decoders only), with KV clips.

    head_dim: D. kv: the format of the cache behind it; None for vision layers and float caches (then only P_v exists).
    """

    def __init__(self, head_dim: int, kv: Format | None) -> None:
        super().__init__()
        self.mode, self.kv = "learn", kv
        self.observed: list[tuple[Tensor, Tensor]] | None = None
        self.value = nn.Parameter(hadamard(head_dim).float().clone())
        if kv is not None:
            self.key = nn.Parameter(hadamard(head_dim).float().clone())
            self.k_clip = nn.Parameter(clip_logit(0.95))
            self.v_clip = nn.Parameter(clip_logit(0.95))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, apart: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, heads, T, D] after RoPE -> what the attention runs on (value already carries P_v through v_proj).

        apart: the part of the keys that is never quantized, of their shape (the rotated key bias, see
        `quota.nn.key_bias`).
        """
        if self.kv is None:
            return query, key, value
        with exactly(query):
            return self._attend(query.float(), key.float(), value.float(), apart)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, apart: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        assert self.kv is not None
        if apart is not None:
            query, key, value = self._attend(query, key - apart, value, None)
            return query, key + (apart if self.mode == "rtn" else apart @ self.key), value
        if self.mode == "rtn":
            return query, fake_asymmetric(key, 1.0, self.kv), fake_asymmetric(value, 1.0, self.kv)
        if self.observed is not None:
            self.observed.append((key.detach().flatten(0, 2), value.detach().flatten(0, 2)))
        if self.mode == "frozen":
            key, query = _deployed(key, None, self.key), _deployed(query, None, self._query_transform())
        else:
            key, query = key @ self.key, query @ torch.linalg.inv(self.key).T
        if self.mode == "float":
            return query, key, value
        k_clip, v_clip = self.k_clip.sigmoid(), self.v_clip.sigmoid()
        return query, fake_asymmetric(key, k_clip, self.kv), fake_asymmetric(value, v_clip, self.kv)

    @torch.no_grad()
    def initialise(self, key: Tensor, value: Tensor) -> None:
        """Set both clips by a search; key [rows, D] after RoPE and before P_h, value [rows, D] with P_v in it."""
        if self.kv is not None:
            self.k_clip.copy_(clip_logit(search_clip(key @ self.key, self.kv)))
            self.v_clip.copy_(clip_logit(search_clip(value, self.kv)))

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the transform of the keys to what `quota.ops` runs."""
        if self.kv is not None:
            self.key.copy_(rounded_factor(self.key))

    def _query_transform(self) -> Tensor:
        """The transposed inverse of the keys' transform, rounded as a factor, float32 [D, D]."""
        return rounded_factor(torch.linalg.inv(self.key.detach().double()).T.float())

    def export(self) -> dict[str, Tensor]:
        """`q_transform`, `k_transform` [D, D], `k_clip`, `v_clip` [] float32; empty where KV is not quantized. Call
        `freeze` first."""
        if self.kv is None:
            return {}
        return {
            "q_transform": self._query_transform().cpu().contiguous(),
            "k_transform": self.key.detach().cpu().clone(),
            "k_clip": self.k_clip.detach().sigmoid().cpu().clone(),
            "v_clip": self.v_clip.detach().sigmoid().cpu().clone(),
        }


@dataclass(frozen=True)
class ValueMerge:
    """How a group's weight carries P_v, whose parameter stays the layer's. rows: those that produce V; None for a
    group that consumes the attention output, which carries P_v in every head."""

    heads: HeadTransforms
    rows: slice | None

    def weight(self, w: Tensor) -> Tensor:
        """W [N, K] with P_v in its rows or its columns."""
        matrix = self.heads.value.to(w.dtype)
        if self.rows is None:
            return apply_kronecker(w, None, torch.linalg.inv(matrix).T)
        mixed = (matrix.T @ w[self.rows].view(-1, matrix.shape[0], w.shape[1])).reshape(-1, w.shape[1])
        return torch.cat([w[: self.rows.start], mixed, w[self.rows.stop :]])

    def bias(self, bias: Tensor) -> Tensor:
        """Bias [N] with P_v in the value rows."""
        if self.rows is None:
            return bias
        value = (bias[self.rows].view(-1, self.heads.value.shape[0]) @ self.heads.value).reshape(-1)
        return torch.cat([bias[: self.rows.start], value, bias[self.rows.stop :]])


class ProjectionGroup(nn.Module):
    """Linears that read the same input: one transform, one activation clip, one fused weight [N, K] with a clip per
    row.

    linears: the float linears, in fused row order. left, right: sizes (l, r) of the Kronecker factors, 0 = absent.
    diag: learn a per-channel scale (only where it can be merged upstream). merge: where this group produces V or
    consumes the attention output. scheme: with formats of weights and activations.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        left: int,
        right: int,
        diag: bool,
        merge: ValueMerge | None = None,
        scheme: Scheme = DEFAULT,
    ) -> None:
        super().__init__()
        assert scheme.weights is not None and scheme.activations is not None
        self.mode, self.weights, self.activations = "learn", scheme.weights, scheme.activations
        self.sizes = [linear.out_features for linear in linears]
        self.in_features, self.out_features = linears[0].in_features, sum(self.sizes)
        device = linears[0].weight.device
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]).float())
        biases = [linear.bias for linear in linears]
        fused = None if biases[0] is None else torch.cat([bias.detach() for bias in biases]).float()
        self.register_buffer("bias", fused)
        self.left = nn.Parameter(hadamard(left).float().to(device)) if left else None
        self.right = nn.Parameter(hadamard(right).float().to(device)) if right else None
        self.log_diag = nn.Parameter(torch.zeros(self.in_features, device=device)) if diag else None
        self.clip = nn.Parameter(clip_logit(0.9).to(device))
        self.weight_clip = nn.Parameter(clip_logit(torch.full((self.out_features,), 0.9)).to(device))
        self.merge = merge
        self._outputs: list[Tensor] = []  # of the parts that have not been asked for, the last part first
        self._frozen: dict[str, Tensor] = {}
        self.observed: list[Tensor] | None = None

    def part(self, x: Tensor, index: int) -> Tensor:
        """Output of linear `index` for x [..., K]. Upstream's forward asks for the parts of one input in their order:
        the first runs the group, the others take what it left."""
        if index == 0:
            x = x.float()
            if self.observed is not None:
                self.observed.append(x.detach().reshape(-1, self.in_features))
            self._outputs = list(self(x).split(self.sizes, dim=-1))[::-1]
        if len(self._outputs) != len(self.sizes) - index:
            raise RuntimeError(f"part {index}: expected the parts of an input in their order")
        return self._outputs.pop()

    def forward(self, x: Tensor) -> Tensor:
        """x float32 [..., K] -> fused output [..., N] under the current mode."""
        with exactly(x):
            operands = self._operands(x)
        return functional.linear(*operands)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.mode == "rtn":
            u, w = fake_symmetric(x, 1.0, self.activations), fake_symmetric(self.weight, 1.0, self.weights)
            return u, w, self.bias
        if self.mode == "frozen":
            u = fake_symmetric(self.deployed_transform(x), self._frozen["clip"], self.activations)
            return u, self._frozen["weight"], self._frozen.get("bias")
        u, w = self.transform(x), self.effective_weight()
        if self.mode == "learn":
            u = fake_symmetric(u, self.clip.sigmoid(), self.activations)
            w = fake_symmetric(w, self.weight_clip.sigmoid(), self.weights)
        return u, w, self.effective_bias()

    def transform(self, x: Tensor) -> Tensor:
        """x [..., K] -> x / diag through the Kronecker factors."""
        return apply_kronecker(self._without_diag(x), self.left, self.right)

    def deployed_transform(self, x: Tensor) -> Tensor:
        """As `transform`, in the integers of `quota.ops.transform`: after `freeze` equal bits."""
        return _deployed(self._without_diag(x), self.left, self.right)

    def _without_diag(self, x: Tensor) -> Tensor:
        return x if self.log_diag is None else x * torch.exp(-self.log_diag)

    def effective_weight(self) -> Tensor:
        """W [N, K] with every merged transform: P_v (rows or columns), diag, inverse Kronecker factors."""
        return self._transform_weight(self._merged(self.weight))

    def _merged(self, w: Tensor) -> Tensor:
        return w if self.merge is None else self.merge.weight(w)

    def _transform_weight(self, w: Tensor) -> Tensor:
        if self.log_diag is not None:
            w = w * torch.exp(self.log_diag.to(w.dtype))
        left, right = (None if p is None else torch.linalg.inv(p.to(w.dtype)).T for p in (self.left, self.right))
        return apply_kronecker(w, left, right)

    def effective_bias(self) -> Tensor | None:
        """Bias [N] with P_v applied to the value rows."""
        return self.bias if self.bias is None or self.merge is None else self.merge.bias(self.bias)

    @torch.no_grad()
    def initialise(self, x: Tensor, alpha: float) -> None:
        """Choose the start from x [rows, K] (as observed in mode "float"): Hadamard or identity factors, with or
        without diag, clips searched.

        The candidate with the least output error wins.
        """
        merged = self._merged(self.weight)
        target = functional.linear(x, merged)
        best: tuple[float, dict[str, Tensor]] | None = None
        scales = [None] if self.log_diag is None else [None, _smooth_scale(x, merged, alpha)]
        for flat, scale in [(flat, scale) for flat in (True, False) for scale in scales]:
            for matrix in (self.left, self.right):
                if matrix is not None:
                    matrix.copy_(hadamard(matrix.shape[0]) if flat else torch.eye(matrix.shape[0]))
            if self.log_diag is not None:
                self.log_diag.copy_(torch.zeros_like(self.log_diag) if scale is None else scale.log())
            u, w = self.transform(x), self._transform_weight(merged)
            clip, w_clip = search_clip(u, self.activations), search_weight_clip(w, self.weights)
            self.clip.copy_(clip_logit(clip))
            self.weight_clip.copy_(clip_logit(w_clip))
            w = fake_symmetric(w, w_clip, self.weights)
            out = functional.linear(fake_symmetric(u, clip, self.activations), w)
            error = float((out - target).double().square().sum())
            if best is None or error < best[0]:
                best = (error, {name: p.detach().clone() for name, p in self.named_parameters()})
        assert best is not None
        for name, parameter in self.named_parameters():
            parameter.copy_(best[1][name])

    @torch.no_grad()
    def freeze(self) -> None:
        """Round the factors, merge in float64, quantize the weight and keep the integers: mode "frozen" then computes
        what the packed checkpoint computes. The weight takes up the inverse of the rounded factors, so their rounding
        is no error."""
        for matrix in (self.left, self.right):
            if matrix is not None:
                matrix.copy_(rounded_factor(matrix))
        w = self._transform_weight(self._merged(self.weight.double())).float()
        w_q, w_scale = quantize_weight(w, self.weight_clip.detach().sigmoid(), self.weights)
        dense = unpack_int4(w_q, self.in_features).float() * w_scale[:, None]
        self._frozen = {
            "w_q": w_q,
            "w_scale": w_scale,
            "clip": self.clip.detach().sigmoid().clone(),
            "weight": dense,
        }
        bias = self.effective_bias()
        if bias is not None:
            self._frozen["bias"] = bias.detach().clone()

    def export(self) -> dict[str, Tensor]:
        """Checkpoint tensors of the group (QuantLinear's names) on the CPU: left?, right?, clip, w_q, w_scale, bias?.
        Call `freeze` first."""
        out = {"w_q": self._frozen["w_q"], "w_scale": self._frozen["w_scale"], "clip": self._frozen["clip"]}
        for name in ("left", "right"):
            matrix = getattr(self, name)
            if matrix is not None:
                out[name] = matrix.detach()
        if "bias" in self._frozen:
            out["bias"] = self._frozen["bias"]
        return {name: tensor.cpu().contiguous() for name, tensor in out.items()}

    def diag(self) -> Tensor | None:
        """Per-channel scale c [K] float32 that the producer of the input divides by, or None."""
        return None if self.log_diag is None else torch.exp(self.log_diag.detach()).cpu()


def _deployed(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """x [..., K] through factors as `quota.ops.transform` computes it."""
    if left is None and right is None:
        return x
    fixed = (None if matrix is None else fixed_factor(matrix) for matrix in (left, right))
    return fixed_kronecker(x.reshape(-1, x.shape[-1]), *fixed).view(x.shape)


def _smooth_scale(x: Tensor, w: Tensor, alpha: float) -> Tensor:
    """SmoothQuant-style c = x_max^alpha / w_max^(1 - alpha), geometric mean 1 (the published code stores its
    reciprocal)."""
    x_max, w_max = x.abs().amax(0).clamp_min(1e-5), w.abs().amax(0).clamp_min(1e-5)
    scale = x_max**alpha / w_max ** (1 - alpha)
    return (scale / scale.log().mean().exp()).clamp(1e-3, 1e3)


class GroupPart(nn.Module):
    """Stands where a float linear stood: returns its rows of the shared group's output."""

    def __init__(self, group: ProjectionGroup, index: int) -> None:
        super().__init__()
        self.group, self.index = group, index

    def forward(self, x: Tensor) -> Tensor:
        return self.group.part(x, self.index)
