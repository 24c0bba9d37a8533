// Memory and layouts: compiled for the baseline instruction set.
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace quota {

Arena::~Arena() {
  for (int i = 0; i < count_; ++i) std::free(slabs_[i].data);
}

void* Arena::take(size_t bytes) {
  bytes = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64)) + 64;
  for (int i = 0; i < count_; ++i) {
    if (slabs_[i].bytes - slabs_[i].used >= bytes) {
      void* data = static_cast<char*>(slabs_[i].data) + slabs_[i].used;
      slabs_[i].used += bytes;
      return data;
    }
  }
  if (count_ == kSlabs) throw std::bad_alloc();
  size_t size = bytes < (size_t{1} << 20) ? size_t{1} << 20 : bytes;
  void* data = std::aligned_alloc(64, size);
  if (data == nullptr) throw std::bad_alloc();
  slabs_[count_++] = {data, size, bytes};
  return data;
}

void Arena::reset() {
  size_t total = 0;
  for (int i = 0; i < count_; ++i) {
    slabs_[i].used = 0;
    total += slabs_[i].bytes;
  }
  if (count_ > 4 || total > (size_t{256} << 20)) {  // many slabs, or one huge call: start over
    for (int i = 0; i < count_; ++i) std::free(slabs_[i].data);
    count_ = 0;
  }
}

void pack_weight(const uint8_t* w_q, int64_t n, int64_t k, uint8_t* blocked, int32_t* w_sum) {
  const int64_t groups = round_up(k, kGroupK) / kGroupK, row_bytes = (k + 1) / 2;
  std::memset(blocked, 0x88, static_cast<size_t>(round_up(n, kBlockN) / kBlockN * groups * 256));  // 0x88: two zero weights
  for (int64_t c = 0; c < n; ++c) {
    const uint8_t* row = w_q + c * row_bytes;
    uint8_t* base = blocked + c / kBlockN * groups * 256 + c % kBlockN * 4;
    int32_t sum = 0;
    for (int64_t i = 0; i < k; ++i) {
      const uint8_t code = static_cast<uint8_t>((row[i / 2] >> (i % 2 * 4) & 15) ^ 8);  // w + 8
      sum += code - 8;
      uint8_t& byte = base[i / kGroupK * 256 + i % 4];
      byte = i % kGroupK < 4 ? static_cast<uint8_t>((byte & 0xF0) | code) : static_cast<uint8_t>((byte & 0x0F) | code << 4);
    }
    w_sum[c] = sum;
  }
}

void unpack_rows(const uint8_t* x_q, int64_t k, int64_t kp, int64_t begin, int64_t end, int8_t* x, int32_t* x_sum8) {
  const int64_t row_bytes = (k + 1) / 2;
  for (int64_t m = begin; m < end; ++m) {
    const uint8_t* row = x_q + m * row_bytes;
    int8_t* out = x + m * kp;
    int32_t sum = 0;
    for (int64_t i = 0; i < k / 2; ++i) {
      const int8_t low = static_cast<int8_t>(((row[i] & 15) ^ 8) - 8), high = static_cast<int8_t>((row[i] >> 4 ^ 8) - 8);
      out[2 * i] = low;
      out[2 * i + 1] = high;
      sum += low + high;
    }
    if (k % 2) {
      out[k - 1] = static_cast<int8_t>(((row[k / 2] & 15) ^ 8) - 8);
      sum += out[k - 1];
    }
    for (int64_t i = k; i < kp; ++i) out[i] = 0;
    x_sum8[m] = 8 * sum;
  }
}

}  // namespace quota
