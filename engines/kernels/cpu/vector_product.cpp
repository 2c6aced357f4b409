// Products on vector units, few rows at a time: bound by reading the weights, so every weight is read once for up to eight
// rows.
//
// Dense weights stay row-major, as torch multiplies them, so that one copy serves both.
// INT4 weights lie in blocks of 16 outputs: byte 4 * lane + i of the j-th 64 bytes holds, for output `lane`, the code
// of input 8j + i in its low half and of input 8j + 4 + i in its high half, each plus 8. One 64-byte load is then two
// operands of the byte dot product, whose other operand is four inputs broadcast to all lanes; no sum ever crosses
// lanes. INT8 weights are the same with 16 outputs x 4 inputs to 64 bytes, each code plus 128.
//
// Rows are quantized as they come: symmetric INT8 with one scale per 32 inputs, as llama.cpp does; in the weights' groups
// of 64 the rounding lost almost three times the perplexity (SmolLM2). With w = s (c - z), codes stored as c + 8 and x = t q:
// sum w x = s t (sum (c + 8) q - (z + 8) sum q), the sums in exact integers.
//
// A row's result does not depend on the rows beside it: groups are added in order, in float32, in every kernel.
#include "product_kernels.h"

namespace lathe {
namespace {

constexpr int kMaxRows = 8;  // rows that share one reading of a weight
constexpr int kPrefetchBytes = 4096;

// What a kernel needs to know of some rows of inputs.
struct Rows {
    const float* floats;
    const int8_t* codes;
    const float* scale_TG;
    const int32_t* sum_TG;
    int stride, groups;
};

Rows rows_from(const Inputs::Form& form, int row) {
    const int groups = form.layout == Layout::kCodes ? form.in_features / kRowGroup : 0;
    return {form.floats.data() + size_t(row) * form.stride * (groups == 0),
            form.codes.data() + size_t(row) * form.stride * (groups > 0),
            form.scale_TG.data() + size_t(row) * groups,
            form.sum_TG.data() + size_t(row) * groups,
            form.stride,
            groups};
}

LATHE_INLINE int32_t four_codes(const int8_t* codes) {
    int32_t four;
    std::memcpy(&four, codes, 4);
    return four;
}

template <int kNumRows, class Scale, bool kInt4>
void quantized_unit(const LatheSegment& segment, int unit, const Rows& rows,
                    f32x16 (&total)[kMaxRows]) {
    const int groups = segment.in_features / segment.group_size;
    const int parts = segment.group_size / kRowGroup;
    constexpr int kLoads = kRowGroup / (kInt4 ? 8 : 4);
    const size_t first = size_t(unit) * groups;
    const auto* weight = static_cast<const uint8_t*>(segment.weight) + first * parts * kLoads * 64;
    const auto* scale = static_cast<const Scale*>(segment.scale) + first * kLanes;
    const int8_t* zero = segment.zero_point ? segment.zero_point + first * kLanes : nullptr;
    constexpr int32_t kShift = kInt4 ? 8 : 128;
    f32x16 sums[kNumRows] = {};
    for (int part = 0; part < groups * parts; part++) {
        if (part && part % parts == 0) {
            scale += kLanes;
            if (zero) zero += kLanes;
        }
        i32x16 shift = i32x16{} + kShift;
        if (zero) shift += widen(load<i8x16>(zero));
        i32x16 low[kNumRows], high[kNumRows];  // two chains, because the instruction takes five cycles
        for (int row = 0; row < kNumRows; row++) {
            low[row] = -(shift * rows.sum_TG[row * rows.groups + part]);
            high[row] = i32x16{};
        }
        const int8_t* codes = rows.codes + part * kRowGroup;
        for (int j = 0; j < kLoads; j++, weight += 64) {
            __builtin_prefetch(weight + kPrefetchBytes);
            const u8x64 bytes = load<u8x64>(weight);
            if (kInt4) {
                const u8x64 low_codes = bytes & 15;
                const u8x64 high_codes = (u8x64)((u16x32)bytes >> 4) & 15;
                for (int row = 0; row < kNumRows; row++) {
                    const int8_t* eight = codes + row * rows.stride + 8 * j;
                    low[row] = dot_u8s8(low[row], low_codes, four_codes(eight));
                    high[row] = dot_u8s8(high[row], high_codes, four_codes(eight + 4));
                }
            } else {
                for (int row = 0; row < kNumRows; row++) {
                    const int32_t four = four_codes(codes + row * rows.stride + 4 * j);
                    i32x16& chain = j % 2 ? high[row] : low[row];
                    chain = dot_wide_u8s8(chain, bytes, four);
                }
            }
        }
        const f32x16 weight_scale = load_lanes(scale);
        for (int row = 0; row < kNumRows; row++) {
            const f32x16 dot = __builtin_convertvector(low[row] + high[row], f32x16);
            sums[row] = fma(dot, weight_scale * rows.scale_TG[row * rows.groups + part], sums[row]);
        }
    }
    for (int row = 0; row < kNumRows; row++) total[row] = sums[row];
}

template <class Scale, bool kInt4>
void quantized_rows(const LatheSegment& segment, int unit, const Rows& rows, int num_rows,
                    f32x16 (&total)[kMaxRows]) {
    switch (num_rows) {
        case 1: return quantized_unit<1, Scale, kInt4>(segment, unit, rows, total);
        case 2: return quantized_unit<2, Scale, kInt4>(segment, unit, rows, total);
        case 3: return quantized_unit<3, Scale, kInt4>(segment, unit, rows, total);
        case 4: return quantized_unit<4, Scale, kInt4>(segment, unit, rows, total);
        case 5: return quantized_unit<5, Scale, kInt4>(segment, unit, rows, total);
        case 6: return quantized_unit<6, Scale, kInt4>(segment, unit, rows, total);
        case 7: return quantized_unit<7, Scale, kInt4>(segment, unit, rows, total);
        default: return quantized_unit<8, Scale, kInt4>(segment, unit, rows, total);
    }
}

// How `kStep` dense weights become operands of fused multiply-adds. bfloat16 is widened to its even and its odd elements,
// and rows are kept in that order (`prepare_row`). The processors' own bfloat16 dot product would round the rows, and is
// slower than this on some of them (Sapphire Rapids: two cycles for 32 products, against one).
struct Bf16Weights {
    using Element = uint16_t;
    static constexpr int kStep = 32, kParts = 2;
    static LATHE_INLINE void load_parts(const Element* from, f32x16 (&parts)[kParts]) {
        const u32x16 pairs = load<u32x16>(from);
        parts[0] = (f32x16)(pairs << 16);
        parts[1] = (f32x16)(pairs & 0xffff0000u);
    }
};

struct Fp32Weights {
    using Element = float;
    static constexpr int kStep = 16, kParts = 1;
    static LATHE_INLINE void load_parts(const Element* from, f32x16 (&parts)[kParts]) {
        parts[0] = load_lanes(from);
    }
};

template <class Weights, int kNumRows, int kOutputs>
LATHE_INLINE void dense_step(const typename Weights::Element* weight, size_t weight_stride,
                             const float* x, int x_stride, f32x16 (&sums)[kNumRows][kOutputs]) {
    for (int o = 0; o < kOutputs; o++) {
        f32x16 parts[Weights::kParts];
        Weights::load_parts(weight + o * weight_stride, parts);
        for (int part = 0; part < Weights::kParts; part++)
            for (int row = 0; row < kNumRows; row++)
                sums[row][o] =
                    fma(parts[part], load_lanes(x + row * x_stride + part * kLanes), sums[row][o]);
    }
}

// kOutputs outputs of kNumRows rows; each has one accumulator, whose lanes are inputs modulo the step.
template <class Weights, int kNumRows, int kOutputs>
LATHE_INLINE void dense_tile(const typename Weights::Element* weight, int in_features,
                             const Rows& rows, f32x16 (&sums)[kNumRows][kOutputs]) {
    constexpr int kStep = Weights::kStep;
    const int whole = in_features / kStep * kStep;
    for (int row = 0; row < kNumRows; row++)
        for (int o = 0; o < kOutputs; o++) sums[row][o] = f32x16{};
    for (int i = 0; i < whole; i += kStep) {
        // What the next tile reads: left to itself the hardware follows these short rows at half the bandwidth.
        for (int o = 0; o < kOutputs; o++)
            __builtin_prefetch(weight + size_t(kOutputs + o) * in_features + i);
        dense_step<Weights>(weight + i, in_features, rows.floats + i, rows.stride, sums);
    }
    if (whole == in_features) return;
    typename Weights::Element last[kOutputs * kStep] = {};
    for (int o = 0; o < kOutputs; o++)
        std::memcpy(last + o * kStep, weight + size_t(o) * in_features + whole,
                    (in_features - whole) * sizeof last[0]);
    dense_step<Weights>(last, kStep, rows.floats + whole, rows.stride, sums);
}

template <class Weights, int kNumRows, int kOutputs>
void dense_unit(const LatheSegment& segment, int unit, const Rows& rows,
                f32x16 (&total)[kMaxRows]) {
    const auto* weight = static_cast<const typename Weights::Element*>(segment.weight);
    const int first = unit * kLanes;
    const int count = std::min(kLanes, segment.out_features - first);
    f32x16 lanes[kNumRows][kLanes] = {};
    int o = 0;
    for (; o + kOutputs <= count; o += kOutputs) {
        f32x16 sums[kNumRows][kOutputs];
        dense_tile<Weights, kNumRows, kOutputs>(weight + size_t(first + o) * segment.in_features,
                                            segment.in_features, rows, sums);
        for (int row = 0; row < kNumRows; row++)
            for (int i = 0; i < kOutputs; i++) lanes[row][o + i] = sums[row][i];
    }
    for (; o < count; o++) {
        f32x16 sums[kNumRows][1];
        dense_tile<Weights, kNumRows, 1>(weight + size_t(first + o) * segment.in_features,
                                     segment.in_features, rows, sums);
        for (int row = 0; row < kNumRows; row++) lanes[row][o] = sums[row][0];
    }
    for (int row = 0; row < kNumRows; row++) total[row] = sum_each(lanes[row]);
}

template <class Weights>
void dense_rows(const LatheSegment& segment, int unit, const Rows& rows, int num_rows,
                f32x16 (&total)[kMaxRows]) {
    switch (num_rows) {
        case 1: return dense_unit<Weights, 1, 4>(segment, unit, rows, total);
        case 2: return dense_unit<Weights, 2, 4>(segment, unit, rows, total);
        case 3: return dense_unit<Weights, 3, 4>(segment, unit, rows, total);
        case 4: return dense_unit<Weights, 4, 4>(segment, unit, rows, total);
        case 5: return dense_unit<Weights, 5, 4>(segment, unit, rows, total);
        case 6: return dense_unit<Weights, 6, 4>(segment, unit, rows, total);
        case 7: return dense_unit<Weights, 7, 2>(segment, unit, rows, total);
        default: return dense_unit<Weights, 8, 2>(segment, unit, rows, total);
    }
}

void unit_rows(const LatheSegment& segment, int unit, const Rows& rows, int num_rows,
               f32x16 (&total)[kMaxRows]) {
    switch (segment.kind) {
        case LATHE_FP32: return dense_rows<Fp32Weights>(segment, unit, rows, num_rows, total);
        case LATHE_BF16: return dense_rows<Bf16Weights>(segment, unit, rows, num_rows, total);
        case LATHE_INT4:
            if (segment.scale_is_fp32)
                return quantized_rows<float, true>(segment, unit, rows, num_rows, total);
            return quantized_rows<uint16_t, true>(segment, unit, rows, num_rows, total);
        default:
            if (segment.scale_is_fp32)
                return quantized_rows<float, false>(segment, unit, rows, num_rows, total);
            return quantized_rows<uint16_t, false>(segment, unit, rows, num_rows, total);
    }
}

}  // namespace

void multiply_with_vectors(const Work& work) {
    const int end = work.output + work.num_outputs();
    for (int row = work.row; row < work.row_end; row += kMaxRows) {
        const int count = std::min(kMaxRows, work.row_end - row);
        for (int output = work.output; output < end; output += kLanes) {
            f32x16 total[kMaxRows];
            unit_rows(work.segment, output / kLanes, rows_from(work.form, row), count, total);
            for (int r = 0; r < count; r++) write_lanes(work, row + r, output, total[r]);
        }
    }
}

void quantize_row(const float* x, int num_features, int8_t* codes, float* scales, int32_t* sums) {
    for (int first = 0; first < num_features; first += kRowGroup) {
        f32x16 peak{};
        for (int i = 0; i < kRowGroup; i += kLanes)
            peak = maximum(peak, absolute(load_lanes(x + first + i)));
        const float limit = largest(peak);
        const float inverse = limit > 0 ? 127 / limit : 0;
        i32x16 total{};
        for (int i = 0; i < kRowGroup; i += kLanes) {
            const i32x16 rounded = round_to_int(load_lanes(x + first + i) * inverse);
            total += rounded;
            store(codes + first + i, narrow(rounded));
        }
        *scales++ = limit / 127;
        *sums++ = sum(total);
    }
}

void separate_pairs(const float* x, int num_features, float* to) {
    int i = 0;
    for (; i + 2 * kLanes <= num_features; i += 2 * kLanes) {
        const f32x16 a = load_lanes(x + i), b = load_lanes(x + i + kLanes);
        store_lanes(to + i, even_lanes(a, b));
        store_lanes(to + i + kLanes, odd_lanes(a, b));
    }
    if (i == num_features) return;
    std::fill_n(to + i, 2 * kLanes, 0.0f);
    for (int j = i; j < num_features; j++) to[i + (j - i) / 2 + (j - i) % 2 * kLanes] = x[j];
}

}  // namespace lathe
