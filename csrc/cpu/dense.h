// float_linear: the one float layer of a quantized model, its output head, in chain order.
#pragma once

#include <cstdint>

#include "chain.h"
#include "quota/kernels.h"

namespace {

// Rows are taken in blocks, so that a block of x stays in the second-level cache while the panel streams.
constexpr int64_t kHeadRows = 64;

template <class V>
void float_linear_panel(const quota::FloatLinearArgs& args, int64_t panel) {
  const int64_t n0 = panel * quota::kPanel, cols = args.n - n0 < quota::kPanel ? args.n - n0 : quota::kPanel;
  for (int64_t m = 0; m < args.m; m += kHeadRows) {
    const int64_t rows = args.m - m < kHeadRows ? args.m - m : kHeadRows;
    chain_matmul<V>({args.x + m * args.k, args.k, 1, args.panels + n0 * args.k, quota::kPanel, args.y + m * args.n + n0, args.n}, rows, cols, args.k);
  }
}

}  // namespace
