// Matrix products of few rows: bound by reading the weights, so every weight is read once for up to eight rows.
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
#include "product.h"

#include <algorithm>

#include "simd.h"

namespace lathe {
namespace {

constexpr int kUnit = kLanes;  // outputs that one piece of work computes
constexpr int kMaxRows = 8;    // rows that share one reading of a weight
constexpr int kPadding = 32;
constexpr int kRowGroup = 32;  // inputs that share a scale of a quantized row; divides every group_size
constexpr int kPrefetchBytes = 4096;
constexpr double kBytesPerWeight[] = {4, 2, 0.5, 1};  // by LatheKind
constexpr double kBytesPerNanosecond = 16;            // that a thread reads

int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}

bool is_quantized(int kind) {
    return kind == LATHE_INT4 || kind == LATHE_INT8;
}

// What a kernel needs to know of some rows of inputs.
struct Rows {
    const float* floats;
    const int8_t* codes;
    const float* scale_TG;
    const int32_t* sum_TG;
    int stride, groups;
};

Rows rows_from(const Inputs::Form& form, int row) {
    const int groups = is_quantized(form.kind) ? form.in_features / kRowGroup : 0;
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
    const int first = unit * kUnit;
    const int count = std::min(kUnit, segment.out_features - first);
    f32x16 lanes[kNumRows][kUnit] = {};
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

void write_unit(const LatheSegment& segment, int unit, f32x16 total, float* output, bool add) {
    const int first = unit * kUnit;
    const int count = std::min(kUnit, segment.out_features - first);
    output += segment.out_offset + first;
    if (count == kUnit) {
        if (segment.bias) total += load_lanes(segment.bias + first);
        if (add) total += load_lanes(output);
        store_lanes(output, total);
        return;
    }
    for (int lane = 0; lane < count; lane++) {
        float value = total[lane];
        if (segment.bias) value += segment.bias[first + lane];
        output[lane] = add ? output[lane] + value : value;
    }
}

bool serves(const Inputs::Form& form, const LatheSegment& segment) {
    return (is_quantized(form.kind) ? is_quantized(segment.kind) : form.kind == segment.kind) &&
           form.in_offset == segment.in_offset && form.in_features == segment.in_features;
}

// One row's features in symmetric INT8, a scale to a group.
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

// Of every 32 values the even ones, then the odd ones; zeros after the last.
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

}  // namespace

void Inputs::reset(const LatheLinear& linear, int stage, int num_rows) {
    num_rows_ = num_rows;
    num_forms_ = 0;
    for (int s = 0; s < linear.num_segments; s++) {
        const LatheSegment& segment = linear.segments[s];
        if (segment.stage != stage) continue;
        const bool known = std::any_of(
            forms_.begin(), forms_.begin() + num_forms_, [&](const Form& form) {
                return serves(form, segment);
            });
        if (known) continue;
        if (num_forms_ == forms_.size()) forms_.emplace_back();
        Form& form = forms_[num_forms_++];
        form.kind = segment.kind;
        form.in_offset = segment.in_offset;
        form.in_features = segment.in_features;
        form.stride = ceil_div(segment.in_features, kPadding) * kPadding;
        const size_t size = size_t(num_rows) * form.stride;
        // Grown, never shrunk: a step's buffers are those of the largest step so far.
        const auto grow = [](auto& buffer, size_t wanted) {
            if (buffer.size() < wanted) buffer.resize(wanted);
        };
        if (!is_quantized(segment.kind)) {
            grow(form.floats, size);
        } else {
            const size_t groups = size_t(num_rows) * (segment.in_features / kRowGroup);
            grow(form.codes, size);
            grow(form.scale_TG, groups);
            grow(form.sum_TG, groups);
        }
    }
}

const Inputs::Form& Inputs::form_of(const LatheSegment& segment) const {
    for (size_t f = 0; f < num_forms_; f++) {
        const Form& form = forms_[f];
        if (serves(form, segment)) return form;
    }
    __builtin_unreachable();
}

void Inputs::prepare_row(int row, const float* x) {
    for (size_t f = 0; f < num_forms_; f++) {
        Form& form = forms_[f];
        const float* from = x + form.in_offset;
        const int size = form.in_features;
        const size_t start = size_t(row) * form.stride;
        if (form.kind == LATHE_FP32) {
            std::memcpy(form.floats.data() + start, from, size * sizeof(float));
            std::fill_n(form.floats.data() + start + size, form.stride - size, 0.0f);
        } else if (form.kind == LATHE_BF16) {
            separate_pairs(from, size, form.floats.data() + start);
        } else {
            const size_t group = size_t(row) * (size / kRowGroup);
            quantize_row(from, size, form.codes.data() + start,
                         form.scale_TG.data() + group, form.sum_TG.data() + group);
        }
    }
}

void multiply_stage(Pool& pool, const LatheLinear& linear, int stage, const Inputs& inputs,
                    float* middle, float* output, int output_stride, bool add) {
    int num_units = 0;
    double num_bytes = 0;
    for (int s = 0; s < linear.num_segments; s++) {
        const LatheSegment& segment = linear.segments[s];
        if (segment.stage != stage) continue;
        num_units += ceil_div(segment.out_features, kUnit);
        num_bytes += double(segment.out_features) * segment.in_features * kBytesPerWeight[segment.kind];
    }
    const double passes = ceil_div(inputs.num_rows(), kMaxRows);
    pool.run_items(num_units, passes * num_bytes / num_units / kBytesPerNanosecond, [&](int item) {
        int unit = item, s = 0;
        for (;; s++) {
            if (linear.segments[s].stage != stage) continue;
            const int units = ceil_div(linear.segments[s].out_features, kUnit);
            if (unit < units) break;
            unit -= units;
        }
        const LatheSegment& segment = linear.segments[s];
        const Inputs::Form& form = inputs.form_of(segment);
        float* to = segment.into_middle ? middle : output;
        const int stride = segment.into_middle ? linear.middle_features : output_stride;
        for (int row = 0; row < inputs.num_rows(); row += kMaxRows) {
            const int count = std::min(kMaxRows, inputs.num_rows() - row);
            f32x16 total[kMaxRows];
            unit_rows(segment, unit, rows_from(form, row), count, total);
            for (int r = 0; r < count; r++)
                write_unit(segment, unit, total[r], to + size_t(row + r) * stride,
                           add && !segment.into_middle);
        }
    });
}

void multiply(Pool& pool, const LatheLinear& linear, LinearScratch& scratch, float* output,
              int output_stride, bool add) {
    const int num_rows = scratch.inputs.num_rows();
    const size_t wanted = size_t(num_rows) * linear.middle_features;
    if (scratch.middle.size() < wanted) scratch.middle.resize(wanted);
    multiply_stage(pool, linear, 0, scratch.inputs, scratch.middle.data(), output, output_stride, add);
    if (!linear.middle_features) return;
    scratch.middle_inputs.reset(linear, 1, num_rows);
    pool.run_items(num_rows, linear.middle_features, [&](int row) {
        scratch.middle_inputs.prepare_row(row,
                                          scratch.middle.data() + size_t(row) * linear.middle_features);
    });
    multiply_stage(pool, linear, 1, scratch.middle_inputs, nullptr, output, output_stride, add);
}

void dequantize(Pool& pool, const LatheSegment& segment, uint16_t* weight_OI) {
    const bool int4 = segment.kind == LATHE_INT4;
    const size_t in_features = segment.in_features;
    const int groups = segment.in_features / segment.group_size;
    const int bytes_per_eight = int4 ? 64 : 128;
    pool.run_items(ceil_div(segment.out_features, kUnit), 4.0 * in_features, [&](int unit) {
        const int count = std::min(kUnit, segment.out_features - unit * kUnit);
        const auto* weight = static_cast<const uint8_t*>(segment.weight) +
                             unit * in_features / 8 * bytes_per_eight;
        uint16_t* rows = weight_OI + unit * kUnit * in_features;
        for (size_t i = 0; i < in_features; i += 8, weight += bytes_per_eight) {
            const size_t at = (size_t(unit) * groups + i / segment.group_size) * kLanes;
            const f32x16 scale = segment.scale_is_fp32
                                     ? load_lanes(static_cast<const float*>(segment.scale) + at)
                                     : load_lanes(static_cast<const uint16_t*>(segment.scale) + at);
            i32x16 shift = i32x16{} + (int4 ? 8 : 128);
            if (segment.zero_point)
                shift += widen(load<i8x16>(segment.zero_point + at));
            u32x16 pairs[4];  // of neighbouring inputs; a lane is an output
            for (int pair = 0; pair < 4; pair++) {
                u32x16 halves[2];
                for (int half = 0; half < 2; half++) {
                    const int input = 2 * pair + half;
                    const u32x16 word = load<u32x16>(weight + (int4 ? 0 : input / 4 * 64));
                    const int bit = 8 * (input % 4) + (int4 ? input / 4 * 4 : 0);
                    const i32x16 code = (i32x16)(word >> bit & (int4 ? 15u : 255u));
                    const f32x16 value = __builtin_convertvector(code - shift, f32x16) * scale;
                    halves[half] = widen(to_bf16(value));
                }
                pairs[pair] = halves[0] | halves[1] << 16;
            }
            u32x16 outputs[4];  // four pairs each of outputs k, 4 + k, 8 + k, 12 + k
            transpose_fours(pairs, outputs);
            for (int output = 0; output < count; output++)
                std::memcpy(rows + output * in_features + i,
                            reinterpret_cast<const char*>(&outputs[output % 4]) + output / 4 * 16, 16);
        }
    });
}

}  // namespace lathe
