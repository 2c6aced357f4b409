// Linear layers of segments: which rows stand where, and who computes which outputs.
#include "product.h"

#include "product_kernels.h"

namespace lathe {
namespace {

constexpr int kPadding = 32;
constexpr int kRowsAtOnce = 256;  // of a piece of work; as many rows of inputs stay in a core's second cache
constexpr int kMaxVectorRows = 16;  // of quantized weights where there is AMX too
constexpr double kBytesPerWeight[] = {4, 2, 0.5, 1, 2};  // by LatheKind
constexpr double kBytesPerNanosecond = 16;            // that a thread reads
constexpr int kRowsPerReading = 8;                    // that vector units multiply with a weight while they have it

Layout layout_for(const LatheSegment& segment) {
    switch (segment.kind) {
        case LATHE_FP32: return Layout::kFloats;
        case LATHE_BF16: return Layout::kEvenOdd;
        case LATHE_BF16_TILES: return Layout::kTiles;
        default: return Layout::kCodes;
    }
}

bool serves(const Inputs::Form& form, const LatheSegment& segment) {
    return form.layout == layout_for(segment) && form.in_offset == segment.in_offset &&
           form.in_features == segment.in_features;
}

bool uses_amx(const LatheSegment& segment, int num_rows) {
    if (segment.kind == LATHE_BF16_TILES) return true;
    return is_quantized(segment.kind) && num_rows > kMaxVectorRows && has_amx();
}

// One stage, on all threads.
void multiply_stage(Pool& pool, const LatheLinear& linear, int stage, const Inputs& inputs,
                    float* middle, float* output, int output_stride, bool add) {
    const int num_rows = inputs.num_rows(), num_slabs = ceil_div(num_rows, kRowsAtOnce);
    int num_pieces = 0;
    double num_bytes = 0;
    for (int s = 0; s < linear.num_segments; s++) {
        const LatheSegment& segment = linear.segments[s];
        if (segment.stage != stage) continue;
        num_pieces += ceil_div(segment.out_features, kWorkOutputs);
        num_bytes += double(segment.out_features) * segment.in_features * kBytesPerWeight[segment.kind];
    }
    const double readings = ceil_div(std::min(num_rows, kRowsAtOnce), kRowsPerReading);
    const double nanoseconds = readings * num_bytes / num_pieces / kBytesPerNanosecond;
    const auto compute = [&](int item, Tiles& tiles) {
        int piece = item % num_pieces, s = 0;
        for (;; s++) {
            if (linear.segments[s].stage != stage) continue;
            const int pieces = ceil_div(linear.segments[s].out_features, kWorkOutputs);
            if (piece < pieces) break;
            piece -= pieces;
        }
        const LatheSegment& segment = linear.segments[s];
        const int row = item / num_pieces * kRowsAtOnce;
        const Work work{.segment = segment,
                        .form = inputs.form_of(segment),
                        .row = row,
                        .row_end = std::min(row + kRowsAtOnce, num_rows),
                        .output = piece * kWorkOutputs,
                        .to = segment.into_middle ? middle : output,
                        .stride = segment.into_middle ? linear.middle_features : output_stride,
                        .add = add && !segment.into_middle};
        uses_amx(segment, num_rows) ? multiply_with_amx(work, tiles) : multiply_with_vectors(work);
    };
    pool.run_ranges(num_slabs * num_pieces, nanoseconds, [&](int begin, int end) {
        Tiles tiles;
        for (int item = begin; item < end; item++) compute(item, tiles);
    });
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
        form.layout = layout_for(segment);
        form.in_offset = segment.in_offset;
        form.in_features = segment.in_features;
        form.stride = ceil_div(segment.in_features, kPadding) * kPadding;
        const int whole_rows = ceil_div(num_rows, kLanes) * kLanes;  // what a tile takes
        if (form.layout == Layout::kTiles) {
            grown(form.bf16, size_t(whole_rows) * form.stride);
        } else if (form.layout == Layout::kCodes) {
            const size_t groups = size_t(num_rows) * (segment.in_features / kRowGroup);
            grown(form.codes, size_t(whole_rows) * form.stride);
            grown(form.scale_TG, groups);
            grown(form.sum_TG, groups);
        } else {
            grown(form.floats, size_t(num_rows) * form.stride);
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
        if (form.layout == Layout::kTiles) {
            const size_t block = size_t(row / kLanes) * kLanes * form.stride;
            round_for_amx(from, size, form.bf16.data() + block + row % kLanes * kPadding);
        } else if (form.layout == Layout::kFloats) {
            std::memcpy(form.floats.data() + start, from, size * sizeof(float));
            std::fill_n(form.floats.data() + start + size, form.stride - size, 0.0f);
        } else if (form.layout == Layout::kEvenOdd) {
            separate_pairs(from, size, form.floats.data() + start);
        } else {
            const size_t group = size_t(row) * (size / kRowGroup);
            quantize_row(from, size, form.codes.data() + start,
                         form.scale_TG.data() + group, form.sum_TG.data() + group);
        }
    }
}

void multiply(Pool& pool, const LatheLinear& linear, LinearScratch& scratch, float* output,
              int output_stride, bool add) {
    const int num_rows = scratch.inputs.num_rows();
    float* middle = grown(scratch.middle, size_t(num_rows) * linear.middle_features);
    multiply_stage(pool, linear, 0, scratch.inputs, middle, output, output_stride, add);
    if (!linear.middle_features) return;
    scratch.middle_inputs.reset(linear, 1, num_rows);
    pool.run_items(num_rows, linear.middle_features, [&](int row) {
        scratch.middle_inputs.prepare_row(row, middle + size_t(row) * linear.middle_features);
    });
    multiply_stage(pool, linear, 1, scratch.middle_inputs, nullptr, output, output_stride, add);
}

void dequantize(Pool& pool, const LatheSegment& segment, uint16_t* weight_OI) {
    const bool int4 = segment.kind == LATHE_INT4;
    const size_t in_features = segment.in_features;
    const int groups = segment.in_features / segment.group_size;
    const int bytes_per_eight = int4 ? 64 : 128;
    pool.run_items(ceil_div(segment.out_features, kLanes), 4.0 * in_features, [&](int unit) {
        const int count = std::min(kLanes, segment.out_features - unit * kLanes);
        const auto* weight = static_cast<const uint8_t*>(segment.weight) +
                             unit * in_features / 8 * bytes_per_eight;
        uint16_t* rows = weight_OI + unit * kLanes * in_features;
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
