// float_linear: the one float layer of a quantized model, its output head, in chain order.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

// Rows are taken in blocks, so that a block of x stays in the second-level cache while the panel streams.
constexpr int64_t kHeadRows = 64;

template <class V, class B>
inline void float_panel(const quota::FloatLinearArgs& args, const B* weights, int64_t n0) {
  const int64_t cols = args.n - n0 < quota::kPanel ? args.n - n0 : quota::kPanel;
  for (int64_t m = 0; m < args.m; m += kHeadRows) {
    const ChainOf<B> chain{args.x + m * args.k, args.k, 1, weights, quota::kPanel, args.y + m * args.n + n0, args.n};
    chain_product<V>(chain, args.m - m < kHeadRows ? args.m - m : kHeadRows, cols, args.k);
  }
}

template <class V>
void float_linear_panel(const quota::FloatLinearArgs& args, int64_t panel) {
  const int64_t n0 = panel * quota::kPanel, first = n0 * args.k;
  if (args.bfloat16)
    float_panel<V>(args, static_cast<const quota::Bfloat16*>(args.panels) + first, n0);
  else
    float_panel<V>(args, static_cast<const float*>(args.panels) + first, n0);
}

}  // namespace
