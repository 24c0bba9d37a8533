"""Triton kernels, one module per op of `quota.ops`: a plain `@triton.jit` function and the function that launches it on
tensors.

Every kernel gives the bits of the reference or, where that leaves the order of a sum open, of the native CPU library:
integers are exact, and float sums are chains in the same order. Products and sums are never fused by the compiler
(`launch`); where the contract fuses, the kernel says `tl.fma`.

Launches of one decoder layer in a decode step: 12 (two norms, four times quantize and multiply, one `qkv_append`, one
attention), one more for each product whose K is split and two more where attention spreads its blocks over the device,
so 18 at most; torch adds the two residual sums. No launch waits for the host, except `token_score`, which prefill alone
uses. The functions that launch take what their op takes; kernels take pointers and sizes one by one.
"""
