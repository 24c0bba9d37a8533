// w4a4_linear with the 256-bit dot product of x86 processors without AVX-512 (AVX-VNNI); the rest of their table is AVX2's.
#include "dot_ymm.h"
#include "w4a4_linear.h"

namespace quota {
extern const Kernels kernels_avx2;
}  // namespace quota

namespace {

struct Dot {
  static __m256i add(__m256i sum, __m256i x, __m256i z) { return _mm256_dpbusd_avx_epi32(sum, x, z); }
  static __m256i widen(__m256i sum) { return sum; }

  template <int kRows, bool kPacked, bool kContinue>
  static void dot(const uint8_t* w, const int8_t* a, int64_t lda, int64_t groups, int32_t* out) {
    dot_ymm<Dot, kRows, kPacked, kContinue>(w, a, lda, groups, out);
  }
};

void finish_avx2(const quota::LinearArgs& args, const int32_t* sums, int64_t panel, int64_t row, int64_t rows) {
  quota::kernels_avx2.linear.finish(args, sums, panel, row, rows);
}

}  // namespace

namespace quota {
extern const Linear linear_avxvnni;
const Linear linear_avxvnni = linear_of<Dot, finish_avx2>();
}  // namespace quota
