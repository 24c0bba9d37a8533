// The kernels, once, on sixteen lanes of `Vec`; each instruction set's source includes this after defining Vec, split_nibbles and
// transpose_bytes. Everything is in an unnamed namespace and no standard template is instantiated here: a weak symbol compiled for one
// instruction set must never serve another.
#pragma once

#include "attention.h"
#include "chain.h"
#include "dense.h"
#include "linear.h"
#include "quantize.h"
#include "quota/kernels.h"
#include "score.h"

namespace {

template <class V>
constexpr quota::Kernels table_of(const char* name) {
  return {name, transform_rows<V>, quantize_rows<V>, unpack_rows<V>, linear_panel<V>, append_rows<V>, attention_tile<V>, score_columns<V>, float_linear_panel<V>};
}

}  // namespace
