// Quantised rows: how the weight of a linear layer lies in bytes. This text is normative.
//
// A weight is [out_features][in_features]; each of its rows (one output feature) is quantised by itself, so
// that any range of rows is one range of bytes on the drive. Groups are kWeightGroup input features, each
// with a scale and a zero point of its own (FlexGen, 2303.06865, section 4); the last may have fewer.
//
//   codes    group_count groups of kWeightGroup codes, 0 .. 2^code_bits - 1:
//              8 bits: code i of a group is its byte i
//              4 bits: byte j of a group (0 .. 31) has code j in bits 0..3 and code j + 32 in bits 4..7
//            codes of features that are not there are 0
//   params   group_count pairs of little-endian float16: scale, zero
//   padding  zeros, up to a multiple of kWeightRowMultiple bytes
//
// value = zero + scale * code, in fp32; both parameters are chosen by code_params() of quantise.h from the
// group's least and greatest value, so no value within float16's range is off by more than scale / 2. A group
// that holds an infinity or a NaN has codes 0 and a NaN for its zero point.
//
// Rows may begin at any byte.
#pragma once

#include <cstdint>

#include "base/types.h"

namespace csd {

constexpr int64_t kWeightGroup = 64;
constexpr int64_t kWeightRowMultiple = 64;

// Rows of x that weight_dots takes at once: sums of more would not fit the registers of any instruction set.
constexpr int64_t kWeightDotsMax = 6;

constexpr int64_t weight_group_count(int64_t in_features) {
  return (in_features + kWeightGroup - 1) / kWeightGroup;
}

constexpr int64_t weight_group_bytes(int code_bits) { return kWeightGroup * code_bits / 8; }

// Where in a row the parameters begin.
constexpr int64_t weight_params_offset(int code_bits, int64_t in_features) {
  return weight_group_count(in_features) * weight_group_bytes(code_bits);
}

constexpr int64_t weight_row_bytes(int code_bits, int64_t in_features) {
  return round_up(weight_params_offset(code_bits, in_features) + 4 * weight_group_count(in_features),
                  kWeightRowMultiple);
}

// The table's functions in plain C++ (kernels.h): the specification.
namespace plain {

void quantise_weight_row(int code_bits, DType source_dtype, const void* source, int64_t in_features,
                         uint8_t* row);
void dequantise_weight_row(int code_bits, const uint8_t* row, int64_t in_features, DType target_dtype,
                           void* target);
void weight_dots(int code_bits, const float* x, int64_t x_count, const uint8_t* rows, int64_t row_count,
                 int64_t in_features, float* out, int64_t out_stride);

}  // namespace plain
}  // namespace csd
