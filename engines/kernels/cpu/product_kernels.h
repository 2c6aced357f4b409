// What product.cpp asks of the kernels: vector_product.cpp's for any machine, amx_product.cpp's for some.
#pragma once

#include <algorithm>

#include "amx.h"
#include "product.h"
#include "simd.h"

namespace lathe {

constexpr int kWorkOutputs = 32;  // outputs that one piece of work computes; a multiple of kLanes
constexpr int kRowGroup = 32;     // inputs that share a scale of a quantized row; divides every group_size

inline int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

inline bool is_quantized(int kind) {
    return kind == LATHE_INT4 || kind == LATHE_INT8;
}

// One piece of work: rows [row, row_end) with outputs from `output` on, `kWorkOutputs` of them or up to the last.
struct Work {
    const LatheSegment& segment;
    const Inputs::Form& form;
    int row, row_end;
    int output;
    float* to;         // the first row of the layer's output
    int stride;
    bool add;

    int num_outputs() const { return std::min(kWorkOutputs, segment.out_features - output); }
};

// Sixteen outputs of one row, from `first` on: those that the segment has.
LATHE_INLINE void write_lanes(const Work& work, int row, int first, f32x16 total) {
    const int count = std::min(kLanes, work.segment.out_features - first);
    const float* bias = work.segment.bias;
    float* output = work.to + size_t(row) * work.stride + work.segment.out_offset + first;
    if (count == kLanes) {
        if (bias) total += load_lanes(bias + first);
        if (work.add) total += load_lanes(output);
        store_lanes(output, total);
        return;
    }
    for (int lane = 0; lane < count; lane++) {
        float value = total[lane];
        if (bias) value += bias[first + lane];
        output[lane] = work.add ? output[lane] + value : value;
    }
}

void multiply_with_vectors(const Work& work);
// Of every 32 values the even ones, then the odd ones; zeros after the last.
void separate_pairs(const float* x, int num_features, float* to);
// One row's features in symmetric INT8, a scale to a group of 32.
void quantize_row(const float* x, int num_features, int8_t* codes, float* scales, int32_t* sums);

// For `LATHE_BF16_TILES` and quantized weights, where `has_amx()`. tiles: of the thread.
void multiply_with_amx(const Work& work, Tiles& tiles);
// One row's features in bfloat16, 32 of them 32 bytes x 16 apart: blocks of 16 rows are tiles, one after the other.
void round_for_amx(const float* x, int num_features, uint16_t* to);

}  // namespace lathe
