// The kernels, once, on sixteen lanes of `Vec`; each instruction set's source includes this after defining Vec. Everything is in an unnamed
// namespace and no standard template is instantiated here: a weak symbol compiled for one instruction set must never serve another.
#pragma once

#include "chain.h"
#include "elementwise.h"
#include "float_linear.h"
#include "kv16_attention.h"
#include "kv4_append.h"
#include "kv4_attention.h"
#include "qkv_append.h"
#include "quantize_act.h"
#include "quota/kernels.h"
#include "rms_norm.h"
#include "token_score.h"
#include "transform.h"
#include "w4a16_linear.h"
#include "w4a4_linear.h"
#include "w8a8_linear.h"

namespace {

template <class V>
constexpr quota::Kernels table_of(const char* name) {
  return {name, transform_rows<V>, quantize_rows<V>, append_rows<V>, rms_norm_rows<V>, heads_range<V>, attention_tile<V, VectorDot<V>>,
          attention16_tile<V>, score_head<V, VectorDot<V>>, float_linear_panel<V>, grouped_panel<V>, quantize8_rows<V>, linear8_panel<V>, linear_of<V, finish<V>>()};
}

}  // namespace
