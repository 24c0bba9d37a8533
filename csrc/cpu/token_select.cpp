// token_select: a partial selection instead of a sort; the order is total, so the result is unique.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quota/kernels.h"

namespace quota {

void select_tokens(const float* score, const uint8_t* eligible, int64_t count, int64_t keep, uint8_t* mask) {
  std::vector<int64_t> order;
  order.reserve(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i)
    if (eligible[i]) order.push_back(i);
  const auto before = [&](int64_t a, int64_t b) {
    const bool a_nan = std::isnan(score[a]), b_nan = std::isnan(score[b]);
    if (a_nan != b_nan) return a_nan;
    return score[a] > score[b] || (!(score[a] < score[b]) && a < b);
  };
  const auto end = order.begin() + std::clamp<int64_t>(keep, 0, static_cast<int64_t>(order.size()));
  if (end != order.end()) std::nth_element(order.begin(), end, order.end(), before);
  std::memset(mask, 0, static_cast<size_t>(count));
  for (auto i = order.begin(); i != end; ++i) mask[*i] = 1;
}

}  // namespace quota
